// The backward of block_attention-inl.h, and the table of both.
//
// A row block is of keys here, so that its p and ds, transposed, are the left operands of dv and dk as they come. ds of
// several row blocks is kept besides and then multiplied transposed back, so that dq is seldom loaded and stored.

#if defined(NEST_FAST_BLOCK_ATTENTION_BACKWARD_INL_H_) == defined(NEST_FAST_TOGGLE)
#ifdef NEST_FAST_BLOCK_ATTENTION_BACKWARD_INL_H_
#undef NEST_FAST_BLOCK_ATTENTION_BACKWARD_INL_H_
#else
#define NEST_FAST_BLOCK_ATTENTION_BACKWARD_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "block_attention-inl.h"
#include "block_attention.h"
#include "isa/vector-inl.h"
#include "math-inl.h"
#include "matrix-inl.h"
#include "scratch.h"
#include "sizes.h"

NEST_FAST_BEGIN_ISA

constexpr int64_t kAttentionGradientKC = 256;  // the bound of gradients is wider than the output's
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

  // index counts through all blocks and heads. Those that share k or v come in order, from the first to the last. The
  // head with number `next` is brought on the way.
  void operator()(int64_t index, int64_t next) {
    const int64_t head = index % p_.heads, block = index / p_.heads % p_.blocks, batch = index / p_.heads / p_.blocks;
    const auto output = [&](const Output& x) { return x.at<T>(batch, block, head); };
    T *dk = output(p_.dk), *dv = output(p_.dv);
    const Rows own = rows_of(index), ahead = rows_of(next);
    prepare(own, index);
    scale_ = p_.scale_of(p_.added.scales, head);
    added_ = {{}, nullptr, p_.added.columns};
    const int tables = p_.added.any() ? p_.added.tables_of(index / p_.heads, head, added_.tables) : -1;
    if (p_.dbias)
      added_.dbias = p_.dbias + (index / p_.heads / p_.task_blocks * p_.heads + head) * p_.tokens * added_.stride;
    for (int64_t begin = 0; begin < p_.tokens; begin += kept_rows_) {
      const int64_t end = std::min(begin + kept_rows_, p_.tokens);
      for (int64_t first = begin; first < end; first += row_block_rows_) {
        const int64_t rows = std::min(row_block_rows_, end - first);
        multiply_row_block(own, ahead, first, rows);
        float* const kept = kept_ + (first - begin) / kVnni * token_columns_;
        if (tables < 0) score_row_block<-1>(first, rows, kept);
        with_tables(tables, [&](auto count) { score_row_block<decltype(count)::value>(first, rows, kept); });
        multiply<Op>(rows, scores_, douts_, dim_columns_, token_steps_, kAttentionGradientKC,
                     {sums_, dim_columns_, kLanes});
        finish_row_block(p_.dv, dv, dv_, 1, head, first, rows);
        multiply<Op>(rows, dscores_, queries_, dim_columns_, token_steps_, kAttentionGradientKC,
                     {sums_, dim_columns_, kLanes});
        finish_row_block(p_.dk, dk, dk_, scale_, head, first, rows);
      }
      for (int64_t first = 0; first < p_.tokens; first += row_block_rows_)
        multiply_transposed<Op>(std::min(row_block_rows_, p_.tokens - first), kept_ + first, token_columns_,
                                keys_ + begin / kVnni * dim_columns_, dim_columns_, ceil_div(end - begin, kVnni),
                                begin > 0, {dq_ + first * dim_columns_, dim_columns_, kLanes});
    }
    const float factor = p_.added.scales ? 1 : scale_;
    store_rows(dq_, dim_columns_, factor, p_.tokens, output(p_.dq), p_.dq.token_stride, p_.dim);
  }

 private:
  // One head's.
  struct Rows {
    const T *q, *k, *v, *out, *dout;
  };
  Rows rows_of(int64_t index) const {
    const int64_t head = index % p_.heads, block = index / p_.heads % p_.blocks, batch = index / p_.heads / p_.blocks;
    const auto input = [&](const Input& x) { return x.at<const T>(batch, block, head); };
    return {input(p_.q), input(p_.k), input(p_.v), input(p_.out), input(p_.dout)};
  }

  // Everything that the row blocks of a head share.
  void prepare(const Rows& own, int64_t index) {
    const auto& [q, k, v, out, dout] = own;
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

  // The products of a row block of keys with all queries; meanwhile the same rows of the next head are brought.
  void multiply_row_block(const Rows& own, const Rows& next, int64_t first, int64_t rows) {
    const auto multiply_with = [&](const T* x, int64_t stride, const float* b, float* c, const RowsAhead& ahead) {
      pack_a<Op>(x + first * stride, stride, rows, p_.dim, 0, packed_rows_);
      multiply<Op>(rows, packed_rows_, b, token_columns_, dim_steps_, kAttentionKC, {c, kLanes, kPanelA}, ahead);
    };
    const auto bring = [&](RowsAhead& ahead, const T* x, int64_t stride) {
      ahead.add(x + first * stride, stride, rows, p_.dim);
    };
    const int64_t times = times_of(token_columns_, dim_steps_);
    RowsAhead with_keys(times), with_values(times);
    bring(with_keys, next.q, p_.q.token_stride);
    bring(with_keys, next.k, p_.k.token_stride);
    multiply_with(own.k, p_.k.token_stride, queries_transposed_, scores_, with_keys);
    bring(with_values, next.v, p_.v.token_stride);
    bring(with_values, next.out, p_.out.token_stride);
    bring(with_values, next.dout, p_.dout.token_stride);
    multiply_with(own.v, p_.v.token_stride, douts_transposed_, dscores_, with_values);
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
      score_gradients<Op, ROWS, TABLES>(scores_ + r * kLanes, dscores_ + r * kLanes, p_.tokens, scale_, query_rows_,
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

  float scale_ = 1;
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
      for (int64_t h = head; h < head + p.task_heads; ++h) {
        const int64_t index = block * p.heads + h, heads = p.all_blocks * p.heads;
        const int64_t next = h + 1 < head + p.task_heads ? index + 1 : index + (last - first > 1 ? p.heads : 1);
        backward(index, next < heads ? next : index);
      }
  }
}

template <class Op>
constexpr BlockAttentionKernels kBlockAttention = {row_blocks_per_head, attend<Op>, attend_backward<Op>};

NEST_FAST_END_ISA

#endif  // per-target include guard
