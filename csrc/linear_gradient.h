// The gradients of linear layers, some rows at a time: first those of the rows, then the sums over them that are the
// weights' gradients, so that the rows are still in cache where they are summed.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "checks.h"
#include "linear.h"
#include "packed_linear.h"
#include "sizes.h"
#include "threads.h"

namespace nest_fast {

inline constexpr int64_t kChunkFloats = 1 << 20;  // of the packed operands of a chunk of rows

// Which gradients of a linear layer are wanted.
struct LinearMask {
  bool weight, bias;

  bool any() const { return weight || bias; }
};

// Which gradients of a branch are wanted: those of its input and of its two linear layers.
struct BranchMask {
  bool dx;
  LinearMask first, second;

  explicit BranchMask(const std::vector<bool>& mask) {
    STD_TORCH_CHECK(mask.size() == 5, "output_mask: expected 5 bools, got ", mask.size());
    dx = mask[0], first = {mask[1], mask[2]}, second = {mask[3], mask[4]};
  }
};

// What is returned for a gradient that is not wanted.
inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// A weight's gradient with the memory of its sums and of a chunk's packed rows.
struct Gradient {
  const LinearKernels& isa;
  const LinearMask wanted;
  WeightGradient p{};
  Tensor sums, bias_sums, packed_dout, packed_x;

  Gradient(const LinearKernels& isa, LinearMask wanted, const Tensor& like, int64_t outs, int64_t ins,
           int64_t chunk_rows)
      : isa(isa), wanted(wanted) {
    const auto floats = [&](bool wanted, Tensor& memory, std::vector<int64_t> sizes) -> float* {
      if (!wanted) return nullptr;
      memory = torch::stable::new_empty(like, sizes, ScalarType::Float);
      if (chunk_rows == 0) torch::stable::zero_(memory);  // otherwise the first chunk's sums are stored
      return static_cast<float*>(memory.mutable_data_ptr());
    };
    const int64_t k_steps = ceil_div(chunk_rows, isa.vnni), rows = whole(outs), columns = whole(ins);
    p.dout = {outs, floats(wanted.any(), packed_dout, {rows, k_steps})};
    p.x = {ins, floats(wanted.weight, packed_x, {columns, k_steps})};
    p.sums = floats(wanted.weight, sums, {rows, columns});
    p.bias_sums = floats(wanted.bias, bias_sums, {rows});
  }

  int64_t groups(int64_t features) const { return ceil_div(features, isa.nr); }
  int64_t whole(int64_t features) const { return groups(features) * isa.nr; }

  void add_chunk(const Chunk& chunk) const {
    if (!wanted.any()) return;
    parallel_for(groups(p.dout.features) * (wanted.weight ? groups(p.x.features) : 1),
                 [&](int64_t begin, int64_t end) { isa.weight_gradient(p, chunk, begin, end); });
  }

  // The weight's (outs, ins) in the dtype of `like`.
  Tensor weight(const Tensor& like) const {
    if (!wanted.weight) return nothing(like);
    const int64_t outs = p.dout.features, ins = p.x.features;
    if (like.scalar_type() == ScalarType::Float && outs == whole(outs) && ins == whole(ins)) return sums;
    Tensor out = torch::stable::new_empty(like, {outs, ins});
    void* data = out.mutable_data_ptr();
    parallel_for(outs, [&](int64_t begin, int64_t end) { isa.round_sums(p.sums, whole(ins), ins, data, begin, end); });
    return out;
  }

  Tensor bias(const Tensor& like) const {
    if (!wanted.bias) return nothing(like);
    Tensor out = torch::stable::new_empty(like, {p.dout.features});
    isa.round_sums(p.bias_sums, 0, p.dout.features, out.mutable_data_ptr(), 0, 1);
    return out;
  }
};

// As many rows as `features` of them, packed, fill a chunk; whole tiles.
inline int64_t rows_of_chunk(const LinearKernels& isa, int64_t rows, int64_t features) {
  const int64_t fitting = kChunkFloats * isa.vnni / features / isa.mr * isa.mr;
  return std::min(rows, std::max(fitting, isa.mr));
}

// Chunk after chunk, `backward` of its rows, which leaves them in the packed operands of `gradients`, and then their
// sums.
template <class P>
void backward_by_chunks(const LinearKernels& isa, void (*backward)(const P&, const Chunk&, int64_t begin, int64_t end),
                        const P& p, int64_t rows, int64_t chunk_rows,
                        std::initializer_list<const Gradient*> gradients) {
  for (int64_t first = 0; first < rows; first += chunk_rows) {
    const Chunk chunk{first, std::min(chunk_rows, rows - first)};
    for_row_tiles(isa, chunk.rows, [&](int64_t begin, int64_t end) { backward(p, chunk, begin, end); });
    for (const Gradient* gradient : gradients) gradient->add_chunk(chunk);
  }
}

inline void check_rows(const Tensor& x, int64_t rows) {
  STD_TORCH_CHECK(x.size(0) == rows, "x: expected ", rows, " rows as dout has, got ", x.size(0));
}

// What the forward kept: as many rows as dout has, without gaps.
inline const void* kept_rows_of(const char* name, const Tensor& x, const Tensor& dout, int64_t features) {
  int64_t stride;
  const void* data = rows_of(name, x, dout.scalar_type(), features, stride);
  STD_TORCH_CHECK(x.size(0) == dout.size(0) && x.is_contiguous(), name, ": expected ", dout.size(0),
                  " contiguous rows as dout has, got ", x.size(0), x.is_contiguous() ? "" : " with gaps");
  return data;
}

}  // namespace nest_fast
