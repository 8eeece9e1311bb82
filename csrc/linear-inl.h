// Linear layers with what stands before and after them in the same pass, LayerNorm, bias, residual sum, and their
// backward. Rows are taken some at a time, so that what lies between two passes over them stays in cache.

#if defined(NEST_FAST_LINEAR_INL_H_) == defined(NEST_FAST_TOGGLE)
#ifdef NEST_FAST_LINEAR_INL_H_
#undef NEST_FAST_LINEAR_INL_H_
#else
#define NEST_FAST_LINEAR_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "isa/vector-inl.h"
#include "linear.h"
#include "math-inl.h"
#include "matrix-inl.h"
#include "scratch.h"
#include "sizes.h"

NEST_FAST_BEGIN_ISA

constexpr int64_t kCache = 1 << 20;         // bytes of a core's second-level cache, or less
constexpr int64_t kLinearKC = 256;          // K steps summed in a register before a sum is stored
constexpr int64_t kLinearGradientKC = 128;  // the same, over rows

template <class Op>
inline int64_t k_steps_of(int64_t features) {
  return round_up(ceil_div(features, Op::kVnni), kLanes);
}

template <class Op>
int64_t packed_floats(int64_t in, int64_t out) {
  return k_steps_of<Op>(in) * round_up(out, kNR);
}

// Groups [begin, end) of NR output features of a weight (out, in), as B: (groups, K steps, NR).
template <class Op>
void pack_weight(const Linear& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t group_floats = k_steps_of<Op>(p.in) * kNR;
  for (int64_t group = begin; group < end; ++group)
    pack_b_transposed<Op>(static_cast<const T*>(p.weight) + group * kNR * p.weight_stride, p.weight_stride,
                          p.out - group * kNR, p.in, kNR, p.packed_b + group * group_floats);
}

// Rows of x as A, normalised first if there is a norm, as there is where x has not Op's elements; `row` has room for
// one.
template <class Op, class X>
void pack_input(const X* x, int64_t stride, int64_t rows, int64_t features, const Norm& norm, float* row, float* a) {
  if constexpr (std::is_same_v<X, typename Op::Element>)
    if (!norm.weight) return pack_a<Op>(x, stride, rows, features, 0, a);
  constexpr int width = kLanes * Op::kVnni;
  for (int64_t r = 0; r < rows; ++r, x += stride) {
    for (int64_t c = 0; c < round_up(features, width); c += kLanes) store(row + c, load_part(x + c, features - c));
    layer_norm(row, features, norm.weight, norm.bias, norm.eps);
    for (int64_t c = 0; c < features; c += width) {
      Vec parts[Op::kVnni];
#pragma GCC unroll 2
      for (int j = 0; j < Op::kVnni; ++j) parts[j] = load(row + c + j * kLanes);
      store(a + c / width * kPanelA + r * kLanes, Op::from_floats(parts));
    }
  }
}

// Rows of x as A, in tiles of at most MR rows. All but the last have an even number: neighbours can be a VNNI pair.
struct Tiles {
  int64_t rows, count, tile_rows;

  explicit Tiles(int64_t rows)
      : rows(rows), count(ceil_div(rows, kMR)), tile_rows(round_up(ceil_div(rows, count), 2)) {}
  int64_t first(int64_t tile) const { return tile * tile_rows; }
  int64_t size(int64_t tile) const { return std::min(tile_rows, rows - first(tile)); }
};

template <class Op, class X>
void pack_tiles(const Tiles& tiles, const X* x, int64_t stride, int64_t features, const Norm& norm, float* row,
                float* a) {
  for (int64_t tile = 0; tile < tiles.count; ++tile, a += k_steps_of<Op>(features) * kMR)
    pack_input<Op>(x + tiles.first(tile) * stride, stride, tiles.size(tile), features, norm, row, a);
}

// The same of rows index[0], index[1] and so on of x, of x as it is without an index, zeros where that is negative.
template <class Op, class X>
void pack_indexed(const Tiles& tiles, const X* x, int64_t stride, const int64_t* index, int64_t features,
                  const Norm& norm, float* row, float* a) {
  if (!index) return pack_tiles<Op>(tiles, x, stride, features, norm, row, a);
  const int64_t tile_floats = k_steps_of<Op>(features) * kMR;
  for (int64_t tile = 0; tile < tiles.count; ++tile, a += tile_floats)
    for (int64_t r = 0; r < tiles.size(tile); ++r) {
      const int64_t at = index[tiles.first(tile) + r];
      float* const packed_row = a + r * kLanes;
      if (at >= 0)
        pack_input<Op>(x + at * stride, stride, 1, features, norm, row, packed_row);
      else
        for (int64_t i = 0; i < tile_floats; i += kPanelA) store(packed_row + i, zero());
    }
}

