// x + scale * proj(attention(qkv(norm(x)))), block by block: what lies between the matmuls stays in cache. Its backward
// is that of its parts.

#if defined(NEST_FAST_ATTENTION_LAYER_INL_H_) == defined(NEST_FAST_TOGGLE)
#ifdef NEST_FAST_ATTENTION_LAYER_INL_H_
#undef NEST_FAST_ATTENTION_LAYER_INL_H_
#else
#define NEST_FAST_ATTENTION_LAYER_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <memory>

#include "attention_layer.h"
#include "block_attention-inl.h"
#include "isa/vector-inl.h"
#include "linear-inl.h"
#include "matrix-inl.h"
#include "scratch.h"
#include "sizes.h"

NEST_FAST_BEGIN_ISA

// Blocks [begin, end), some at a time.
template <class Op>
void attention_layer(const AttentionLayer& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t tokens = p.heads.tokens, features = p.qkv.in, packed_features = p.qkv.out;
  const int64_t most_blocks = std::min(p.blocks_at_once, end - begin), most_rows = most_blocks * tokens;
  const int64_t a_floats = Tiles(most_rows).count * k_steps_of<Op>(features) * kMR;
  const auto [row, a] = scratch(round_up(features, kNR), a_floats);
  // In training every block's qkv and attention are wanted; otherwise the memory of some blocks serves all.
  const bool training = p.qkv_out != nullptr;
  const std::unique_ptr<T[]> memory(new T[training ? 0 : most_rows * (packed_features + features)]);
  T* const qkv = training ? static_cast<T*>(p.qkv_out) : memory.get();
  T* const attended = training ? static_cast<T*>(p.attended) : memory.get() + most_rows * packed_features;
  BlockAttention attention{p.heads.inputs(qkv, sizeof(T), p.scale),
                           p.heads.whole(static_cast<void*>(attended), sizeof(T)), p.lse, p.added};
  const int64_t row_blocks = p.heads.heads * row_blocks_per_head(tokens);

  for (int64_t block = begin; block < end; block += most_blocks) {
    const int64_t blocks = std::min(most_blocks, end - block), first_row = block * tokens;
    const int64_t kept = training ? block : 0, token = kept * tokens;
    const Tiles tiles(blocks * tokens);
    const int64_t* const index = p.index ? p.index + first_row : nullptr;
    const T* const x = static_cast<const T*>(p.x) + (index ? 0 : first_row * p.x_stride);
    pack_indexed<Op>(tiles, x, p.x_stride, index, features, p.norm, row, a);
    multiply_tiles<Op>(tiles, a, p.qkv, [&](int64_t tile, int64_t column, const float* c) {
      store_rows<T>(c, tiles.size(tile), column, p.qkv, {}, qkv + (token + tiles.first(tile)) * packed_features,
                    packed_features);
    });
    attention.added.first_block = block - kept;
    attend<Op>(attention, kept * row_blocks, (kept + blocks) * row_blocks);
    pack_tiles<Op>(tiles, attended + token * features, features, features, {}, row, a);
    multiply_tiles<Op>(tiles, a, p.proj, [&](int64_t tile, int64_t column, const float* c) {
      store_indexed<T>(c, tiles.size(tile), column, p.proj, {p.x, p.x_stride, p.branch_scale}, p.out, p.index,
                       first_row + tiles.first(tile));
    });
  }
}

template <class Op>
constexpr AttentionLayerKernels kAttentionLayer = {kLinear<Op>, linear<Op>, linear_backward<Op>, attention_layer<Op>,
                                                   kBlockAttention<Op>};

NEST_FAST_END_ISA

#endif  // per-target include guard
