// softmax(scale * q @ k^T) @ v inside each image block and head, and its backward, for short sequences: all scores of a
// strip of rows stay in cache, so there is no online softmax, and the products are one small matrix kernel on packed
// operands.
// No include guard: included once per target, after its vector primitives, inside that target's namespace.
//
// The products, the scores among them, are laid out as panels of A are: (columns / kLanes, kRows, kLanes). cpu_matrix.h
// has the rest.

constexpr int64_t kChain = 2 * kLanes;

// The largest score of each row of s. tail is -inf in the last vector's lanes that are no scores, elsewhere 0; it is
// added to them.
template <int ROWS>
inline void row_tops(float* s, int64_t vecs, const float* tail, float* tops) {
  Vec top[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    float* last = s + (vecs - 1) * kPanel + r * kLanes;
    top[r] = add(load(last), load(tail));
    store(last, top[r]);
  }
  for (int64_t i = 0; i < vecs - 1; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) top[r] = max(top[r], load(s + i * kPanel + r * kLanes));
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) tops[r] = largest(top[r]);
}

// Rows of scores s become 2^(factor * (s - top)), packed as A; totals are their sums.
template <class Op, int ROWS>
inline void exponentials(float* s, int64_t vecs, float factor, const float* tops, float* totals) {
  constexpr int per_unit = Op::kPerUnit;
  const Vec factors = broadcast(factor);
  Vec top[ROWS], total[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    top[r] = broadcast(tops[r]);
    total[r] = zero();
  }
  float* unit_row = s;
  for (int64_t i = 0; i < vecs; i += per_unit, unit_row += kPanel) {
    Vec p[ROWS * per_unit];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < per_unit; ++j)
        // A unit's missing neighbour is an exponential of -inf.
        p[r * per_unit + j] = i + j < vecs ? mul(sub(load(s + (i + j) * kPanel + r * kLanes), top[r]), factors)
                                           : broadcast(-std::numeric_limits<float>::infinity());
    exp2_negative<Op>(p);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      Vec unit[per_unit];
#pragma GCC unroll 2
      for (int j = 0; j < per_unit; ++j) {
        unit[j] = p[r * per_unit + j];
        total[r] = add(total[r], unit[j]);
      }
      store(unit_row + r * kLanes, Op::from_floats(unit));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) totals[r] = sum(total[r]);
}

inline int64_t strips_per_head(int64_t tokens) { return ceil_div(tokens, kRows); }

// Rows that are needed soon to the second-level cache: those of a head lie apart, and the hardware does not foresee
// them.
template <int TO_WRITE, class T>
inline void prefetch(const T* x, int64_t stride, int64_t rows, int64_t dim) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(x + r * stride + d, TO_WRITE, 2);
}

// One block's q, k, v and out of one head; index counts through all blocks and heads.
template <class T>
struct Head {
  T *q, *k, *v, *out;

  Head(const BlockAttention& p, int64_t index) {
    const int64_t head = index % p.heads, block = index / p.heads % p.blocks, batch = index / p.heads / p.blocks;
    q = p.q.at<T>(batch, block, head);
    k = p.k.at<T>(batch, block, head);
    v = p.v.at<T>(batch, block, head);
    out = p.out.at<T>(batch, block, head);
  }
};

