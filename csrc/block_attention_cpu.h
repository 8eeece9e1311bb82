// What block_attention_cpu_kernel.h computes on.

#pragma once

#include <cstdint>

namespace nest_fast {

// A (batch, blocks, tokens, heads, dim) tensor whose last dimension is dense; strides in elements.
struct Operand {
  void* data;
  int64_t batch_stride, block_stride, token_stride, head_stride;

  template <class T>
  T* at(int64_t batch, int64_t block, int64_t head) const {
    return static_cast<T*>(data) + batch * batch_stride + block * block_stride + head * head_stride;
  }
};

struct BlockAttention {
  Operand q, k, v, out;
  float* lse;  // (batch, blocks, heads, tokens), contiguous; null where it is not wanted
  int64_t blocks, tokens, heads, dim;
  float scale;
};

// Its backward: q, k, v, out and lse as the forward left them. dk or dv with one head is the sum over q's.
struct BlockAttentionBackward : BlockAttention {
  Operand dout, dq, dk, dv;
};

}  // namespace nest_fast
