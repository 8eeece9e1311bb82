// The index map of blockify, unblockify, patchify and unpatchify, for the CPU and the CUDA code. No torch header.
//
// All four are one operation: a contiguous output is filled in order from an input that is read by its strides,
//     out[i0, i1, ...] = in[i0 * in_stride0 + i1 * in_stride1 + ...] (+ pos[...]),
// and differ only in their list of dimensions. Offsets are in elements and 64 bits wide.

#pragma once

#include <cstdint>

#include "sizes.h"

#if defined(__CUDACC__)
#define NEST_FAST_HD __host__ __device__
#else
#define NEST_FAST_HD
#endif

namespace nest_fast {

// Division by a number known in advance. Below 2^31 it is a multiplication and a shift (Granlund and Montgomery,
// "Division by Invariant Integers using Multiplication", 1994).
struct Divisor {
  int64_t value = 1;
  uint32_t magic = 1;
  uint32_t shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(divisor) {
    if (divisor >> 31) return;
    while ((int64_t{1} << shift) < divisor) ++shift;
    magic = static_cast<uint32_t>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }

  NEST_FAST_HD int64_t quotient(int64_t n) const { return n / value; }

  // Of n and divisor below 2^31.
  NEST_FAST_HD uint32_t quotient(uint32_t n) const {
    const auto high = static_cast<uint32_t>((uint64_t{n} * magic) >> 32);
    return (high + n) >> shift;
  }
};

struct Dim {
  int64_t size;
  int64_t in;      // stride of the input
  int64_t pos;     // stride of the position embedding (1, T, N, C), contiguous; 0 along the batch
  int64_t out = 0; // stride of the output
};

struct Offsets {
  int64_t in = 0;
  int64_t pos = 0;
  int64_t out = 0;
};

class IndexMap {
 public:
  static constexpr int kMaxRank = 8;

  // Appends a dimension, outermost first.
  void add(int64_t size, int64_t in, int64_t pos = 0) { dims_[rank_++] = {size, in, pos}; }

  // After the last dimension: computes the output's strides and merges dimensions that are one in all three tensors.
  // Without a position embedding its strides are 0 and forbid nothing.
  void finish() {
    int64_t stride = 1;
    for (int d = rank_ - 1; d >= 0; --d) {
      dims_[d].out = stride;
      stride *= dims_[d].size;
    }
    numel_ = stride;
    int last = -1;
    for (int d = 0; d < rank_; ++d) {
      const Dim dim = dims_[d];
      if (dim.size == 1) continue;
      if (last >= 0 && dims_[last].in == dim.size * dim.in && dims_[last].pos == dim.size * dim.pos) {
        dims_[last] = {dims_[last].size * dim.size, dim.in, dim.pos, dim.out};
      } else {
        dims_[++last] = dim;
      }
    }
    if (last < 0) dims_[++last] = {1, 1, 1, 1};
    rank_ = last + 1;
    refresh();
  }

  // Groups the innermost dimension into vectors of `width` elements, which has to divide its size: from then on an
  // index counts vectors. Strides, and so offsets, stay in elements.
  void vectorize(int64_t width) {
    Dim& dim = dims_[rank_ - 1];
    dim = {dim.size / width, dim.in * width, dim.pos * width, dim.out * width};
    numel_ /= width;
    refresh();
  }

  // Changes the order in which indices run, not what is copied: dimension `from` comes to place `to`, further in.
  void move(int from, int to) {
    const Dim dim = dims_[from];
    for (; from < to; ++from) dims_[from] = dims_[from + 1];
    dims_[to] = dim;
    refresh();
  }

  NEST_FAST_HD int rank() const { return rank_; }
  NEST_FAST_HD int64_t numel() const { return numel_; }
  NEST_FAST_HD const Dim& dim(int d) const { return dims_[d]; }
  const Dim& last() const { return dims_[rank_ - 1]; }

  // Calls visit(d, i) for each dimension d with the index i that element (or vector) number `index` has in it.
  template <typename Visit>
  NEST_FAST_HD void decompose(int64_t index, Visit visit) const {
    if (numel_ >> 31) {
      decompose_as(index, visit);
    } else {
      decompose_as(static_cast<uint32_t>(index), visit);
    }
  }

