// Work for several threads. No sum may cross them: the same bits come out of any number.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace nest_fast {

// work(begin, end) for ranges that make up [0, count), of at least `grain` where there are so many.
template <class Work>
void parallel_for(int64_t count, Work work, int64_t grain = 1) {
  torch::stable::parallel_for(0, count, grain, work);
}

}  // namespace nest_fast