// Strips [begin, end) of query rows, counted through all blocks and heads.
template <class Op>
void attend(const BlockAttention& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t strips = strips_per_head(p.tokens), strip_rows = ceil_div(p.tokens, strips);
  const int64_t key_vecs = ceil_div(p.tokens, kLanes), key_columns = key_vecs * kLanes;
  const int64_t dim_vecs = ceil_div(p.dim, kLanes), dim_columns = dim_vecs * kLanes;
  const int64_t dim_units = ceil_div(p.dim, Op::kPerUnit), key_units = ceil_div(p.tokens, Op::kPerUnit);

  const int64_t key_floats = round_up(dim_units, kLanes) * key_columns, value_floats = key_units * dim_columns;
  Scratch scratch(key_floats + value_floats + (2 * dim_vecs + key_vecs) * kPanel);
  float* const keys = scratch.take(key_floats);
  float* const values = scratch.take(value_floats);
  float* const queries = scratch.take(dim_vecs * kPanel);
  float* const scores = scratch.take(key_vecs * kPanel);
  float* const sums = scratch.take(dim_vecs * kPanel);

  float tail[kLanes];
  for (int i = 0; i < kLanes; ++i)
    tail[i] = key_columns - kLanes + i < p.tokens ? 0 : -std::numeric_limits<float>::infinity();
  // The largest score gives the largest exponent only where the factor is positive, so its sign goes to q; and a
  // factor of 0 would make NaN of the tail.
  const float factor = std::max(std::fabs(p.scale) * 1.44269504f, std::numeric_limits<float>::min());
  const uint32_t flipped = p.scale < 0 ? Op::kSigns : 0;

  const T *packed_k = nullptr, *packed_v = nullptr;
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t index = strip / strips, first = strip % strips * strip_rows;
    const int64_t rows = std::min(strip_rows, p.tokens - first);
    const Head<T> head(p, index), next(p, std::min(index + 1, (end - 1) / strips));
    if (head.k != packed_k) pack_transposed<Op>(head.k, p.k.token_stride, p.tokens, p.dim, key_columns, keys);
    if (head.v != packed_v) pack_columns<Op>(head.v, p.v.token_stride, p.tokens, p.dim, dim_columns, values);
    packed_k = head.k;
    packed_v = head.v;
    T* out = head.out + first * p.out.token_stride;
    prefetch<1>(out, p.out.token_stride, rows, p.dim);
    prefetch<0>(next.q + first * p.q.token_stride, p.q.token_stride, rows, p.dim);
    prefetch<0>(next.k + first * p.k.token_stride, p.k.token_stride, rows, p.dim);
    prefetch<0>(next.v + first * p.v.token_stride, p.v.token_stride, rows, p.dim);

    pack_rows<Op>(head.q + first * p.q.token_stride, p.q.token_stride, rows, p.dim, flipped, queries);
    multiply<Op>(rows, queries, keys, key_columns, dim_units, kChain, {scores, kLanes, kPanel});

    float tops[kRows], totals[kRows];
    constexpr int together = 4 / Op::kPerUnit;
    int64_t r = 0;
    for (; r + together <= rows; r += together)
      row_tops<together>(scores + r * kLanes, key_vecs, tail, tops + r);
    for (; r < rows; ++r) row_tops<1>(scores + r * kLanes, key_vecs, tail, tops + r);
    for (r = 0; r + together <= rows; r += together)
      exponentials<Op, together>(scores + r * kLanes, key_vecs, factor, tops + r, totals + r);
    for (; r < rows; ++r) exponentials<Op, 1>(scores + r * kLanes, key_vecs, factor, tops + r, totals + r);

    multiply<Op>(rows, scores, values, dim_columns, key_units, kChain, {sums, kLanes, kPanel});
    for (r = 0; r < rows; ++r) {
      if (p.lse) p.lse[index * p.tokens + first + r] = tops[r] * std::fabs(p.scale) + std::log(totals[r]);
      const Vec weight = broadcast(1 / totals[r]);
      for (int64_t i = 0; i < dim_vecs; ++i) {
        const Vec row = mul(load(sums + i * kPanel + r * kLanes), weight);
        store_part(out + r * p.out.token_stride + i * kLanes, p.dim - i * kLanes, row);
      }
    }
  }
}

// --- backward ---

// A strip is of keys here, so that its p and ds, transposed, are the left operands of dv and dk as they come. ds of
// several strips is kept besides and then multiplied transposed back, so that dq is seldom loaded and stored.

constexpr int64_t kKeptFloats = 1 << 14;
constexpr int64_t kLongChain = 16 * kLanes;  // the bound of gradients is wider than the output's

template <class T>
inline float row_dot(const T* x, const T* y, int64_t dim) {
  Vec total = zero();
  for (int64_t d = 0; d < dim; d += kLanes)
    total = mul_add(load_part(x + d, dim - d), load_part(y + d, dim - d), total);
  return sum(total);
}

// 2^x as in Floats, a degree higher: no sum of such powers divides the error out, 8e-8, as in the forward.
struct PreciseExp2 {
  static constexpr float kExp2[] = {0x1.41fbbcp-13f, 0x1.5f3e54p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f,
                                    0x1.ebfbdcp-3f,  0x1.62e43p-1f,   1};
};

