// softmax(scale * q @ k^T + bias + mask) @ v inside each image block and head, for short sequences: all scores of a row
// block stay in cache, so there is no online softmax, and the products are the micro-kernel's on packed operands.
//
// The products, the scores among them, are laid out as A is: (columns / kLanes, MR, kLanes).

#if defined(NEST_FAST_BLOCK_ATTENTION_INL_H_) == defined(NEST_FAST_TOGGLE)
#ifdef NEST_FAST_BLOCK_ATTENTION_INL_H_
#undef NEST_FAST_BLOCK_ATTENTION_INL_H_
#else
#define NEST_FAST_BLOCK_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "block_attention.h"
#include "isa/vector-inl.h"
#include "math-inl.h"
#include "matrix-inl.h"
#include "scratch.h"
#include "sizes.h"

NEST_FAST_BEGIN_ISA

constexpr int64_t kAttentionKC = 64;   // K steps summed in a register before a sum is stored
constexpr int64_t kKeyColumns = 256;  // keys that are packed together

// score * scale, and what TABLES tables have at `offset`.
template <int TABLES>
inline Vec add_tables(Vec score, Vec scale, const float* const (&tables)[2], int64_t offset) {
  if constexpr (TABLES == 0) return mul(score, scale);
  Vec x = mul_add(score, scale, load(tables[0] + offset));
  if constexpr (TABLES == 2) x = add(x, load(tables[1] + offset));
  return x;
}

// callback(TABLES) with the number of tables as a constant.
template <class Callback>
inline void with_tables(int count, const Callback& callback) {
  if (count == 0) callback(std::integral_constant<int, 0>());
  if (count == 1) callback(std::integral_constant<int, 1>());
  if (count == 2) callback(std::integral_constant<int, 2>());
}

// The largest score of each row of s. tail is -inf in the last vector's lanes that are no scores, elsewhere 0; it is
// added to them.
template <int ROWS>
inline void row_maxima(float* s, int64_t vecs, const float* tail, float* row_max) {
  Vec maximum[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    float* last = s + (vecs - 1) * kPanelA + r * kLanes;
    maximum[r] = add(load(last), load(tail));
    store(last, maximum[r]);
  }
  for (int64_t i = 0; i < vecs - 1; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) maximum[r] = max(maximum[r], load(s + i * kPanelA + r * kLanes));
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) row_max[r] = largest(maximum[r]);
}

// The same of scale * s with TABLES tables added, whose rows are `stride` floats apart; s becomes that.
template <int ROWS, int TABLES>
inline void added_maxima(float* s, int64_t vecs, const float* tail, float scale, const float* const (&tables)[2],
                         int64_t stride, float* row_max) {
  const Vec scales = broadcast(scale);
  Vec maximum[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) maximum[r] = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < vecs; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      float* score = s + i * kPanelA + r * kLanes;
      Vec x = add_tables<TABLES>(load(score), scales, tables, r * stride + i * kLanes);
      if (i == vecs - 1) x = add(x, load(tail));
      store(score, x);
      maximum[r] = max(maximum[r], x);
    }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) row_max[r] = largest(maximum[r]);
}

// Rows of scores s become 2^(factor * (s - row_max)), packed as A; row_sum are their sums.
template <class Op, int ROWS>
inline void exponentials(float* s, int64_t vecs, float factor, const float* row_max, float* row_sum) {
  constexpr int vnni = Op::kVnni;
  const Vec factors = broadcast(factor);
  Vec maximum[ROWS], total[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    maximum[r] = broadcast(row_max[r]);
    total[r] = zero();
  }
  float* packed_row = s;
  for (int64_t i = 0; i < vecs; i += vnni, packed_row += kPanelA) {
    Vec p[ROWS * vnni];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < vnni; ++j)
        // A VNNI pair's missing neighbour is an exponential of -inf.
        p[r * vnni + j] = i + j < vecs ? mul(sub(load(s + (i + j) * kPanelA + r * kLanes), maximum[r]), factors)
                                       : broadcast(-std::numeric_limits<float>::infinity());
    exp2_negative<Op>(p);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      Vec parts[vnni];
#pragma GCC unroll 2
      for (int j = 0; j < vnni; ++j) {
        parts[j] = p[r * vnni + j];
        total[r] = add(total[r], parts[j]);
      }
      store(packed_row + r * kLanes, Op::from_floats(parts));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) row_sum[r] = sum(total[r]);
}

