// Work for several threads. No sum may cross them: the same bits come out of any number.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "sizes.h"

namespace nest_fast {

// What one thread has to do at first. It takes half of what is left of it at a time, so that others, once they are
// through with theirs, can help: cores are not alike, and may be busy with something else.
class alignas(64) Share {
 public:
  void set(int64_t begin, int64_t end) { next_ = begin, end_ = end; }

  // Takes at least `least`, or what is left; false where nothing is.
  bool take(int64_t least, int64_t& begin, int64_t& end) {
    begin = next_.load(std::memory_order_relaxed);
    do {
      if (begin >= end_) return false;
      end = std::min(begin + std::max((end_ - begin + 1) / 2, least), end_);
    } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
  }

 private:
  std::atomic<int64_t> next_;
  int64_t end_;
};

// work(begin, end) for ranges that make up [0, count), of at least `grain` but for some that are the last of a thread.
// Less than that is not worth a thread; less than `least` is, but it is not cut further: of work that does something
// once for a range, such as to read a weight.
template <class Work>
void parallel_for(int64_t count, Work work, int64_t grain = 1, int64_t least = 1) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(count, grain));
  if (threads <= 1) {
    if (count > 0) work(int64_t{0}, count);
    return;
  }
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) shares[i].set(count * i / threads, count * (i + 1) / threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    int64_t begin, end;
    for (int64_t own = first; own < last; ++own)
      for (int64_t i = 0; i < threads; ++i)
        while (shares[(own + i) % threads].take(std::max(grain, least), begin, end)) work(begin, end);
  });
}

}  // namespace nest_fast
