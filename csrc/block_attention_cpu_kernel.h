// softmax(scale * q @ k^T) @ v inside each image block and head, for short sequences: all scores of a strip of query
// rows stay in cache, so there is no online softmax, and both products are one small matrix kernel on packed operands.
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
