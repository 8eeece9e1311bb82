// What the operations ask of their tensors: they can be called without Python, which has checked before.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "sizes.h"

namespace nest_fast {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;

inline void check_dtype(const char* name, const Tensor& x, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": expected dtype ", toString(dtype), ", got ",
                  toString(x.scalar_type()));
}

// Height and width; only a grid may be empty.
inline Size2 size2(const char* name, IntHeaderOnlyArrayRef size, int64_t least = 1) {
  STD_TORCH_CHECK(size.size() == 2 && size[0] >= least && size[1] >= least, name, ": expected two positive sizes");
  return {size[0], size[1]};
}

// Rows (count, features) that are dense, and how far apart they lie.
inline const void* rows_of(const char* name, const Tensor& x, ScalarType dtype, int64_t features, int64_t& stride) {
  check_dtype(name, x, dtype);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == features, name, ": expected 2 dimensions, the last ", features);
  STD_TORCH_CHECK(features > 0, name, ": expected at least 1 feature, got 0");
  STD_TORCH_CHECK(x.stride(1) == 1 || features == 1 || x.numel() == 0, name, ": expected dense rows, got stride ",
                  x.stride(1));
  stride = x.stride(0);
  return x.const_data_ptr();
}

// The dtype of weights that multiply rows x: x's, or of float rows, which are normalised first, another.
inline ScalarType weight_dtype(const Tensor& x, const Tensor& weight, bool normalised) {
  const ScalarType own = x.scalar_type();
  return own == ScalarType::Float && normalised ? weight.scalar_type() : own;
}

// A contiguous (size,) of T, void for any.
template <class T>
const T* vector_of(const char* name, const Tensor& x, ScalarType dtype, int64_t size) {
  check_dtype(name, x, dtype);
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == size && x.is_contiguous(), name, ": expected ", size,
                  " contiguous elements");
  return static_cast<const T*>(x.const_data_ptr());
}

// A weight that the caller has packed. Of floats for another set of instructions, or of another weight, the sizes are
// others.
inline void check_packed(const char* name, const Tensor& packed, const std::vector<int64_t>& sizes) {
  check_dtype(name, packed, ScalarType::Float);
  const auto words = [](const std::vector<int64_t>& sizes) {
    std::string text;
    for (const int64_t size : sizes) text += (text.empty() ? "(" : ", ") + std::to_string(size);
    return text + ")";
  };
  std::vector<int64_t> given(packed.dim());
  for (int64_t i = 0; i < packed.dim(); ++i) given[i] = packed.size(i);
  STD_TORCH_CHECK(given == sizes && packed.is_contiguous(), name, ": expected packed floats ", words(sizes), ", got ",
                  words(given), packed.is_contiguous() ? "" : " with gaps");
}

// An attention's lse as its backward takes it.
inline const float* lse_of(const Tensor& lse, int64_t statistics) {
  check_dtype("lse", lse, ScalarType::Float);
  STD_TORCH_CHECK(lse.is_contiguous() && lse.numel() == statistics, "lse: expected ", statistics,
                  " contiguous elements (B, T, heads, N), got ", lse.numel(), lse.is_contiguous() ? "" : " with gaps");
  return static_cast<const float*>(lse.const_data_ptr());
}

}  // namespace nest_fast
