// A linear layer's weight, packed for its product.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "checks.h"
#include "linear.h"
#include "sizes.h"
#include "threads.h"

namespace nest_fast {

// A Linear and the memory of its packed weight, floats (groups, K steps, NR). Packed in every call, which costs as much
// as reading and writing it once, or by the caller, who then answers for it that the weight is the same.
struct PackedLinear {
  Linear linear{};
  Tensor memory;

  // x @ weight^T + bias, for a weight (out, in), which is not read if it is given `packed`.
  PackedLinear(const char* name, const LinearKernels& isa, const Tensor& weight, const std::optional<Tensor>& bias,
               ScalarType dtype, int64_t in, const std::optional<Tensor>& packed) {
    check_rank(name, weight);
    linear.in = in, linear.out = weight.size(0);
    linear.weight = rows_of(name, weight, dtype, in, linear.weight_stride);
    linear.bias = bias ? vector_of<void>("bias", *bias, dtype, linear.out) : nullptr;
    if (packed)
      take(name, isa, *packed);
    else
      pack(isa, isa.pack_weight, weight);
  }

  // x @ weight, for a weight (in, out).
  static PackedLinear transposed(const char* name, const LinearKernels& isa, const Tensor& weight, ScalarType dtype,
                                 int64_t in, int64_t out) {
    check_rank(name, weight);
    STD_TORCH_CHECK(weight.size(0) == in, name, ": expected ", in, " rows, got ", weight.size(0));
    PackedLinear p;
    p.linear.in = in, p.linear.out = out;
    p.linear.weight = rows_of(name, weight, dtype, out, p.linear.weight_stride);
    p.pack(isa, isa.pack_weight_transposed, weight);
    return p;
  }

 private:
  PackedLinear() = default;

  static void check_rank(const char* name, const Tensor& weight) {
    STD_TORCH_CHECK(weight.dim() == 2, name, ": expected 2 dimensions (out, in), got ", weight.dim());
  }

  std::vector<int64_t> packed_size(const LinearKernels& isa) const {
    const int64_t groups = ceil_div(linear.out, isa.nr), floats = isa.packed_floats(linear.in, linear.out);
    return {groups, groups ? floats / (groups * isa.nr) : 0, isa.nr};
  }

  void take(const char* name, const LinearKernels& isa, const Tensor& packed) {
    check_packed(name, packed, packed_size(isa));
    memory = packed;
    linear.packed_b = static_cast<float*>(const_cast<void*>(packed.const_data_ptr()));  // only read from now on
  }

  void pack(const LinearKernels& isa, void (*pack_groups)(const Linear&, int64_t begin, int64_t end),
            const Tensor& weight) {
    memory = torch::stable::new_empty(weight, packed_size(isa), ScalarType::Float);
    linear.packed_b = static_cast<float*>(memory.mutable_data_ptr());
    parallel_for(memory.size(0), [&](int64_t begin, int64_t end) { pack_groups(linear, begin, end); });
  }
};

inline Norm norm_of(const Tensor& weight, const Tensor& bias, double eps, int64_t features) {
  return {vector_of<float>("norm_weight", weight, ScalarType::Float, features),
          vector_of<float>("norm_bias", bias, ScalarType::Float, features), static_cast<float>(eps)};
}

inline constexpr int64_t kRowsAtLeast = 48;  // for which a thread reads a weight again

// work(begin, end) for ranges that make up the tiles of so many rows.
template <class Work>
void for_row_tiles(const LinearKernels& isa, int64_t rows, Work work) {
  parallel_for(ceil_div(rows, isa.mr), work, 1, ceil_div(kRowsAtLeast, isa.mr));
}

}  // namespace nest_fast
