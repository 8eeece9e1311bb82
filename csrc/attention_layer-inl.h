// x + scale * proj(attention(qkv(norm(x)))), block by block: what lies between the matmuls stays in cache. Its backward
// is that of its parts.

#if defined(NEST_FAST_ATTENTION_LAYER_INL_H_) == defined(NEST_FAST_TOGGLE)
#ifdef NEST_FAST_ATTENTION_LAYER_INL_H_
#undef NEST_FAST_ATTENTION_LAYER_INL_H_
#else
#define NEST_FAST_ATTENTION_LAYER_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "attention_layer.h"
#include "block_attention-inl.h"
#include "block_attention_backward-inl.h"
#include "isa/vector-inl.h"
#include "linear-inl.h"
#include "matrix-inl.h"
#include "scratch.h"
#include "sizes.h"

NEST_FAST_BEGIN_ISA

// What is divided by at least, as in PyTorch's normalize.
constexpr float kLeastLength = 1e-12f;

template <class T>
inline float length_of(const T* x, int64_t dim) {
  return std::sqrt(row_dot(x, x, dim));
}

// Rows [begin, end): q and k divided by their lengths, v as it is. `unit` may be qkv.
template <class Op>
void unit_vectors(const UnitVectors& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t features = p.heads.packed_features(), dim = p.heads.dim, vectors = p.heads.heads + p.heads.kv_heads;
  for (int64_t row = begin; row < end; ++row) {
    const T* from = static_cast<const T*>(p.qkv) + row * features;
    T* to = static_cast<T*>(p.unit) + row * features;
    if (from != to) std::memcpy(to + vectors * dim, from + vectors * dim, (features - vectors * dim) * sizeof(T));
    for (int64_t i = 0; i < vectors; ++i, from += dim, to += dim) {
      const Vec factor = broadcast(1 / std::max(length_of(from, dim), kLeastLength));
      for (int64_t d = 0; d < dim; d += kLanes) store_part(to + d, dim - d, mul(load_part(from + d, dim - d), factor));
    }
  }
}

// Slices [begin, end) of rows: the gradients of q and k for those of the unit vectors, in place, and the scales'.
template <class Op>
void unit_vectors_backward(const UnitVectors& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t features = p.heads.packed_features(), dim = p.heads.dim, heads = p.heads.heads;
  for (int64_t slice = begin; slice < end; ++slice) {
    float* const dscales = p.dscales ? p.dscales + slice * heads : nullptr;
    if (dscales) std::fill_n(dscales, heads, 0.f);
    const int64_t last = std::min((slice + 1) * p.slice_rows, p.rows);
    for (int64_t row = slice * p.slice_rows; row < last; ++row) {
      const T* x = static_cast<const T*>(p.qkv) + row * features;
      T* dx = static_cast<T*>(p.dqkv) + row * features;
      for (int64_t i = 0; i < heads + p.heads.kv_heads; ++i, x += dim, dx += dim) {
        const float length = length_of(x, dim), inverse = 1 / std::max(length, kLeastLength);
        const float along = row_dot(x, dx, dim) * inverse, scale = i < heads ? p.scales[i] : 1;
        if (i < heads && dscales) dscales[i] += along;
        // A length that was taken for another has no gradient.
        const Vec back = broadcast(length > kLeastLength ? -along * inverse : 0), factor = broadcast(scale * inverse);
        for (int64_t d = 0; d < dim; d += kLanes) {
          const Vec sum = mul_add(load_part(x + d, dim - d), back, load_part(dx + d, dim - d));
          store_part(dx + d, dim - d, mul(sum, factor));
        }
      }
    }
  }
}

// Blocks [begin, end), some at a time.
template <class Op>
void attention_layer(const AttentionLayer& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t tokens = p.heads.tokens, features = p.qkv.in, packed_features = p.qkv.out;
  const int64_t most_blocks = std::min(p.blocks_at_once, end - begin), most_rows = most_blocks * tokens;
  const int64_t a_floats = Tiles(most_rows).count * k_steps_of<Op>(features) * kMR;
  const auto [row, a] = scratch(round_up(features, kNR), a_floats);
  // In training every block's qkv and attention are wanted; otherwise the memory of some blocks serves all.
  const bool training = p.qkv_out != nullptr, unit = p.added.scales != nullptr;
  const int64_t qkv_elements = training && !unit ? 0 : most_rows * packed_features;
  const std::unique_ptr<T[]> memory(new T[qkv_elements + (training ? 0 : most_rows * features)]);

  for (int64_t block = begin; block < end; block += most_blocks) {
    const int64_t blocks = std::min(most_blocks, end - block), first_row = block * tokens, rows = blocks * tokens;
    T* const qkv = training ? static_cast<T*>(p.qkv_out) + first_row * packed_features : memory.get();
    T* const attended = training ? static_cast<T*>(p.attended) + first_row * features : memory.get() + qkv_elements;
    const Tiles tiles(rows);
    pack_from<Op>(tiles, p.x, p.float_x, p.x_stride, p.index, first_row, features, p.norm, row, a);
    multiply_tiles<Op>(tiles, a, p.qkv, [&](int64_t tile, int64_t column, const float* c) {
      store_rows<T>(c, tiles.size(tile), column, p.qkv, {}, qkv + tiles.first(tile) * packed_features,
                    packed_features);
    });
    T* const multiplied = unit ? memory.get() : qkv;
    if (unit) unit_vectors<Op>({p.heads, rows, 0, qkv, multiplied}, 0, rows);
    BlockAttention attention{p.heads.inputs(multiplied, sizeof(T), p.scale),
                             p.heads.whole(static_cast<void*>(attended), sizeof(T)), p.heads.dim, p.lse,
                             p.added};
    if (p.lse) attention.lse += first_row * p.heads.heads * (p.added.any() ? 2 : 1);
    attention.added.first_block = block;
    attention.in_cache = true;
    attend<Op>(attention, 0, blocks * p.heads.heads * row_blocks_per_head(tokens));
    pack_tiles<Op>(tiles, attended, features, features, {}, row, a);
    multiply_tiles<Op>(tiles, a, p.proj, [&](int64_t tile, int64_t column, const float* c) {
      store_to<T>(c, tiles.size(tile), column, p.proj, p.residual, p.out, p.float_x, p.index,
                  first_row + tiles.first(tile));
    });
  }
}

template <class Op>
constexpr AttentionLayerKernels kAttentionLayer = {kLinear<Op>,
                                                   linear<Op>,
                                                   linear_backward<Op>,
                                                   attention_layer<Op>,
                                                   unit_vectors<Op>,
                                                   unit_vectors_backward<Op>,
                                                   kBlockAttention<Op>};

NEST_FAST_END_ISA

#endif  // per-target include guard