// ROWS keys of scores s and of dp, all of `tokens` queries, become p = exp(scale * s - lse) and ds = p * (dp -
// delta), packed as A, and in `kept` (keys' units, columns) ds as A transposed.
template <class Op, int ROWS>
inline void score_gradients(float* s, float* dp, int64_t tokens, float scale, const float* minus_lse,
                            const float* delta, float* kept, int64_t columns) {
  using Exp2 = std::conditional_t<std::is_same_v<typename Op::Element, float>, PreciseExp2, Op>;
  constexpr int per_unit = Op::kPerUnit, unit_rows = (ROWS + per_unit - 1) / per_unit;
  const int64_t vecs = ceil_div(tokens, kLanes);
  const bool odd = tokens % per_unit != 0;  // The last unit then has a lane that is no score.
  const Vec scales = broadcast(scale), log2_e = broadcast(1.44269504f);
  float *unit_row = s, *dunit_row = dp;
  for (int64_t i = 0; i < vecs; i += per_unit, unit_row += kPanel, dunit_row += kPanel) {
    Vec p[ROWS * per_unit];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < per_unit; ++j) {
        // lse is subtracted first: times log2(e), two large numbers that are close would both be rounded.
        p[r * per_unit + j] = broadcast(-std::numeric_limits<float>::infinity());
        if (i + j < vecs)
          p[r * per_unit + j] = mul(log2_e, mul_add(load(s + (i + j) * kPanel + r * kLanes), scales,
                                                    load(minus_lse + (i + j) * kLanes)));
      }
    exp2_negative<Exp2>(p);
    Vec across[unit_rows * per_unit][per_unit] = {};  // vectors of units of keys
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      Vec unit[per_unit], dunit[per_unit];
#pragma GCC unroll 2
      for (int j = 0; j < per_unit; ++j) {
        unit[j] = p[r * per_unit + j];
        dunit[j] = zero();
        if (i + j < vecs)
          dunit[j] = mul(unit[j], sub(load(dp + (i + j) * kPanel + r * kLanes), load(delta + (i + j) * kLanes)));
        if (odd) {
          unit[j] = keep_part(unit[j], tokens - (i + j) * kLanes);
          dunit[j] = keep_part(dunit[j], tokens - (i + j) * kLanes);
        }
        across[r / per_unit * per_unit + j][r % per_unit] = dunit[j];
      }
      store(unit_row + r * kLanes, Op::from_floats(unit));
      store(dunit_row + r * kLanes, Op::from_floats(dunit));
    }
#pragma GCC unroll 4
    for (int u = 0; u < unit_rows; ++u)
