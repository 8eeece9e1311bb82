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
#include <cstring>
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

// One block's q, k, v, out and scores by position of one head; index counts through all blocks and heads. Token i is
// row row(i) of each.
template <class T>
struct Head {
  const T *q, *k, *v, *row_scores = nullptr, *column_scores = nullptr, *pad_k = nullptr, *pad_v = nullptr;
  T* out;
  const int64_t* rows = nullptr;

  Head(const BlockAttention& p, int64_t index) {
    const int64_t head = index % p.heads, batch = index / p.heads / p.blocks;
    int64_t block = index / p.heads % p.blocks;
    if (p.gathered.rows) {
      rows = p.gathered.rows + block * p.tokens;
      block = 0;
      if (p.gathered.pad_k.data) pad_k = p.gathered.pad_k.at<const T>(0, 0, head);
      if (p.gathered.pad_v.data) pad_v = p.gathered.pad_v.at<const T>(0, 0, head);
    }
    q = p.q.at<const T>(batch, block, head);
    k = p.k.at<const T>(batch, block, head);
    v = p.v.at<const T>(batch, block, head);
    out = p.out.at<T>(batch, block, head);
    if (p.positions.rows == 0) return;
    row_scores = p.positions.row_scores.at<const T>(batch, block, head);
    column_scores = p.positions.column_scores.at<const T>(batch, block, head);
  }

  // Negative for padding.
  int64_t row(int64_t token) const { return rows ? rows[token] : token; }
};

// The rows of x (rows, dim) that `count` tokens are, one after the other in `to`, if they lie apart; sets `stride`.
template <class T>
const T* in_order(const Head<T>& head, const T* x, const T* pad, int64_t count, int64_t dim, int64_t& stride, T* to) {
  if (!head.rows) return x;
  for (int64_t i = 0; i < count; ++i) {
    const T* const from = head.rows[i] < 0 ? pad : x + head.rows[i] * stride;
    from ? std::memcpy(to + i * dim, from, dim * sizeof(T)) : std::memset(to + i * dim, 0, dim * sizeof(T));
  }
  stride = dim;
  return to;
}

// Queries from token `first` on as A, zeros for padding.
template <class Op>
void pack_queries(const BlockAttention& p, const Head<typename Op::Element>& head, int64_t first, int64_t rows,
                  uint32_t flipped, float* queries) {
  const int64_t stride = p.q.token_stride;
  if (!head.rows) return pack_a<Op>(head.q + first * stride, stride, rows, p.dim, flipped, queries);
  for (int64_t r = 0; r < rows; ++r) {
    float* const packed_row = queries + r * kLanes;
    if (const int64_t row = head.rows[first + r]; row >= 0)
      pack_a<Op>(head.q + row * stride, stride, 1, p.dim, flipped, packed_row);
    else
      for (int64_t i = 0; i < ceil_div(p.dim, kLanes * Op::kVnni); ++i) store(packed_row + i * kPanelA, zero());
  }
}

// What is added to the scores of one head's queries.
struct Tables {
  const float* data[2] = {};
  int count = 0;
  int64_t stride = 0;
};

// That of `rows` queries from row `first` on by their positions; `table` has room for these rows and a vector more,
// by_row and by_column for the scores of a query.
template <class T>
Tables table_of_positions(const BlockAttention& p, const Head<T>& head, int64_t first, int64_t rows, float* table,
                          float* by_row, float* by_column) {
  const auto& [row_scores, column_scores, key_rows, key_columns] = p.positions;
  const int64_t stride = round_up(p.tokens, kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = head.row(first + r);
    if (row < 0) {
      std::fill_n(table + r * stride, stride, 0.f);
      continue;
    }
    const T* of_rows = head.row_scores + row * row_scores.token_stride;
    const T* of_columns = head.column_scores + row * column_scores.token_stride;
    for (int64_t i = 0; i < key_rows; i += kLanes) store(by_row + i, load_part(of_rows + i, key_rows - i));
    for (int64_t i = 0; i < key_columns; i += kLanes) store(by_column + i, load_part(of_columns + i, key_columns - i));
    float* to = table + r * stride;
    store(to + stride - kLanes, zero());
    // What is written beyond a row of keys is written again with the next one, or is no key's.
    for (int64_t y = 0; y < key_rows; ++y, to += key_columns)
      for (int64_t i = 0; i < key_columns; i += kLanes) store(to + i, add(broadcast(by_row[y]), load(by_column + i)));
  }
  return {{table}, 1, stride};
}