inline int64_t row_blocks_per_head(int64_t tokens) { return ceil_div(tokens, kMR); }

// One block's q, k, v and out of one head; index counts through all blocks and heads.
template <class T>
struct Head {
  const T *q, *k, *v;
  T* out;

  Head(const BlockAttention& p, int64_t index) {
    const int64_t head = index % p.heads, block = index / p.heads % p.blocks, batch = index / p.heads / p.blocks;
    q = p.q.at<const T>(batch, block, head);
    k = p.k.at<const T>(batch, block, head);
    v = p.v.at<const T>(batch, block, head);
    out = p.out.at<T>(batch, block, head);
  }
};

// The largest score of each of `rows` rows of a head, from row `first` on, once everything is added; 0 where all keys
// are masked.
template <int UNROLL>
void add_to_scores(const BlockAttention& p, int64_t index, int64_t first, int64_t rows, float* scores,
                   const float* tail, float* row_max) {
  const float* tables[2] = {};
  const int count = p.added.tables_of(index / p.heads, index % p.heads, tables);
  const int64_t stride = p.added.columns, vecs = ceil_div(p.tokens, kLanes);
  const float scale = p.scale_of(p.added.scales, index % p.heads);
  with_tables(count, [&](auto constant) {
    constexpr int TABLES = decltype(constant)::value;
    int64_t r = 0;
    const auto some = [&]<int ROWS>(std::integral_constant<int, ROWS>) {
      const float* const rows_of[2] = {tables[0] + (first + r) * stride, tables[1] + (first + r) * stride};
      added_maxima<ROWS, TABLES>(scores + r * kLanes, vecs, tail, scale, rows_of, stride, row_max + r);
    };
    for (; r + UNROLL <= rows; r += UNROLL) some(std::integral_constant<int, UNROLL>());
    for (; r < rows; ++r) some(std::integral_constant<int, 1>());
  });
  for (int64_t r = 0; r < rows; ++r)
    if (row_max[r] == -std::numeric_limits<float>::infinity()) row_max[r] = 0;
}