#pragma GCC unroll 2
      for (int j = 0; j < per_unit; ++j)
        if (i + j < vecs) store(kept + u * columns + (i + j) * kLanes, Op::interleave(across[u * per_unit + j]));
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
  static constexpr int kPerUnit = Op::kPerUnit;

 public:
  explicit HeadBackward(const BlockAttentionBackward& p) : p_(p) {
    std::fill_n(minus_lse_, token_columns_, 0.f);
    std::fill_n(delta_, token_columns_, 0.f);
  }

  // index counts through all blocks and heads. Those that share k or v come in order, from the first to the last.
  void operator()(int64_t index) {
    const int64_t head = index % p_.heads, block = index / p_.heads % p_.blocks, batch = index / p_.heads / p_.blocks;
    const auto at = [&](const Operand& x) { return x.at<T>(batch, block, head); };
    const T *k = at(p_.k), *v = at(p_.v);
    T *dk = at(p_.dk), *dv = at(p_.dv);
    prepare(at(p_.q), k, at(p_.out), at(p_.dout), p_.lse + index * p_.tokens);
    for (int64_t begin = 0; begin < p_.tokens; begin += kept_rows_) {
      const int64_t end = std::min(begin + kept_rows_, p_.tokens);
      for (int64_t first = begin; first < end; first += strip_rows_) {
        const int64_t rows = std::min(strip_rows_, end - first);
        score_strip(k + first * p_.k.token_stride, v + first * p_.v.token_stride, rows,
                    kept_ + (first - begin) / kPerUnit * token_columns_);
        multiply<Op>(rows, scores_, douts_, dim_columns_, token_units_, kLongChain, {sums_, dim_columns_, kLanes});
        finish_strip(p_.dv, dv, dv_, 1, head, first, rows);
        multiply<Op>(rows, dscores_, queries_, dim_columns_, token_units_, kLongChain, {sums_, dim_columns_, kLanes});
        finish_strip(p_.dk, dk, dk_, p_.scale, head, first, rows);
      }
      for (int64_t first = 0; first < p_.tokens; first += strip_rows_)
        multiply_transposed<Op>(std::min(strip_rows_, p_.tokens - first), kept_ + first, token_columns_,
                                keys_ + begin / kPerUnit * dim_columns_, dim_columns_,
                                ceil_div(end - begin, kPerUnit), begin > 0,
                                {dq_ + first * dim_columns_, dim_columns_, kLanes});
    }
    store_rows(dq_, dim_columns_, p_.scale, p_.tokens, at(p_.dq), p_.dq.token_stride, p_.dim);
  }

 private:
  // Everything that the strips of a head share.
  void prepare(const T* q, const T* k, const T* out, const T* dout, const float* lse) {
    for (int64_t i = 0; i < p_.tokens; ++i) {
      minus_lse_[i] = -lse[i];
      delta_[i] = row_dot(dout + i * p_.dout.token_stride, out + i * p_.out.token_stride, p_.dim);
    }
    pack_transposed<Op>(q, p_.q.token_stride, p_.tokens, p_.dim, token_columns_, queries_transposed_);
    pack_transposed<Op>(dout, p_.dout.token_stride, p_.tokens, p_.dim, token_columns_, douts_transposed_);
    pack_columns<Op>(q, p_.q.token_stride, p_.tokens, p_.dim, dim_columns_, queries_);
    pack_columns<Op>(dout, p_.dout.token_stride, p_.tokens, p_.dim, dim_columns_, douts_);
    pack_columns<Op>(k, p_.k.token_stride, p_.tokens, p_.dim, dim_columns_, keys_);
  }

  // p and ds, transposed, of a strip of keys.
  void score_strip(const T* k, const T* v, int64_t rows, float* kept) {
    pack_rows<Op>(k, p_.k.token_stride, rows, p_.dim, 0, strip_);
    multiply<Op>(rows, strip_, queries_transposed_, token_columns_, dim_units_, kChain, {scores_, kLanes, kPanel});
    pack_rows<Op>(v, p_.v.token_stride, rows, p_.dim, 0, strip_);
    multiply<Op>(rows, strip_, douts_transposed_, token_columns_, dim_units_, kChain, {dscores_, kLanes, kPanel});
    constexpr int together = 4 / kPerUnit;
    const auto some = [&]<int ROWS>(std::integral_constant<int, ROWS>, int64_t r) {
      score_gradients<Op, ROWS>(scores_ + r * kLanes, dscores_ + r * kLanes, p_.tokens, p_.scale, minus_lse_,
                                delta_, kept + r / kPerUnit * token_columns_, token_columns_);
    };
    int64_t r = 0;
    for (; r + together <= rows; r += together) some(std::integral_constant<int, together>(), r);
    for (; r < rows; ++r) some(std::integral_constant<int, 1>(), r);
  }

  // The products in sums_, times factor, to rows of x, which is dk or dv of the head; where x is all heads' they are
  // added up in `total` until the last.
  void finish_strip(const Operand& operand, T* x, float* total, float factor, int64_t head, int64_t first,
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

  float* buffer(int64_t floats) {
    memory_.emplace_back(floats);
    return memory_.back().take(floats);
  }

  const BlockAttentionBackward& p_;
  const int64_t strips_ = strips_per_head(p_.tokens);
  const int64_t strip_rows_ = round_up(ceil_div(p_.tokens, strips_), kPerUnit);
  const int64_t token_columns_ = round_up(p_.tokens, kLanes), token_units_ = ceil_div(p_.tokens, kPerUnit);
  const int64_t dim_columns_ = round_up(p_.dim, kLanes), dim_units_ = ceil_div(p_.dim, kPerUnit);
  const int64_t kept_rows_ =
      strip_rows_ * std::clamp<int64_t>(kKeptFloats * kPerUnit / (strip_rows_ * token_columns_), 1, strips_);

  std::vector<Scratch> memory_;
  float* const queries_transposed_ = buffer(round_up(dim_units_, kLanes) * token_columns_);
  float* const douts_transposed_ = buffer(round_up(dim_units_, kLanes) * token_columns_);
  float* const queries_ = buffer(token_units_ * dim_columns_);
  float* const douts_ = buffer(token_units_ * dim_columns_);
  float* const keys_ = buffer(token_units_ * dim_columns_);
  float* const minus_lse_ = buffer(token_columns_);
  float* const delta_ = buffer(token_columns_);
  float* const strip_ = buffer(kRows * round_up(dim_units_, kLanes));
  float* const scores_ = buffer(kRows * token_columns_);
  float* const dscores_ = buffer(kRows * token_columns_);
  float* const kept_ = buffer(kept_rows_ / kPerUnit * token_columns_);
  float* const sums_ = buffer(kRows * dim_columns_);
  float* const dq_ = buffer(p_.tokens * dim_columns_);
  float* const dk_ = buffer(p_.tokens * dim_columns_);
  float* const dv_ = buffer(p_.tokens * dim_columns_);
};

// Heads [begin, end), counted through all blocks.
template <class Op>
void attend_backward(const BlockAttentionBackward& p, int64_t begin, int64_t end) {
  HeadBackward<Op> backward(p);
  for (int64_t index = begin; index < end; ++index) backward(index);
}
