// softmax(scale * q @ k^T) @ v inside each image block and head, for short sequences: all scores of a strip of query
// rows stay in cache, so there is no online softmax, and both products are one small matrix kernel on packed operands.
// No include guard: included once per target, after its vector primitives, inside that target's namespace.
//
// Operands are packed in 32-bit units (a float, or two bf16 that are neighbours in the summed dimension), carried as
// floats whatever they hold. A is in panels (units / kLanes, kRows, kLanes), so that the distance between rows is a
// constant, as are the products (columns / kLanes, kRows, kLanes), which are floats; B is (units, columns).

constexpr int64_t kPanel = kRows * kLanes;

// How to multiply: here as floats, whatever the tensors hold.
template <class T>
struct Floats {
  using Element = T;                              // of the tensors
  static constexpr int kPerUnit = 1;              // neighbours in a unit
  static constexpr uint32_t kSigns = 0x80000000;  // their sign bits
  // 2^x on [-1/2, 1/2] with the least relative error, 2e-7, that has 2^0 = 1.
  static constexpr float kExp2[] = {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1};

  static Vec dot(Vec a, Vec b, Vec c) { return mul_add(a, b, c); }  // a @ b + c, unit by unit
  static Vec along(const T* p) { return load(p); }                  // units whose neighbours lie in a row
  static Vec across(const T* p, int64_t) { return load(p); }        // units whose neighbours lie in a column
  static Vec from_floats(const Vec (&x)[1]) { return x[0]; }        // kLanes * kPerUnit elements
};

// C[ROWS, VECS] = A[ROWS, units] @ B[units, VECS], or its sum with C, with every sum in a register.
template <class Op, int ROWS, int VECS>
inline void multiply_tile(const float* a, const float* b, int64_t columns, int64_t units, bool add_c, float* c) {
  Vec sums[ROWS][VECS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) sums[r][v] = zero();
  for (; units > 0; units -= kLanes, a += kPanel) {
    const int64_t steps = std::min<int64_t>(units, kLanes);
    for (int64_t u = 0; u < steps; ++u, b += columns) {
      Vec right[VECS];
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const Vec left = broadcast(a[r * kLanes + u]);
#pragma GCC unroll 2
        for (int v = 0; v < VECS; ++v) sums[r][v] = Op::dot(left, right[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) {
      float* sum = c + v * kPanel + r * kLanes;
      store(sum, add_c ? add(load(sum), sums[r][v]) : sums[r][v]);
    }
}

// C[ROWS, columns] = A[ROWS, units] @ B[units, columns].
template <class Op, int ROWS>
void multiply(const float* a, const float* b, int64_t columns, int64_t units, float* c) {
  // A long chain of additions loses precision, so it is cut.
  constexpr int64_t chain = 2 * kLanes;
  for (int64_t done = 0; done < units; done += chain, a += chain / kLanes * kPanel, b += chain * columns) {
    const int64_t steps = std::min(chain, units - done);
    int64_t first = 0;
    for (; first + 2 * kLanes <= columns; first += 2 * kLanes)
      multiply_tile<Op, ROWS, 2>(a, b + first, columns, steps, done > 0, c + first / kLanes * kPanel);
    if (first < columns)
      multiply_tile<Op, ROWS, 1>(a, b + first, columns, steps, done > 0, c + first / kLanes * kPanel);
  }
}

template <class Op, int... I>
void multiply_rows(std::integer_sequence<int, I...>, int64_t rows, const float* a, const float* b, int64_t columns,
                   int64_t units, float* c) {
  using Multiply = void (*)(const float*, const float*, int64_t, int64_t, float*);
  static constexpr Multiply by_rows[] = {multiply<Op, I + 1>...};
  by_rows[rows - 1](a, b, columns, units, c);
}

// x itself where ROWS x SIZE elements can be read there, otherwise a copy of the rows x count there are, zeros around.
template <class T, int ROWS, int SIZE>
inline const T* readable(const T* x, int64_t& stride, int64_t rows, int64_t count, T (&copy)[ROWS][SIZE]) {
  if (rows >= ROWS && count >= SIZE) return x;
  std::memset(copy, 0, sizeof(copy));
  rows = std::min<int64_t>(rows, ROWS);
  count = std::min<int64_t>(count, SIZE);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(copy[r], x + r * stride, count * sizeof(T));
  stride = SIZE;
  return copy[0];
}

template <int SIZE>
inline void transpose(Vec (&square)[kLanes]) {
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r)
    if (!(r & SIZE)) swap_off_diagonal<SIZE>(square[r], square[r + SIZE]);
  if constexpr (SIZE > 1) transpose<SIZE / 2>(square);
}

// x (rows, dim) as A.
template <class Op>
void pack_rows(const typename Op::Element* x, int64_t stride, int64_t rows, int64_t dim, uint32_t flipped, float* a) {
  constexpr int width = kLanes * Op::kPerUnit;
  typename Op::Element copy[kRows][width];
  for (int64_t d = 0; d < dim; d += width, a += kPanel) {
    int64_t step = stride;
    const auto* source = dim - d < width ? readable(x + d, step, rows, dim - d, copy) : x + d;
    for (int64_t r = 0; r < rows; ++r) store(a + r * kLanes, flip(Op::along(source + r * step), flipped));
  }
}

// x^T as B, from x (rows, dim): the summed dimension is dim. Writes whole squares: units past dim are zeros.
template <class Op>
void pack_transposed(const typename Op::Element* x, int64_t stride, int64_t rows, int64_t dim, int64_t columns,
                     float* b) {
  constexpr int width = kLanes * Op::kPerUnit;
  typename Op::Element copy[kLanes][width];
  for (int64_t d = 0; d < dim; d += width, b += kLanes * columns)
    for (int64_t first = 0; first < columns; first += kLanes) {
      int64_t step = stride;
      const auto* source = readable(x + first * stride + d, step, rows - first, dim - d, copy);
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) square[r] = Op::along(source + r * step);
      transpose<kLanes / 2>(square);
#pragma GCC unroll 16
      for (int u = 0; u < kLanes; ++u) store(b + u * columns + first, square[u]);
    }
}

// x (rows, dim) as B: the summed dimension is rows.
template <class Op>
void pack_columns(const typename Op::Element* x, int64_t stride, int64_t rows, int64_t dim, int64_t columns, float* b) {
  typename Op::Element copy[Op::kPerUnit][kLanes];
  for (int64_t r = 0; r < rows; r += Op::kPerUnit, b += columns)
    for (int64_t d = 0; d < columns; d += kLanes) {
      int64_t step = stride;
      const auto* source = readable(x + r * stride + d, step, rows - r, dim - d, copy);
      store(b + d, Op::across(source, step));
    }
}

// Each x to 2^x, for x <= 0; NaN stays. 0 below 2^-126. Several at once hide the latencies.
template <class Op, int COUNT>
inline void exp2_negative(Vec (&x)[COUNT]) {
  // Adding 1.5 * 2^23 rounds to an integer in the low bits of the sum, and 127 biases it as an exponent is.
  const Vec magic = broadcast(12582912.f + 127.f);
  Vec rounded[COUNT], p[COUNT];
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) {
    x[i] = max(broadcast(-127.f), x[i]);
    rounded[i] = add(x[i], magic);
    x[i] = sub(x[i], sub(rounded[i], magic));
    p[i] = broadcast(Op::kExp2[0]);
  }
  constexpr int terms = std::size(Op::kExp2);
#pragma GCC unroll 8
  for (int c = 1; c < terms; ++c)
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) p[i] = mul_add(p[i], x[i], broadcast(Op::kExp2[c]));
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) x[i] = mul(p[i], shift_to_exponent(rounded[i]));
}

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

