// softmax(scale * q @ k^T) @ v inside each image block and head, and its backward, for short sequences: all scores of a
// row block stay in cache, so there is no online softmax, and the products are the micro-kernel's on packed operands.
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

constexpr int64_t kAttentionKC = 2 * kLanes;
constexpr int64_t kAttentionGradientKC = 16 * kLanes;  // the bound of gradients is wider than the output's

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
  with_tables(count, [&](auto constant) {
    constexpr int TABLES = decltype(constant)::value;
    int64_t r = 0;
    const auto some = [&]<int ROWS>(std::integral_constant<int, ROWS>) {
      const float* const rows_of[2] = {tables[0] + (first + r) * stride, tables[1] + (first + r) * stride};
      added_maxima<ROWS, TABLES>(scores + r * kLanes, vecs, tail, p.scale, rows_of, stride, row_max + r);
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
  const int64_t dim_vecs = ceil_div(p.dim, kLanes), dim_columns = dim_vecs * kLanes;
  const int64_t dim_steps = ceil_div(p.dim, Op::kVnni), key_steps = ceil_div(p.tokens, Op::kVnni);

  const auto [keys, values, queries, scores, sums] =
      scratch(round_up(dim_steps, kLanes) * key_columns, key_steps * dim_columns, dim_vecs * kPanelA,
              key_vecs * kPanelA, dim_vecs * kPanelA);

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
    if (head.k != packed_k) pack_b_transposed<Op>(head.k, p.k.token_stride, p.tokens, p.dim, key_columns, keys);
    if (head.v != packed_v) pack_b<Op>(head.v, p.v.token_stride, p.tokens, p.dim, dim_columns, values);
    packed_k = head.k;
    packed_v = head.v;
    T* out = head.out + first * p.out.token_stride;
    prefetch<1>(out, p.out.token_stride, rows, p.dim);
    prefetch<0>(next.q + first * p.q.token_stride, p.q.token_stride, rows, p.dim);
    prefetch<0>(next.k + first * p.k.token_stride, p.k.token_stride, rows, p.dim);
    prefetch<0>(next.v + first * p.v.token_stride, p.v.token_stride, rows, p.dim);

    pack_a<Op>(head.q + first * p.q.token_stride, p.q.token_stride, rows, p.dim, flipped, queries);
    multiply<Op>(rows, queries, keys, key_columns, dim_steps, kAttentionKC, {scores, kLanes, kPanelA});

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

    multiply<Op>(rows, scores, values, dim_columns, key_steps, kAttentionKC, {sums, kLanes, kPanelA});
    for (r = 0; r < rows; ++r) {
      const int64_t row = index * p.tokens + first + r;
      const bool empty = added && row_sum[r] == 0;  // every key is masked
      if (p.lse && !added) p.lse[row] = row_max[r] * scale + std::log(row_sum[r]);
      if (p.lse && added) {
        p.lse[2 * row] = empty ? std::numeric_limits<float>::infinity() : row_max[r];
        p.lse[2 * row + 1] = empty ? 0 : std::log(row_sum[r]);
      }
      const Vec weight = broadcast(empty ? 0 : 1 / row_sum[r]);
      for (int64_t i = 0; i < dim_vecs; ++i) {
        const Vec sum = mul(load(sums + i * kPanelA + r * kLanes), weight);
        store_part(out + r * p.out.token_stride + i * kLanes, p.dim - i * kLanes, sum);
      }
    }
  }
}

// --- backward ---

// A row block is of keys here, so that its p and ds, transposed, are the left operands of dv and dk as they come. ds of
// several row blocks is kept besides and then multiplied transposed back, so that dq is seldom loaded and stored.

constexpr int64_t kKeptFloats = 1 << 14;

template <class T>
inline float row_dot(const T* x, const T* y, int64_t dim) {
  Vec total = zero();
  for (int64_t d = 0; d < dim; d += kLanes)
    total = mul_add(load_part(x + d, dim - d), load_part(y + d, dim - d), total);
  return sum(total);
}

// 2^x as in Floats, a degree higher: no sum of such powers divides the error out, 8e-8, as in the forward.
struct PreciseExp2 {
  static constexpr float kExp2[] = {
      0x1.41fbbcp-13f, 0x1.5f3e54p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f, 0x1.ebfbdcp-3f, 0x1.62e43p-1f, 1};
};

// What the keys of a head share, vectors over queries: -lse, or -the largest score and -the logarithm of the sum; and
// the sums of dout * out.
struct QueryRows {
  float *minus_lse, *minus_log_sum, *delta;
};

// What is added to the scores of some keys, and where the sum over blocks of its gradient is, or null.
struct AddedRows {
  const float* tables[2];
  float* dbias;
  int64_t stride;
};

// ROWS keys of scores s and of dp, all of `tokens` queries, become p = exp(scale * s - lse) and ds = p * (dp -
// delta), packed as A, and in `kept` (K steps over keys, columns) ds as A transposed. TABLES is -1 where lse is one
// number.
template <class Op, int ROWS, int TABLES>
inline void score_gradients(float* s, float* dp, int64_t tokens, float scale, const QueryRows& queries, float* kept,
                            int64_t columns, const AddedRows& added) {
  using Exp2 = std::conditional_t<std::is_same_v<typename Op::Element, float>, PreciseExp2, Op>;
  constexpr int vnni = Op::kVnni, row_steps = (ROWS + vnni - 1) / vnni;
  const int64_t vecs = ceil_div(tokens, kLanes);
  const bool odd = tokens % vnni != 0;  // The last VNNI pair then has an element that is no score.
  const Vec scales = broadcast(scale), log2_e = broadcast(1.44269504f);
  float *packed_row = s, *dpacked_row = dp;
  for (int64_t i = 0; i < vecs; i += vnni, packed_row += kPanelA, dpacked_row += kPanelA) {
    Vec p[ROWS * vnni];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < vnni; ++j) {
        p[r * vnni + j] = broadcast(-std::numeric_limits<float>::infinity());
        if (i + j >= vecs) continue;
        // lse is subtracted first: times log2(e), two large numbers that are close would both be rounded.
        const int64_t at = (i + j) * kLanes;
        const Vec score = load(s + (i + j) * kPanelA + r * kLanes), minus_lse = load(queries.minus_lse + at);
        Vec x;
        if constexpr (TABLES < 0)
          x = mul_add(score, scales, minus_lse);
        else
          x = add(add(add_tables<TABLES>(score, scales, added.tables, r * added.stride + at), minus_lse),
                  load(queries.minus_log_sum + at));
        p[r * vnni + j] = mul(log2_e, x);
      }
    exp2_negative<Exp2>(p);
    Vec by_step[row_steps * vnni][vnni] = {};  // vectors of K steps over keys
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      Vec parts[vnni], dparts[vnni];
#pragma GCC unroll 2
      for (int j = 0; j < vnni; ++j) {
        parts[j] = p[r * vnni + j];
        dparts[j] = zero();
        if (i + j < vecs) {
          const int64_t at = (i + j) * kLanes;
          dparts[j] = mul(parts[j], sub(load(dp + (i + j) * kPanelA + r * kLanes), load(queries.delta + at)));
          if constexpr (TABLES >= 0)
            if (added.dbias) {
              float* total = added.dbias + r * added.stride + at;
              store(total, add(load(total), dparts[j]));
            }
        }
        if (odd) {
          parts[j] = keep_part(parts[j], tokens - (i + j) * kLanes);
          dparts[j] = keep_part(dparts[j], tokens - (i + j) * kLanes);
        }
        by_step[r / vnni * vnni + j][r % vnni] = dparts[j];
      }
      store(packed_row + r * kLanes, Op::from_floats(parts));
      store(dpacked_row + r * kLanes, Op::from_floats(dparts));
    }
#pragma GCC unroll 4
    for (int k = 0; k < row_steps; ++k)
#pragma GCC unroll 2
      for (int j = 0; j < vnni; ++j)
        if (i + j < vecs) store(kept + k * columns + (i + j) * kLanes, Op::interleave(by_step[k * vnni + j]));
  }
}

