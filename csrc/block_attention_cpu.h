// What block_attention_cpu_kernel.h computes on.

#pragma once

#include "cpu_dispatch.h"

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

// The forward's lse as its backward takes it.
inline float* lse_of(const Tensor& lse, int64_t statistics) {
  check_dtype("lse", lse, ScalarType::Float);
  STD_TORCH_CHECK(lse.is_contiguous() && lse.numel() == statistics, "lse: wanted ", statistics,
                  " contiguous elements (B, T, heads, N), got ", lse.numel(), lse.is_contiguous() ? "" : " with gaps");
  return const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
}

}  // namespace nest_fast
