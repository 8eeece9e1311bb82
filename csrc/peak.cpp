// What the processor can do at most, for benchmarks to hold the kernels against: its rate of products, and of bytes.

#include "peak.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "sizes.h"
#include "threads.h"

#define NEST_FAST_KERNELS "peak-inl.h"
#include "foreach_isa.h"

namespace nest_fast {
namespace {

constexpr ByDtype<PeakKernels> kKernels[] = {NEST_FAST_BY_ISA(kPeak)};

// What is computed goes here, so that it is computed.
void use(float x) {
  volatile float used = x;
  static_cast<void>(used);
}

// The sum of what each thread reaches, work(thread) being an amount and done `times` times: the best of each, for a
// thread may have to wait for its processor, which others have too.
template <class Work>
double rate_of_threads(int64_t times, Work work) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> best(torch::stable::get_num_threads());
  torch::stable::parallel_for(0, best.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = 0; i < times; ++i) {
        const Clock::time_point start = Clock::now();
        const double amount = work(thread);
        const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
        best[thread] = std::max(best[thread], amount / std::max(seconds, 1e-9));
      }
  });
  return std::accumulate(best.begin(), best.end(), 0.);
}

// FLOP/s of all threads, of products as they are done for tensors of `dtype`.
double peak_multiply(ScalarType dtype) {
  const PeakKernels& isa = kernels_for(kKernels, "dtype", dtype);
  constexpr int64_t steps = 10'000;  // some 20 us, so often that one of them is not disturbed
  return rate_of_threads(100, [&](int64_t) {
    use(isa.multiply(steps, 0.5f));
    return static_cast<double>(steps * isa.flops);
  });
}

// Bytes/s of all threads, each of which reads a part of `read` and writes a part of `written`, contiguous floats.
double peak_move(Tensor read, Tensor written) {
  const PeakKernels& isa = kernels_for(kKernels, "read", read.scalar_type());
  const int64_t threads = torch::stable::get_num_threads();
  const auto* const from = vector_of<float>("read", read, ScalarType::Float, read.numel());
  vector_of<float>("written", written, ScalarType::Float, written.numel());
  auto* const to = static_cast<float*>(written.mutable_data_ptr());
  STD_TORCH_CHECK(read.numel() % kTrafficFloats == 0 && written.numel() % kTrafficFloats == 0,
                  "read, written: expected multiples of ", kTrafficFloats, " elements, got ", read.numel(), " and ",
                  written.numel());
  // Where the part of a thread begins.
  const auto first = [&](const Tensor& x, int64_t thread) {
    return std::min(ceil_div(x.numel(), threads * kTrafficFloats) * kTrafficFloats * thread, x.numel());
  };
  return rate_of_threads(1, [&](int64_t thread) {
    const int64_t read_from = first(read, thread), write_to = first(written, thread);
    const Traffic part{from + read_from, to + write_to, first(read, thread + 1) - read_from,
                       first(written, thread + 1) - write_to};
    use(isa.move(part));
    return static_cast<double>((part.read + part.written) * sizeof(float));
  });
}

}  // namespace
}  // namespace nest_fast

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CompositeExplicitAutograd, m) {
  m.impl("peak_multiply", TORCH_BOX(&nest_fast::peak_multiply));
  m.impl("peak_move", TORCH_BOX(&nest_fast::peak_move));
}