// c (rows, columns) times factor to x (rows, dim).
template <class T>
inline void store_rows(const float* c, int64_t columns, float factor, int64_t rows, T* x, int64_t stride, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r, c += columns, x += stride)
    for (int64_t d = 0; d < dim; d += kLanes) store_part(x + d, dim - d, mul(load(c + d), broadcast(factor)));
}

// The backward of one head after another.
template <class Op>
class HeadBackward {
  using T = typename Op::Element;
  static constexpr int kVnni = Op::kVnni;

 public:
  explicit HeadBackward(const BlockAttentionBackward& p) : p_(p) {
    for (float* row : {query_rows_.minus_lse, query_rows_.minus_log_sum, query_rows_.delta})
      std::fill_n(row, token_columns_, 0.f);
  }

  // index counts through all blocks and heads. Those that share k or v come in order, from the first to the last.
  void operator()(int64_t index) {
    const int64_t head = index % p_.heads, block = index / p_.heads % p_.blocks, batch = index / p_.heads / p_.blocks;
    const auto input = [&](const Input& x) { return x.at<const T>(batch, block, head); };
    const auto output = [&](const Output& x) { return x.at<T>(batch, block, head); };
    const T *k = input(p_.k), *v = input(p_.v);
    T *dk = output(p_.dk), *dv = output(p_.dv);
    prepare(input(p_.q), k, input(p_.out), input(p_.dout), index);
    added_ = {{}, nullptr, p_.added.columns};
    const int tables = p_.added.any() ? p_.added.tables_of(index / p_.heads, head, added_.tables) : -1;
    if (p_.dbias)
      added_.dbias = p_.dbias + (index / p_.heads / p_.task_blocks * p_.heads + head) * p_.tokens * added_.stride;
    for (int64_t begin = 0; begin < p_.tokens; begin += kept_rows_) {
      const int64_t end = std::min(begin + kept_rows_, p_.tokens);
      for (int64_t first = begin; first < end; first += row_block_rows_) {
        const int64_t rows = std::min(row_block_rows_, end - first);
        multiply_row_block(k + first * p_.k.token_stride, v + first * p_.v.token_stride, rows);
        float* const kept = kept_ + (first - begin) / kVnni * token_columns_;
        if (tables < 0) score_row_block<-1>(first, rows, kept);
        with_tables(tables, [&](auto count) { score_row_block<decltype(count)::value>(first, rows, kept); });
        multiply<Op>(rows, scores_, douts_, dim_columns_, token_steps_, kAttentionGradientKC,
                     {sums_, dim_columns_, kLanes});
        finish_row_block(p_.dv, dv, dv_, 1, head, first, rows);
        multiply<Op>(rows, dscores_, queries_, dim_columns_, token_steps_, kAttentionGradientKC,
                     {sums_, dim_columns_, kLanes});
        finish_row_block(p_.dk, dk, dk_, p_.scale, head, first, rows);
      }
      for (int64_t first = 0; first < p_.tokens; first += row_block_rows_)
        multiply_transposed<Op>(std::min(row_block_rows_, p_.tokens - first), kept_ + first, token_columns_,
                                keys_ + begin / kVnni * dim_columns_, dim_columns_, ceil_div(end - begin, kVnni),
                                begin > 0, {dq_ + first * dim_columns_, dim_columns_, kLanes});
    }
    store_rows(dq_, dim_columns_, p_.scale, p_.tokens, output(p_.dq), p_.dq.token_stride, p_.dim);
  }