template <class T>
inline void store_part(T* p, int64_t count, Vec x) {
  if (count >= kLanes) return store(p, x);
  T copy[kLanes];
  store(copy, x);
  std::memcpy(p, copy, count * sizeof(T));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

  // Every size is a multiple of kLanes, so one alignment serves all.
  const int64_t sizes[] = {ceil_div(dim_units, kLanes) * kLanes * key_columns, key_units * dim_columns,
                           dim_vecs * kPanel, key_vecs * kPanel, dim_vecs * kPanel};
  const std::unique_ptr<float[]> memory(
      new float[std::accumulate(std::begin(sizes), std::end(sizes), int64_t{kLanes})]);
  const uintptr_t align = kLanes * sizeof(float);
  float* keys = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + align - 1) / align * align);
  float* values = keys + sizes[0];
  float* queries = values + sizes[1];
  float* scores = queries + sizes[2];
  float* sums = scores + sizes[3];

  float tail[kLanes];
  for (int i = 0; i < kLanes; ++i)
    tail[i] = key_columns - kLanes + i < p.tokens ? 0 : -std::numeric_limits<float>::infinity();
  // The largest score gives the largest exponent only where the factor is positive, so its sign goes to q; and a
  // factor of 0 would make NaN of the tail.
  const float factor = std::max(std::fabs(p.scale) * 1.44269504f, std::numeric_limits<float>::min());
  const uint32_t flipped = p.scale < 0 ? Op::kSigns : 0;

  const std::make_integer_sequence<int, kRows> all_rows;
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
    multiply_rows<Op>(all_rows, rows, queries, keys, key_columns, dim_units, scores);

    float tops[kRows], totals[kRows];
    constexpr int together = 4 / Op::kPerUnit;
    int64_t r = 0;
    for (; r + together <= rows; r += together)
      row_tops<together>(scores + r * kLanes, key_vecs, tail, tops + r);
    for (; r < rows; ++r) row_tops<1>(scores + r * kLanes, key_vecs, tail, tops + r);
    for (r = 0; r + together <= rows; r += together)
      exponentials<Op, together>(scores + r * kLanes, key_vecs, factor, tops + r, totals + r);
    for (; r < rows; ++r) exponentials<Op, 1>(scores + r * kLanes, key_vecs, factor, tops + r, totals + r);

    multiply_rows<Op>(all_rows, rows, scores, values, dim_columns, key_units, sums);
    for (r = 0; r < rows; ++r) {
      p.lse[index * p.tokens + first + r] = tops[r] * std::fabs(p.scale) + std::log(totals[r]);
      const Vec weight = broadcast(1 / totals[r]);
      for (int64_t i = 0; i < dim_vecs; ++i) {
        const Vec row = mul(load(sums + i * kPanel + r * kLanes), weight);
        store_part(out + r * p.out.token_stride + i * kLanes, p.dim - i * kLanes, row);
      }
    }
  }
}