// The same from row `first` on of x, of floats or of Op's elements, or of what `index` says from there on.
template <class Op>
void pack_from(const Tiles& tiles, const void* x, bool floats, int64_t stride, const int64_t* index, int64_t first,
               int64_t features, const Norm& norm, float* row, float* a) {
  const auto pack = [&](const auto* rows) {
    pack_indexed<Op>(tiles, index ? rows : rows + first * stride, stride, index ? index + first : nullptr, features,
                     norm, row, a);
  };
  floats ? pack(static_cast<const float*>(x)) : pack(static_cast<const typename Op::Element*>(x));
}

// callback(tile, column) for tile after tile under NR columns after NR columns.
template <class Callback>
void for_each_group(const Tiles& tiles, int64_t columns, Callback callback) {
  for (int64_t column = 0; column < columns; column += kNR)
    for (int64_t tile = 0; tile < tiles.count; ++tile) callback(tile, column);
}

// a @ weight^T, in the order in which NR columns of the weight stay in cache; callback(tile, column, c) gets
// each product (rows of the tile, NR) in c.
template <class Op, class Callback>
void multiply_tiles(const Tiles& tiles, const float* a, const Linear& p, Callback callback) {
  const int64_t k_steps = k_steps_of<Op>(p.in), group_floats = k_steps * kNR;
  // The next columns, of a weight that does not stay in cache with all else.
  const bool stays = packed_floats<Op>(p.in, p.out) * int64_t{sizeof(float)} <= kCache / 4;
  const Shares next(stays ? 0 : group_floats, k_steps, tiles.count);
  alignas(64) float c[kMR * kNR];
  for_each_group(tiles, p.out, [&](int64_t tile, int64_t column) {
    const float* const b = p.packed_b + column * k_steps;
    multiply<Op>(tiles.size(tile), a + tile * k_steps * kMR, b, kNR, k_steps, kLinearKC, {c, kNR, kLanes},
                 column + kNR < p.out ? next.of(b + group_floats, tile) : Ahead{});
    callback(tile, column, c);
  });
}

// Stores c + bias, of T, to rows of out, from `column` on; or residual + scale * (c + bias) if there is one.
template <class T, class Out>
void store_rows(const float* c, int64_t rows, int64_t column, const Linear& p,
                const Residual<std::type_identity_t<Out>>& residual, Out* out, int64_t out_stride) {
  const Vec scale = broadcast(residual.scale);
  for (int64_t v = column; v < std::min(column + kNR, p.out); v += kLanes, c += kLanes) {
    const int64_t count = p.out - v;
    const Vec bias = p.bias ? load_part(static_cast<const T*>(p.bias) + v, count) : zero();
    for (int64_t r = 0; r < rows; ++r) {
      Vec x = add(load(c + r * kNR), bias);
      if (residual.x) x = mul_add(x, scale, load_part(residual.x + r * residual.stride + v, count));
      store_part(out + r * out_stride + v, count, x);
    }
  }
}

// A residual from row `row` on.
template <class T>
Residual<T> rows_at(const Residual<void>& p, int64_t row) {
  if (!p.x) return {};
  return {static_cast<const T*>(p.x) + row * p.stride, p.stride, p.scale};
}

// The same from row `first` on of what an index, if there is one, says; rows without a place are not stored.
template <class T, class Out>
void store_indexed(const float* c, int64_t rows, int64_t column, const Linear& p, const Residual<void>& residual,
                   Out* out, const int64_t* index, int64_t first) {
  const auto at = [&](int64_t row) { return out + row * p.out; };
  if (!index) return store_rows<T>(c, rows, column, p, rows_at<Out>(residual, first), at(first), p.out);
  for (int64_t r = 0; r < rows; ++r)
    if (const int64_t row = index[first + r]; row >= 0)
      store_rows<T>(c + r * kNR, 1, column, p, rows_at<Out>(residual, row), at(row), p.out);
}