 private:
  // Everything that the row blocks of a head share.
  void prepare(const T* q, const T* k, const T* out, const T* dout, int64_t index) {
    const int numbers = p_.added.any() ? 2 : 1;
    const float* lse = p_.lse + index * p_.tokens * numbers;
    for (int64_t i = 0; i < p_.tokens; ++i) {
      query_rows_.minus_lse[i] = -lse[i * numbers];
      if (numbers == 2) query_rows_.minus_log_sum[i] = -lse[i * numbers + 1];
      query_rows_.delta[i] = row_dot(dout + i * p_.dout.token_stride, out + i * p_.out.token_stride, p_.dim);
    }
    pack_b_transposed<Op>(q, p_.q.token_stride, p_.tokens, p_.dim, token_columns_, queries_transposed_);
    pack_b_transposed<Op>(dout, p_.dout.token_stride, p_.tokens, p_.dim, token_columns_, douts_transposed_);
    pack_b<Op>(q, p_.q.token_stride, p_.tokens, p_.dim, dim_columns_, queries_);
    pack_b<Op>(dout, p_.dout.token_stride, p_.tokens, p_.dim, dim_columns_, douts_);
    pack_b<Op>(k, p_.k.token_stride, p_.tokens, p_.dim, dim_columns_, keys_);
  }

  // The products of a row block of keys with all queries.
  void multiply_row_block(const T* k, const T* v, int64_t rows) {
    pack_a<Op>(k, p_.k.token_stride, rows, p_.dim, 0, packed_rows_);
    multiply<Op>(rows, packed_rows_, queries_transposed_, token_columns_, dim_steps_, kAttentionKC,
                 {scores_, kLanes, kPanelA});
    pack_a<Op>(v, p_.v.token_stride, rows, p_.dim, 0, packed_rows_);
    multiply<Op>(rows, packed_rows_, douts_transposed_, token_columns_, dim_steps_, kAttentionKC,
                 {dscores_, kLanes, kPanelA});
  }

