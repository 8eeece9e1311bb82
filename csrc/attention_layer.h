// The attention half of a transformer layer: what attention_layer-inl.h computes on.

#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "block_attention.h"
#include "linear.h"

namespace nest_fast {

// How attention inside blocks is cut out of packed rows: q of every head, then k, then v of `heads` or of one.
struct Heads {
  int64_t tokens, heads, kv_heads, dim;  // of a block; of a head

  Heads(int64_t rows, int64_t features, int64_t tokens, int64_t heads, int64_t kv_heads)
      : tokens(tokens), heads(heads), kv_heads(kv_heads) {
    STD_TORCH_CHECK(tokens > 0 && rows % tokens == 0, "tokens: expected a divisor of ", rows, " rows, got ", tokens);
    STD_TORCH_CHECK(heads > 0 && features % heads == 0, "heads: expected a divisor of ", features, " features, got ",
                    heads);
    STD_TORCH_CHECK(kv_heads == heads || kv_heads == 1, "kv_heads: expected ", heads, " or 1, got ", kv_heads);
    dim = features / heads;
  }

  int64_t packed_features() const { return (heads + 2 * kv_heads) * dim; }

  // Rows that have the features of all heads and nothing else.
  template <class Void>
  Operand<Void> whole(Void* rows, int64_t element_size) const {
    return at(rows, heads * dim, 0, heads, element_size);
  }

  // What is packed in rows.
  template <class Void>
  Operand<Void> q(Void* rows, int64_t element_size) const {
    return at(rows, packed_features(), 0, heads, element_size);
  }
  template <class Void>
  Operand<Void> k(Void* rows, int64_t element_size) const {
    return at(rows, packed_features(), heads, kv_heads, element_size);
  }
  template <class Void>
  Operand<Void> v(Void* rows, int64_t element_size) const {
    return at(rows, packed_features(), heads + kv_heads, kv_heads, element_size);
  }

  // Attention inside the blocks of a packed qkv.
  AttentionInputs inputs(const void* qkv, int64_t element_size, float scale) const {
    constexpr int64_t all = std::numeric_limits<int64_t>::max();  // blocks of one image
    return {q(qkv, element_size), k(qkv, element_size), v(qkv, element_size), all, tokens, heads, dim, scale};
  }

 private:
  // `count` heads from number `head` on in blocks of dense rows, one block behind the other.
  template <class Void>
  Operand<Void> at(Void* rows, int64_t features, int64_t head, int64_t count, int64_t element_size) const {
    using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
    Void* first = static_cast<Byte*>(rows) + head * dim * element_size;
    return {first, 0, tokens * features, features, count == 1 ? 0 : dim};
  }
};

// Packed rows of qkv whose q and k have length 1, beside those from which they come, and the gradients of either. The
// heads' scales are q's, and dscales, null where it is not wanted, has their gradient (slices of so many rows, heads).
struct UnitVectors {
  Heads heads;
  int64_t rows, slice_rows;
  const void* qkv;
  void *unit, *dqkv;
  const float* scales;
  float* dscales;
};

// Without a norm it is the branch alone: nothing is added to it.
struct AttentionLayer {
  Linear qkv, proj;
  Norm norm;
  Residual<void> residual;
  Heads heads;
  AddedScores added;
  int64_t x_stride, blocks_at_once;
  float scale;
  const void* x;
  void* out;
  const int64_t* index;      // the row of x and out that each row of the blocks is, negative for none; or null
  void *qkv_out, *attended;  // what the gradient needs, or null
  float* lse;
  bool float_x;  // x, out and the residual, whatever the weights are
};

struct AttentionLayerKernels {
  LinearKernels packing;
  void (*linear)(const LinearLayer&, int64_t begin, int64_t end);                            // tiles of rows
  void (*linear_backward)(const LinearBackward&, const Chunk&, int64_t begin, int64_t end);  // the same
  void (*attention_layer)(const AttentionLayer&, int64_t begin, int64_t end);                // blocks
  void (*unit_vectors)(const UnitVectors&, int64_t begin, int64_t end);                      // rows
  void (*unit_vectors_backward)(const UnitVectors&, int64_t begin, int64_t end);             // slices of rows
  BlockAttentionKernels attention;
};

}  // namespace nest_fast
