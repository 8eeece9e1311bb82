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
  int64_t blocks, tokens, heads, dim;  // of q and k
  float scale;

  float scale_of(const float* scales, int64_t head) const { return scales ? scales[head] : scale; }
};

// What is added to the scores: tables (tokens, columns), zeros in the columns behind the tokens. bias has one for each
// head; block b has number mask_of[b % groups] of masks, none where that is negative; scales is a factor for each head
// in the place of the scale. Each is null where there is none. A row of lse then has two numbers, its largest score and
// the logarithm of its sum: the score may be so large that the sum of the two is the score.
struct AddedScores {
  const float *bias = nullptr, *masks = nullptr, *scales = nullptr;
  const int32_t* mask_of = nullptr;
  int64_t groups = 1, tokens = 0, columns = 0, first_block = 0;  // the number of the first block that is counted

  bool any() const { return bias || mask_of || scales; }

  // The tables of a head of a block, and how many these are.
  int tables_of(int64_t block, int64_t head, const float* (&tables)[2]) const {
    int count = 0;
    if (bias) tables[count++] = bias + head * tokens * columns;
    const int32_t number = mask_of ? mask_of[(first_block + block) % groups] : -1;
    if (number >= 0) tables[count++] = masks + number * tokens * columns;
    return count;
  }
};

// Decomposed relative positions: key (y, x) of `rows` by `columns` keys gets row_scores[y] + column_scores[x] of a
// query. Both are as q, of these last dimensions. None where `rows` is 0.
struct RelativePositions {
  Input row_scores, column_scores;
  int64_t rows = 0, columns = 0;
};

// Where the tokens of each block are in q, k, v, out and the positions' scores, which are images: rows (blocks,
// tokens), negative for padding, whose k and v are those of a row each, zeros where they are null.
struct Gathered {
  const int64_t* rows = nullptr;
  Input pad_k{}, pad_v{};
};

struct BlockAttention : AttentionInputs {
  Output out;
  int64_t v_dim;  // and of out
  float* lse;  // (batch, blocks, heads, tokens), contiguous; null where it is not wanted
  AddedScores added{};
  RelativePositions positions{};
  Gathered gathered{};
  bool in_cache = false;  // q, k, v and out

  bool adds() const { return added.any() || positions.rows > 0; }
};

// Its backward: out and lse as the forward left them. dk or dv with one head is the sum over q's. A task is
// `task_heads` heads, those that share a gradient, of `task_blocks` of all blocks; tables are (keys, columns of
// queries), and dbias, null where it is not wanted, has such a table for each head of each `task_blocks`. With scales
// dq is without its head's.
struct BlockAttentionBackward : AttentionInputs {
  Input out, dout;
  Output dq, dk, dv;
  const float* lse;
  int64_t all_blocks, task_heads, task_blocks = 1;
  AddedScores added{};
  float* dbias = nullptr;

  int64_t tasks() const { return (all_blocks + task_blocks - 1) / task_blocks * (heads / task_heads); }
};

struct BlockAttentionKernels {
  int64_t (*row_blocks_per_head)(int64_t tokens);
  void (*attend)(const BlockAttention&, int64_t begin, int64_t end);                   // row blocks of queries
  void (*attend_backward)(const BlockAttentionBackward&, int64_t begin, int64_t end);  // tasks
};

}  // namespace nest_fast