// Row blocks [begin, end) of queries, counted through all blocks and heads.
template <class Op>
void attend(const BlockAttention& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t row_blocks = row_blocks_per_head(p.tokens), row_block_rows = ceil_div(p.tokens, row_blocks);
  const int64_t key_vecs = ceil_div(p.tokens, kLanes), key_columns = key_vecs * kLanes;
  const int64_t v_vecs = ceil_div(p.v_dim, kLanes), v_columns = v_vecs * kLanes;
  const int64_t dim_steps = ceil_div(p.dim, Op::kVnni), key_steps = ceil_div(p.tokens, Op::kVnni);
  // Keys in pieces, each of them packed for itself: of thousands in one a step's would lie pages from the next one's.
  const int64_t piece = std::min(key_columns, kKeyColumns), piece_stride = round_up(dim_steps, kLanes) * piece;

  const Shares next_keys(piece_stride, dim_steps * ceil_div(piece, kNR), 1);

  const auto [keys, values, queries, scores, sums] =
      scratch(ceil_div(key_columns, piece) * piece_stride, key_steps * v_columns, ceil_div(p.dim, kLanes) * kPanelA,
              key_vecs * kPanelA, v_vecs * kPanelA);

  float tail[kLanes];
  for (int i = 0; i < kLanes; ++i)
    tail[i] = key_columns - kLanes + i < p.tokens ? 0 : -std::numeric_limits<float>::infinity();
  // The largest score gives the largest exponent only where the factor is positive, so its sign goes to q; and a
  // factor of 0 would make NaN of the tail.
  // With something added the scores are scaled before, so that neither holds.
  const bool added = p.added.any();
  const float scale = added ? 1 : std::fabs(p.scale);  // of scores whose largest is taken
  const float factor = std::max(scale * 1.44269504f, std::numeric_limits<float>::min());
  const uint32_t flipped = p.scale < 0 && !added ? Op::kSigns : 0;

  const T *packed_k = nullptr, *packed_v = nullptr;
  for (int64_t row_block = begin; row_block < end; ++row_block) {
    const int64_t index = row_block / row_blocks, first = row_block % row_blocks * row_block_rows;
    const int64_t rows = std::min(row_block_rows, p.tokens - first);
    const Head<T> head(p, index), next(p, std::min(index + 1, (end - 1) / row_blocks));
    if (head.k != packed_k)
      for (int64_t key = 0, i = 0; key < key_columns; key += piece, ++i)
        pack_b_transposed<Op>(head.k + key * p.k.token_stride, p.k.token_stride, p.tokens - key, p.dim,
                              std::min(piece, key_columns - key), keys + i * piece_stride);
    if (head.v != packed_v) pack_b<Op>(head.v, p.v.token_stride, p.tokens, p.v_dim, v_columns, values);
    packed_k = head.k;
    packed_v = head.v;
    T* out = head.out + first * p.out.token_stride;
    prefetch<1>(out, p.out.token_stride, rows, p.v_dim);
    prefetch<0>(next.q + first * p.q.token_stride, p.q.token_stride, rows, p.dim);
    prefetch<0>(next.k + first * p.k.token_stride, p.k.token_stride, rows, p.dim);
    prefetch<0>(next.v + first * p.v.token_stride, p.v.token_stride, rows, p.v_dim);

    pack_a<Op>(head.q + first * p.q.token_stride, p.q.token_stride, rows, p.dim, flipped, queries);
    for (int64_t key = 0, i = 0; key < key_columns; key += piece, ++i)
      multiply<Op>(rows, queries, keys + i * piece_stride, std::min(piece, key_columns - key), dim_steps, kAttentionKC,
                   {scores + key / kLanes * kPanelA, kLanes, kPanelA},
                   key + piece < key_columns ? next_keys.of(keys + (i + 1) * piece_stride, 0) : Ahead{});

    float row_max[kMR], row_sum[kMR];
    constexpr int kUnroll = 4 / Op::kVnni;
    int64_t r = 0;
    if (added) {
      add_to_scores<kUnroll>(p, index, first, rows, scores, tail, row_max);
    } else {
      for (; r + kUnroll <= rows; r += kUnroll) row_maxima<kUnroll>(scores + r * kLanes, key_vecs, tail, row_max + r);
      for (; r < rows; ++r) row_maxima<1>(scores + r * kLanes, key_vecs, tail, row_max + r);
    }
    for (r = 0; r + kUnroll <= rows; r += kUnroll)
      exponentials<Op, kUnroll>(scores + r * kLanes, key_vecs, factor, row_max + r, row_sum + r);
    for (; r < rows; ++r) exponentials<Op, 1>(scores + r * kLanes, key_vecs, factor, row_max + r, row_sum + r);

    multiply<Op>(rows, scores, values, v_columns, key_steps, kAttentionKC, {sums, kLanes, kPanelA});
    for (r = 0; r < rows; ++r) {
      const int64_t row = index * p.tokens + first + r;
      const bool empty = added && row_sum[r] == 0;  // every key is masked
      if (p.lse && !added) p.lse[row] = row_max[r] * scale + std::log(row_sum[r]);
      if (p.lse && added) {
        p.lse[2 * row] = empty ? std::numeric_limits<float>::infinity() : row_max[r];
        p.lse[2 * row + 1] = empty ? 0 : std::log(row_sum[r]);
      }
      const Vec weight = broadcast(empty ? 0 : 1 / row_sum[r]);
      for (int64_t i = 0; i < v_vecs; ++i) {
        const Vec sum = mul(load(sums + i * kPanelA + r * kLanes), weight);
        store_part(out + r * p.out.token_stride + i * kLanes, p.v_dim - i * kLanes, sum);
      }
    }
  }
}

NEST_FAST_END_ISA

#endif  // per-target include guard
