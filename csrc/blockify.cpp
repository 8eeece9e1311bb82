// blockify and its kin on the CPU: every dtype of 1 to 16 bytes, any strides, one pass over memory. blockify-inl.h has
// the computation.

#include "blockify.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "blockify_ops.h"
#include "dispatch.h"
#include "threads.h"

#define NEST_FAST_WITH_BASELINE
#define NEST_FAST_KERNELS "blockify-inl.h"
#include "foreach_isa.h"

namespace nest_fast {
namespace {

constexpr BlockifyKernels with_bf16(BlockifyKernels kernels, BlockifyKernels::Fill add_bf16) {
  kernels.add_bf16 = add_bf16;
  return kernels;
}

// For kNone, then for each set. AVX-512 has a kernel where the arithmetic is what takes time; copies and the other
// sums are no faster with wider moves.
constexpr BlockifyKernels kKernels[] = {
    baseline::kBlockify<>,
#ifdef NEST_FAST_X86
    avx2::kBlockify<>,
    with_bf16(avx2::kBlockify<>, avx512::kAdd<BFloat16>),
    with_bf16(avx2::kBlockify<>, avx512::kAdd<BFloat16>),  // the conversion of AVX512_BF16 drops subnormals
#endif
};

BlockifyKernels::Fill kernel_for(ScalarType dtype, int64_t bytes, bool adds) {
  const BlockifyKernels& isa = kKernels[current_isa() - kNone];
  if (adds) switch (dtype) {
      case ScalarType::Float: return isa.add_fp32;
      case ScalarType::Double: return isa.add_fp64;
      case ScalarType::Half: return isa.add_fp16;
      case ScalarType::BFloat16: return isa.add_bf16;
      default: STD_TORCH_CHECK(false, "pos_embed: expected float64, float32, float16 or bfloat16");
    }
  switch (bytes) {
    case 1: return isa.copy_1;
    case 2: return isa.copy_2;
    case 4: return isa.copy_4;
    case 8: return isa.copy_8;
    case 16: return isa.copy_16;
    default: STD_TORCH_CHECK(false, "x: expected elements of 1, 2, 4, 8 or 16 bytes");
  }
}

void fill(IndexMap map, const Tensor& in, const std::optional<Tensor>& pos, const Tensor& out) {
  const BlockifyKernels::Fill fill_planes = kernel_for(in.scalar_type(), in.element_size(), pos.has_value());
  const int last = map.rank() - 1;
  if (map.dim(last).size < 16) {  // patches: short runs cost least in a plane of many
    int longest = last - 1;
    for (int d = last - 2; d >= std::max(0, last - 3); --d) {
      if (map.dim(d).size > map.dim(longest).size) longest = d;
    }
    if (longest >= 0) map.move(longest, last - 1);
  }
  const Dim run = map.dim(last), row = last > 0 ? map.dim(last - 1) : Dim{1, 0, 0, 0};
  const Planes p{map, in.const_data_ptr(), pos ? pos->const_data_ptr() : nullptr, out.mutable_data_ptr(), row, run};
  constexpr int64_t kGrain = 32768;  // elements worth a thread, as in torch
  const int64_t plane = row.size * run.size;
  parallel_for(
      map.numel() / plane, [&](int64_t begin, int64_t end) { fill_planes(p, begin, end); },
      std::max<int64_t>(1, kGrain / plane));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CPU, m) { register_ops(m); }

}  // namespace nest_fast