  // Where that element is in each tensor.
  NEST_FAST_HD Offsets at(int64_t index) const {
    Offsets offsets;
    decompose(index, [&](int d, int64_t i) {
      offsets.in += i * dims_[d].in;
      offsets.pos += i * dims_[d].pos;
      offsets.out += i * dims_[d].out;
    });
    return offsets;
  }

 private:
  template <typename Index, typename Visit>
  NEST_FAST_HD void decompose_as(Index index, Visit visit) const {
    // Unrolled, so that a kernel's parameters are indexed by constants; the wide form is rare and would only be long.
#pragma unroll(sizeof(Index) == 4 ? kMaxRank : 1)
    for (int d = kMaxRank - 1; d >= 0; --d) {
      if (d < rank_) {
        const Index outer = d == 0 ? 0 : divisors_[d].quotient(index);
        visit(d, static_cast<int64_t>(index - outer * static_cast<Index>(dims_[d].size)));
        index = outer;
      }
    }
  }

  void refresh() {
    for (int d = 0; d < rank_; ++d) divisors_[d] = Divisor(dims_[d].size);
  }

  int rank_ = 0;
  int64_t numel_ = 0;
  Dim dims_[kMaxRank] = {};
  Divisor divisors_[kMaxRank];
};

// (B, H, W, C) with strides `s` -> (B, T, N, C)
inline IndexMap blockify_map(int64_t B, int64_t C, Size2 grid, Size2 block, const int64_t* s, bool has_pos) {
  const int64_t pos = has_pos ? C : 0;
  const int64_t N = block.h * block.w;
  IndexMap map;
  map.add(B, s[0]);
  map.add(grid.h, s[1] * block.h, pos * N * grid.w);
  map.add(grid.w, s[2] * block.w, pos * N);
  map.add(block.h, s[1], pos * block.w);
  map.add(block.w, s[2], pos);
  map.add(C, s[3], has_pos);
  map.finish();
  return map;
}

// (B, T, N, C) with strides `s` -> (B, H, W, C)
inline IndexMap unblockify_map(int64_t B, int64_t C, Size2 grid, Size2 block, const int64_t* s, bool has_pos) {
  const int64_t pos = has_pos ? C : 0;
  const int64_t N = block.h * block.w;
  IndexMap map;
  map.add(B, s[0]);
  map.add(grid.h, s[1] * grid.w, pos * N * grid.w);
  map.add(block.h, s[2] * block.w, pos * block.w);
  map.add(grid.w, s[1], pos * N);
  map.add(block.w, s[2], pos);
  map.add(C, s[3], has_pos);
  map.finish();
  return map;
}

// (B, C, H, W) with strides `s` -> (B, T, N, C * ph * pw)
inline IndexMap patchify_map(int64_t B, int64_t C, Size2 grid, Size2 block, Size2 patch, const int64_t* s) {
  IndexMap map;
  map.add(B, s[0]);
  map.add(grid.h, s[2] * block.h * patch.h);
  map.add(grid.w, s[3] * block.w * patch.w);
  map.add(block.h, s[2] * patch.h);
  map.add(block.w, s[3] * patch.w);
  map.add(C, s[1]);
  map.add(patch.h, s[2]);
  map.add(patch.w, s[3]);
  map.finish();
  return map;
}

// (B, T, N, C * ph * pw) with strides `s` -> (B, C, H, W)
inline IndexMap unpatchify_map(int64_t B, int64_t C, Size2 grid, Size2 block, Size2 patch, const int64_t* s) {
  IndexMap map;
  map.add(B, s[0]);
  map.add(C, s[3] * patch.h * patch.w);
  map.add(grid.h, s[1] * grid.w);
  map.add(block.h, s[2] * block.w);
  map.add(patch.h, s[3] * patch.w);
  map.add(grid.w, s[1]);
  map.add(block.w, s[2]);
  map.add(patch.w, s[3]);
  map.finish();
  return map;
}

// What the CPU kernels fill: planes of the two innermost dimensions, `row.size` runs of `run.size` elements each, which
// are contiguous in the output.
struct Planes {
  const IndexMap& map;
  const void *in, *pos;  // pos is null without a position embedding
  void* out;
  Dim row, run;
};

// By the size of an element, and by dtype with a position embedding: planes [begin, end).
struct BlockifyKernels {
  using Fill = void (*)(const Planes&, int64_t begin, int64_t end);
  Fill copy_1, copy_2, copy_4, copy_8, copy_16;
  Fill add_fp64, add_fp32, add_fp16, add_bf16;
};

}  // namespace nest_fast