inline Tables tables_of(const BlockAttention& p, int64_t index, int64_t first) {
  Tables tables;
  tables.count = p.added.tables_of(index / p.heads, index % p.heads, tables.data);
  tables.stride = p.added.columns;
  for (int i = 0; i < tables.count; ++i) tables.data[i] += first * tables.stride;
  return tables;
}

// The largest score of each of `rows` rows of a head once everything is added; 0 where all keys are masked.
template <int UNROLL>
void add_to_scores(const BlockAttention& p, int64_t index, int64_t rows, float* scores, const Tables& added,
                   const float* tail, float* row_max) {
  const auto& [tables, count, stride] = added;
  const int64_t vecs = ceil_div(p.tokens, kLanes);
  const float scale = p.scale_of(p.added.scales, index % p.heads);
  with_tables(count, [&](auto constant) {
    constexpr int TABLES = decltype(constant)::value;
    int64_t r = 0;
    const auto some = [&]<int ROWS>(std::integral_constant<int, ROWS>) {
      const float* const rows_of[2] = {tables[0] + r * stride, tables[1] + r * stride};
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
  const int64_t pieces = ceil_div(key_columns, piece);
  const Shares next_keys(piece_stride, dim_steps * ceil_div(piece, kNR), 1);

  const bool added = p.adds(), has_positions = p.positions.rows > 0;
  const auto [keys, values, queries, scores, sums, ordered, table, by_row, by_column] =
      scratch(pieces * piece_stride, key_steps * v_columns, ceil_div(p.dim, kLanes) * kPanelA,
              key_vecs * kPanelA, v_vecs * kPanelA, p.gathered.rows ? p.tokens * std::max(p.dim, p.v_dim) : 0,
              has_positions ? row_block_rows * key_columns + kLanes : 0,
              round_up(p.positions.rows, kLanes), round_up(p.positions.columns, kLanes));

  float tail[kLanes];
  for (int i = 0; i < kLanes; ++i)
    tail[i] = key_columns - kLanes + i < p.tokens ? 0 : -std::numeric_limits<float>::infinity();
  // The largest score gives the largest exponent only where the factor is positive, so its sign goes to q; and a
  // factor of 0 would make NaN of the tail.
  // With something added the scores are scaled before, so that neither holds.
  const float scale = added ? 1 : std::fabs(p.scale);  // of scores whose largest is taken
  const float factor = std::max(scale * 1.44269504f, std::numeric_limits<float>::min());
  const uint32_t flipped = p.scale < 0 && !added ? Op::kSigns : 0;

  // Rows of thousands of tokens that lie pages apart are not brought: looking up their pages takes longer.
  const bool brings = !p.in_cache && !p.gathered.rows && pieces == 1;
  const T *packed_k = nullptr, *packed_v = nullptr;
  const int64_t* packed_rows = nullptr;
  for (int64_t row_block = begin; row_block < end; ++row_block) {
    const int64_t index = row_block / row_blocks, first = row_block % row_blocks * row_block_rows;
    const int64_t rows = std::min(row_block_rows, p.tokens - first);
    const Head<T> head(p, index), next(p, std::min(index + 1, (end - 1) / row_blocks));
    if (head.k != packed_k || head.rows != packed_rows) {
      int64_t stride = p.k.token_stride;
      const T* k = in_order(head, head.k, head.pad_k, p.tokens, p.dim, stride, reinterpret_cast<T*>(ordered));
      for (int64_t key = 0, i = 0; key < key_columns; key += piece, ++i)
        pack_b_transposed<Op>(k + key * stride, stride, p.tokens - key, p.dim, std::min(piece, key_columns - key),
                              keys + i * piece_stride);
    }
    if (head.v != packed_v || head.rows != packed_rows) {
      int64_t stride = p.v.token_stride;
      const T* v = in_order(head, head.v, head.pad_v, p.tokens, p.v_dim, stride, reinterpret_cast<T*>(ordered));
      pack_b<Op>(v, stride, p.tokens, p.v_dim, v_columns, values);
    }
    packed_k = head.k, packed_v = head.v, packed_rows = head.rows;
    pack_queries<Op>(p, head, first, rows, flipped, queries);
    const auto multiply_keys = [&](int64_t i, const auto& ahead) {
      const int64_t key = i * piece;
      multiply<Op>(rows, queries, keys + i * piece_stride, std::min(piece, key_columns - key), dim_steps, kAttentionKC,
                   {scores + key / kLanes * kPanelA, kLanes, kPanelA}, ahead);
    };
    if (brings) {
      RowsAhead ahead(times_of(piece, dim_steps));
      ahead.add(head.out + first * p.out.token_stride, p.out.token_stride, rows, p.v_dim);
      ahead.add(next.q + first * p.q.token_stride, p.q.token_stride, rows, p.dim);
      multiply_keys(0, ahead);
    } else {
      for (int64_t i = 0; i < pieces; ++i)
        multiply_keys(i, i + 1 < pieces ? next_keys.of(keys + (i + 1) * piece_stride, 0) : Ahead{});
    }

    float row_max[kMR], row_sum[kMR];
    constexpr int kUnroll = 4 / Op::kVnni;
    int64_t r = 0;
    if (added) {
      const Tables tables = has_positions
                                ? table_of_positions(p, head, first, rows, table, by_row, by_column)
                                : tables_of(p, index, first);
      add_to_scores<kUnroll>(p, index, rows, scores, tables, tail, row_max);
    } else {
      for (; r + kUnroll <= rows; r += kUnroll) row_maxima<kUnroll>(scores + r * kLanes, key_vecs, tail, row_max + r);
      for (; r < rows; ++r) row_maxima<1>(scores + r * kLanes, key_vecs, tail, row_max + r);
    }
    for (r = 0; r + kUnroll <= rows; r += kUnroll)
      exponentials<Op, kUnroll>(scores + r * kLanes, key_vecs, factor, row_max + r, row_sum + r);
    for (; r < rows; ++r) exponentials<Op, 1>(scores + r * kLanes, key_vecs, factor, row_max + r, row_sum + r);

    const auto multiply_values = [&](const auto& ahead) {
      multiply<Op>(rows, scores, values, v_columns, key_steps, kAttentionKC, {sums, kLanes, kPanelA}, ahead);
    };
    if (brings) {
      RowsAhead ahead(times_of(v_columns, key_steps));
      ahead.add(next.k + first * p.k.token_stride, p.k.token_stride, rows, p.dim);
      ahead.add(next.v + first * p.v.token_stride, p.v.token_stride, rows, p.v_dim);
      if (has_positions) {
        const auto& [row_scores, column_scores, key_rows, row_keys] = p.positions;
        ahead.add(next.row_scores + first * row_scores.token_stride, row_scores.token_stride, rows, key_rows);
        ahead.add(next.column_scores + first * column_scores.token_stride, column_scores.token_stride, rows, row_keys);
      }
      multiply_values(ahead);
    } else {
      multiply_values(Ahead{});
    }
    for (r = 0; r < rows; ++r) {
      const int64_t row = index * p.tokens + first + r;
      const bool empty = added && row_sum[r] == 0;  // every key is masked
      if (p.lse && !added) p.lse[row] = row_max[r] * scale + std::log(row_sum[r]);
      if (p.lse && added) {
        p.lse[2 * row] = empty ? std::numeric_limits<float>::infinity() : row_max[r];
        p.lse[2 * row + 1] = empty ? 0 : std::log(row_sum[r]);
      }
      const int64_t place = head.row(first + r);
      if (place < 0) continue;
      T* const out = head.out + place * p.out.token_stride;
      const Vec weight = broadcast(empty ? 0 : 1 / row_sum[r]);
      for (int64_t i = 0; i < v_vecs; ++i) {
        const Vec sum = mul(load(sums + i * kPanelA + r * kLanes), weight);
        store_part(out + i * kLanes, p.v_dim - i * kLanes, sum);
      }
    }
  }
}

NEST_FAST_END_ISA

#endif  // per-target include guard
