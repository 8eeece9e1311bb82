// A linear layer's weight packed by itself, for whoever keeps it: attention_layer and mlp_layer take it.

#include "packed_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "dispatch.h"
#include "linear.h"

#define NEST_FAST_KERNELS "linear-inl.h"
#include "foreach_isa.h"

namespace nest_fast {
namespace {

constexpr ByDtype<LinearKernels> kKernels[] = {NEST_FAST_BY_ISA(kLinear)};

// weight (out, in), dense rows, as floats (groups, K steps, NR), for the set of instructions in use.
Tensor pack_linear(Tensor weight) {
  const LinearKernels& isa = kernels_for(kKernels, "weight", weight.scalar_type());
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected 2 dimensions (out, in), got ", weight.dim());
  return PackedLinear("weight", isa, weight, std::nullopt, weight.scalar_type(), weight.size(1), std::nullopt)
      .memory;
}

}  // namespace
}  // namespace nest_fast

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CPU, m) { m.impl("pack_linear", TORCH_BOX(&nest_fast::pack_linear)); }