  // p and ds, transposed, of these, which are from number `first` on.
  template <int TABLES>
  void score_row_block(int64_t first, int64_t rows, float* kept) {
    constexpr int kUnroll = 4 / kVnni;
    const auto some = [&]<int ROWS>(std::integral_constant<int, ROWS>, int64_t r) {
      const int64_t row = (first + r) * added_.stride;
      AddedRows added = added_;
      for (int i = 0; i < TABLES; ++i) added.tables[i] += row;
      if (added.dbias) added.dbias += row;
      score_gradients<Op, ROWS, TABLES>(scores_ + r * kLanes, dscores_ + r * kLanes, p_.tokens, p_.scale, query_rows_,
                                        kept + r / kVnni * token_columns_, token_columns_, added);
    };
    int64_t r = 0;
    for (; r + kUnroll <= rows; r += kUnroll) some(std::integral_constant<int, kUnroll>(), r);
    for (; r < rows; ++r) some(std::integral_constant<int, 1>(), r);
  }

  // The products in sums_, times factor, to rows of x, which is dk or dv of the head; where x is all heads' they are
  // added up in `total` until the last.
  void finish_row_block(const Output& operand, T* x, float* total, float factor, int64_t head, int64_t first,
                        int64_t rows) {
    const float* c = sums_;
    if (operand.head_stride == 0) {
      total += first * dim_columns_;
      for (int64_t i = 0; i < rows * dim_columns_; i += kLanes)
        store(total + i, head == 0 ? load(sums_ + i) : add(load(total + i), load(sums_ + i)));
      if (head + 1 < p_.heads) return;
      c = total;
    }
    store_rows(c, dim_columns_, factor, rows, x + first * operand.token_stride, operand.token_stride, p_.dim);
  }

  const BlockAttentionBackward& p_;
  const int64_t row_blocks_ = row_blocks_per_head(p_.tokens);
  const int64_t row_block_rows_ = round_up(ceil_div(p_.tokens, row_blocks_), kVnni);
  const int64_t token_columns_ = round_up(p_.tokens, kLanes), token_steps_ = ceil_div(p_.tokens, kVnni);
  const int64_t dim_columns_ = round_up(p_.dim, kLanes), dim_steps_ = ceil_div(p_.dim, kVnni);
  const int64_t kept_rows_ =
      row_block_rows_ * std::clamp<int64_t>(kKeptFloats * kVnni / (row_block_rows_ * token_columns_), 1, row_blocks_);

  AddedRows added_{};
  QueryRows query_rows_;
  float *queries_transposed_, *douts_transposed_, *queries_, *douts_, *keys_, *packed_rows_, *scores_, *dscores_,
      *kept_, *sums_, *dq_, *dk_, *dv_;
  const Scratch memory_{{&queries_transposed_, round_up(dim_steps_, kLanes) * token_columns_},
                        {&douts_transposed_, round_up(dim_steps_, kLanes) * token_columns_},
                        {&queries_, token_steps_ * dim_columns_},
                        {&douts_, token_steps_ * dim_columns_},
                        {&keys_, token_steps_ * dim_columns_},
                        {&query_rows_.minus_lse, token_columns_},
                        {&query_rows_.minus_log_sum, token_columns_},
                        {&query_rows_.delta, token_columns_},
                        {&packed_rows_, kMR * round_up(dim_steps_, kLanes)},
                        {&scores_, kMR * token_columns_},
                        {&dscores_, kMR * token_columns_},
                        {&kept_, kept_rows_ / kVnni * token_columns_},
                        {&sums_, kMR * dim_columns_},
                        {&dq_, p_.tokens * dim_columns_},
                        {&dk_, p_.tokens * dim_columns_},
                        {&dv_, p_.tokens * dim_columns_}};
};

// Tasks [begin, end), those of the same blocks one after the other.
template <class Op>
void attend_backward(const BlockAttentionBackward& p, int64_t begin, int64_t end) {
  HeadBackward<Op> backward(p);
  const int64_t head_tasks = p.heads / p.task_heads;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task / head_tasks * p.task_blocks, last = std::min(first + p.task_blocks, p.all_blocks);
    const int64_t head = task % head_tasks * p.task_heads;
    if (p.dbias) {
      const int64_t floats = p.tokens * p.added.columns;
      std::fill_n(p.dbias + (task / head_tasks * p.heads + head) * floats, p.task_heads * floats, 0.f);
    }
    for (int64_t block = first; block < last; ++block)
      for (int64_t h = head; h < head + p.task_heads; ++h) backward(block * p.heads + h);
  }
}

template <class Op>
constexpr BlockAttentionKernels kBlockAttention = {row_blocks_per_head, attend<Op>, attend_backward<Op>};

NEST_FAST_END_ISA

#endif  // per-target include guard