// The same to an out, and a residual, of floats or of T.
template <class T>
void store_to(const float* c, int64_t rows, int64_t column, const Linear& p, const Residual<void>& residual, void* out,
              bool floats, const int64_t* index, int64_t first) {
  const auto store = [&](auto* to) { store_indexed<T>(c, rows, column, p, residual, to, index, first); };
  floats ? store(static_cast<float*>(out)) : store(static_cast<T*>(out));
}

// Tiles of rows that are computed together at most, so many that reading the weight is little work for them, while what
// lies between the layers, `floats` a tile, stays in cache.
inline int64_t tiles_at_once(int64_t floats) {
  return std::clamp<int64_t>(kCache / 2 / (floats * int64_t{sizeof(float)}), 1, 16);
}

// callback(tiles, first) for row tiles [begin, end) of `rows` rows, at most `at_once` of them together and about as
// many each time, from row `first` on.
template <class Callback>
void for_tiles(int64_t rows, int64_t begin, int64_t end, int64_t at_once, Callback callback) {
  const int64_t last = std::min(end * kMR, rows);
  at_once = ceil_div(end - begin, ceil_div(end - begin, at_once));
  for (int64_t first = begin * kMR; first < last; first += at_once * kMR)
    callback(Tiles(std::min(at_once * kMR, last - first)), first);
}

// Row tiles [begin, end) of residual + scale * (norm(x) @ weight^T + bias).
template <class Op>
void linear(const LinearLayer& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t tile_floats = k_steps_of<Op>(p.linear.in) * kMR, at_once = tiles_at_once(tile_floats);
  const auto [row, a] = scratch(round_up(p.linear.in, kNR), at_once * tile_floats);
  for_tiles(p.rows, begin, end, at_once, [&](const Tiles& tiles, int64_t first) {
    pack_from<Op>(tiles, p.x, p.float_x, p.x_stride, p.x_index, first, p.linear.in, p.norm, row, a);
    multiply_tiles<Op>(tiles, a, p.linear, [&](int64_t tile, int64_t column, const float* c) {
      store_to<T>(c, tiles.size(tile), column, p.linear, p.residual, p.out, p.float_out, p.out_index,
                  first + tiles.first(tile));
    });
  });
}

// --- backward ---

// Groups [begin, end) of NR columns of a weight (in, out), as B: (groups, K steps, NR).
template <class Op>
void pack_weight_transposed(const Linear& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t k_steps = ceil_div(p.in, Op::kVnni), group_floats = k_steps_of<Op>(p.in) * kNR;
  for (int64_t group = begin; group < end; ++group) {
    float* b = p.packed_b + group * group_floats;
    pack_b<Op>(static_cast<const T*>(p.weight) + group * kNR, p.weight_stride, p.in, p.out - group * kNR, kNR, b);
    std::fill(b + k_steps * kNR, b + group_floats, 0.f);
  }
}

template <class Op>
inline int64_t k_steps_of(const Chunk& chunk) {
  return ceil_div(chunk.rows, Op::kVnni);
}

// `rows` rows of x, packed as B, from row `offset` of the chunk on, which begins a K step.
template <class Op>
void pack_chunk(const typename Op::Element* x, int64_t stride, int64_t rows, const Chunk& chunk, int64_t offset,
                const PackedB& p) {
  if (!p.data) return;
  for (int64_t group = 0; group * kNR < p.features; ++group)
    pack_b<Op>(x + group * kNR, stride, rows, p.features - group * kNR, kNR,
               p.data + (group * k_steps_of<Op>(chunk) + offset / Op::kVnni) * kNR);
}

// Adds the sums over K of NR packed columns to `sums`, or stores them. Summed a few steps at a time: that is exacter.
template <class Op>
inline void sum_columns(const float* b, int64_t k_steps, bool add_sums, float* sums) {
  Vec ones[Op::kVnni];
#pragma GCC unroll 2
  for (int j = 0; j < Op::kVnni; ++j) ones[j] = broadcast(1);
  const Vec one = Op::interleave(ones);
  for (int v = 0; v < kNR; v += kLanes) {
    Vec total = zero();
    for (int64_t k = 0; k < k_steps; k += kLanes) {
      Vec part = zero();
      for (int64_t i = k; i < std::min(k + kLanes, k_steps); ++i) part = Op::dot(load(b + i * kNR + v), one, part);
      total = add(total, part);
    }
    store(sums + v, add_sums ? add(load(sums + v), total) : total);
  }
}

