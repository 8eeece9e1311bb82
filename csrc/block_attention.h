// Attention inside image blocks: what block_attention-inl.h computes on.

#pragma once

#include <cstdint>

namespace nest_fast {

// A (batch, blocks, tokens, heads, dim) tensor whose last dimension is dense; strides in elements. Void is const where
// it is read.
template <class Void>
struct Operand {
  Void* data;
  int64_t batch_stride, block_stride, token_stride, head_stride;

  template <class T>
  T* at(int64_t batch, int64_t block, int64_t head) const {
    return static_cast<T*>(data) + batch * batch_stride + block * block_stride + head * head_stride;
  }
};
using Input = Operand<const void>;
using Output = Operand<void>;

struct AttentionInputs {
  Input q, k, v;
  int64_t blocks, tokens, heads, dim;
  float scale;
};

struct BlockAttention : AttentionInputs {
  Output out;
  float* lse;  // (batch, blocks, heads, tokens), contiguous; null where it is not wanted
};

// Its backward: out and lse as the forward left them. dk or dv with one head is the sum over q's.
struct BlockAttentionBackward : AttentionInputs {
  Input out, dout;
  Output dq, dk, dv;
  const float* lse;
};

struct BlockAttentionKernels {
  int64_t (*row_blocks_per_head)(int64_t tokens);
  void (*attend)(const BlockAttention&, int64_t begin, int64_t end);                   // row blocks of queries
  void (*attend_backward)(const BlockAttentionBackward&, int64_t begin, int64_t end);  // heads
};

}  // namespace nest_fast