// Squares [begin, end), NR x NR, of a weight's gradient; with the first of a row the bias's. Of the bias's alone there
// is one in a row.
template <class Op>
void weight_gradient(const WeightGradient& p, const Chunk& chunk, int64_t begin, int64_t end) {
  constexpr int rows = kLanes / 2;
  const int64_t k_steps = k_steps_of<Op>(chunk), row_squares = p.sums ? ceil_div(p.x.features, kNR) : 1;
  const int64_t columns = row_squares * kNR;
  for (int64_t square = begin; square < end; ++square) {
    const int64_t out = square / row_squares, in = square % row_squares;
    const float* const dout = p.dout.data + out * k_steps * kNR;
    const float* const x = p.x.data + in * k_steps * kNR;
    float* const sums = p.sums + out * kNR * columns + in * kNR;
    // Some steps of both operands stay in the first-level cache for all rows of the square.
    for (int64_t done = 0; done < k_steps; done += kLinearGradientKC) {
      const int64_t steps = std::min(kLinearGradientKC, k_steps - done);
      const bool add_sums = chunk.first > 0 || done > 0;
      const float* a = dout + done * kNR;
      const float* b = x + done * kNR;
      // The next steps, or those of the next square.
      const bool last = done + steps == k_steps;
      const float* next = last ? p.x.data + (in + 1) % row_squares * k_steps * kNR : b + steps * kNR;
      const Shares next_b(last && row_squares == 1 ? 0 : std::min(kLinearGradientKC, k_steps) * kNR, steps, kNR / rows);
      for (int64_t r = 0; p.sums && r < kNR; r += rows) {
        float* const c = sums + r * columns;
        if (done == 0) prefetch<1>(c, columns, rows, kNR);
        multiply_transposed_tile<Op, rows, 2>(a + r, kNR, b, kNR, steps, add_sums, {c, columns, kLanes},
                                              next_b.of(next, r / rows));
      }
      if (in == 0 && p.bias_sums) sum_columns<Op>(a, steps, add_sums, p.bias_sums + out * kNR);
    }
  }
}

// Rows [begin, end) of sums, which are `stride` apart, rounded to dense rows.
template <class T>
void round_sums(const float* sums, int64_t stride, int64_t features, void* out, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r)
    for (int64_t c = 0; c < features; c += kLanes)
      store_part(static_cast<T*>(out) + r * features + c, features - c, load(sums + r * stride + c));
}

// Row tiles [begin, end) of a chunk: dx = dout @ weight, and dout and x packed as B, as far as they are wanted.
template <class Op>
void linear_backward(const LinearBackward& p, const Chunk& chunk, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t outs = p.linear.in, ins = p.linear.out;
  const int64_t tile_floats = k_steps_of<Op>(outs) * kMR, at_once = tiles_at_once(tile_floats);
  const auto [a] = scratch(at_once * tile_floats);
  for_tiles(chunk.rows, begin, end, at_once, [&](const Tiles& tiles, int64_t offset) {
    const int64_t first = chunk.first + offset;
    const T* dout = static_cast<const T*>(p.dout) + first * p.dout_stride;
    if (p.dx) {
      pack_tiles<Op>(tiles, dout, p.dout_stride, outs, {}, nullptr, a);
      multiply_tiles<Op>(tiles, a, p.linear, [&](int64_t tile, int64_t column, const float* c) {
        store_rows<T>(c, tiles.size(tile), column, p.linear, {},
                      static_cast<T*>(p.dx) + (first + tiles.first(tile)) * ins, ins);
      });
    }
    pack_chunk<Op>(dout, p.dout_stride, tiles.rows, chunk, offset, p.weight.dout);
    pack_chunk<Op>(static_cast<const T*>(p.x) + first * p.x_stride, p.x_stride, tiles.rows, chunk, offset, p.weight.x);
  });
}

template <class Op>
constexpr LinearKernels kLinear = {kMR,
                                   kNR,
                                   Op::kVnni,
                                   packed_floats<Op>,
                                   pack_weight<Op>,
                                   pack_weight_transposed<Op>,
                                   weight_gradient<Op>,
                                   round_sums<typename Op::Element>};

NEST_FAST_END_ISA

#endif  // per-target include guard
