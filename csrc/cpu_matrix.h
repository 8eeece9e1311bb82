// Small matrix products on packed operands, and what packs them.
// No include guard: included once per target, after its vector primitives, inside that target's namespace.
//
// Operands are packed in 32-bit units (a float, or two bf16 that are neighbours in the summed dimension), carried as
// floats whatever they hold. A is in panels (units / kLanes, kRows, kLanes), so that the distance between rows is a
// constant; B is (units, columns); the products are floats.

constexpr int64_t kPanel = kRows * kLanes;
constexpr int64_t kPair = 2 * kLanes;  // columns of B that are multiplied together

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The first `count` elements at p, zeros behind them.
template <class T>
inline Vec load_part(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T copy[kLanes] = {};
  if (count > 0) std::memcpy(copy, p, count * sizeof(T));
  return load(copy);
}

template <class T>
inline void store_part(T* p, int64_t count, Vec x) {
  if (count >= kLanes) return store(p, x);
  T copy[kLanes];
  store(copy, x);
  if (count > 0) std::memcpy(p, copy, count * sizeof(T));
}

inline Vec keep_part(Vec x, int64_t count) {
  if (count >= kLanes) return x;
  float copy[kLanes];
  store(copy, x);
  return load_part(copy, count);
}

// Memory of one thread, given out in pieces that are aligned as vectors are.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(new float[floats + kLanes]) {
    const uintptr_t align = kLanes * sizeof(float);
    next_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + align - 1) / align * align);
  }

  float* take(int64_t floats) {
    float* piece = next_;
    next_ += round_up(floats, kLanes);
    return piece;
  }

 private:
  std::unique_ptr<float[]> memory_;
  float* next_;
};

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
  static Vec interleave(const Vec (&x)[1]) { return x[0]; }         // unit l: lane l of each
};

// Where the sums of a product go: floats from one row to the next, and from one vector of a row to the next.
struct Sums {
  float* at;
  int64_t row, vec;
};

// c[ROWS, VECS], with every sum in a register.
template <class Op, int ROWS, int VECS>
class Tile {
 public:
  Tile() {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) sums_[r][v] = zero();
  }

  // Adds the product of one unit: a is its column, `stride` floats from one row to the next, b its row.
  void add_unit(const float* a, int64_t stride, const float* b) {
    Vec right[VECS];
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Vec left = broadcast(a[r * stride]);
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) sums_[r][v] = Op::dot(left, right[v], sums_[r][v]);
    }
  }

  void store_to(Sums c, bool add_c) const {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) {
        float* sum = c.at + r * c.row + v * c.vec;
        store(sum, add_c ? add(load(sum), sums_[r][v]) : sums_[r][v]);
      }
  }

 private:
  Vec sums_[ROWS][VECS];
};

// c[ROWS, VECS] = a[ROWS, units] @ b[units, VECS], or its sum with c.
template <class Op, int ROWS, int VECS>
inline void multiply_tile(const float* a, const float* b, int64_t columns, int64_t units, bool add_c, Sums c) {
  Tile<Op, ROWS, VECS> tile;
  for (; units > 0; units -= kLanes, a += kPanel) {
    const int64_t steps = std::min<int64_t>(units, kLanes);
    for (int64_t u = 0; u < steps; ++u, b += columns) tile.add_unit(a + u, kLanes, b);
  }
  tile.store_to(c, add_c);
}

// As multiply; a long chain of additions loses precision, so it is cut after `chain` units, a multiple of kLanes.
template <class Op, int ROWS>
void multiply_exactly(const float* a, const float* b, int64_t columns, int64_t units, int64_t chain, Sums c) {
  for (int64_t done = 0; done < units; done += chain, a += chain / kLanes * kPanel, b += chain * columns) {
    const int64_t steps = std::min(chain, units - done);
    Sums part = c;
    int64_t first = 0;
    for (; first + kPair <= columns; first += kPair, part.at += 2 * c.vec)
      multiply_tile<Op, ROWS, 2>(a, b + first, columns, steps, done > 0, part);
    if (first < columns) multiply_tile<Op, ROWS, 1>(a, b + first, columns, steps, done > 0, part);
  }
}

// use(ROWS) with the ROWS, 1 to kRows, that `rows` is, as a constant.
template <class Use, int... I>
void with_constant(std::integer_sequence<int, I...>, int64_t rows, const Use& use) {
  using Call = void (*)(const Use&);
  static constexpr Call by_rows[] = {[](const Use& use) { use(std::integral_constant<int, I + 1>()); }...};
  by_rows[rows - 1](use);
}
template <class Use>
void with_constant_rows(int64_t rows, const Use& use) {
  with_constant(std::make_integer_sequence<int, kRows>(), rows, use);
}

// c[rows, columns] = a[rows, units] @ b[units, columns], for at most kRows rows and columns that fill vectors.
template <class Op>
void multiply(int64_t rows, const float* a, const float* b, int64_t columns, int64_t units, int64_t chain, Sums c) {
  with_constant_rows(rows, [=](auto count) { multiply_exactly<Op, count>(a, b, columns, units, chain, c); });
}

// x itself where ROWS x SIZE elements can be read there, otherwise a copy of the rows x count there are, zeros around.
template <class T, int ROWS, int SIZE>
inline const T* readable(const T* x, int64_t& stride, int64_t rows, int64_t count, T (&copy)[ROWS][SIZE]) {
  if (rows >= ROWS && count >= SIZE) return x;
  std::memset(copy, 0, sizeof(copy));
  rows = std::min<int64_t>(rows, ROWS);
  count = std::clamp<int64_t>(count, 0, SIZE);
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

struct Statistics {
  float mean, rstd;
};

// LayerNorm of the `channels` floats in z, in place; whole vectors of z are read and written.
template <class T>
inline Statistics layer_norm(float* z, int64_t channels, const T* weight, const T* bias, float eps) {
  Vec total = zero(), squares = zero();
  for (int64_t c = 0; c < channels; c += kLanes) total = add(total, keep_part(load(z + c), channels - c));
  const float mean = sum(total) / channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Vec x = keep_part(sub(load(z + c), broadcast(mean)), channels - c);
    store(z + c, x);
    squares = mul_add(x, x, squares);
  }
  // In double, so that nothing but the sum is rounded: its error is every channel's.
  const float rstd = 1 / std::sqrt(static_cast<double>(sum(squares)) / channels + eps);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Vec scale = mul(broadcast(rstd), load_part(weight + c, channels - c));
    store(z + c, mul_add(load(z + c), scale, load_part(bias + c, channels - c)));
  }
  return {mean, rstd};
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

// As multiply_tile, for an A that lies transposed: (units, rows), `stride` floats from one unit to the next.
template <class Op, int ROWS, int VECS>
inline void multiply_transposed_tile(const float* a, int64_t stride, const float* b, int64_t columns, int64_t units,
                                     bool add_c, Sums c) {
  Tile<Op, ROWS, VECS> tile;
  for (int64_t u = 0; u < units; ++u, a += stride, b += columns) tile.add_unit(a, 1, b);
  tile.store_to(c, add_c);
}

template <class Op, int ROWS>
void multiply_transposed_rows(const float* a, int64_t stride, const float* b, int64_t columns, int64_t units,
                              bool add_c, Sums c) {
  int64_t first = 0;
  for (; first + kPair <= columns; first += kPair, c.at += 2 * c.vec)
    multiply_transposed_tile<Op, ROWS, 2>(a, stride, b + first, columns, units, add_c, c);
  if (first < columns) multiply_transposed_tile<Op, ROWS, 1>(a, stride, b + first, columns, units, add_c, c);
}

// c[rows, columns] = a^T @ b[units, columns], or its sum with c, as multiply.
template <class Op>
void multiply_transposed(int64_t rows, const float* a, int64_t stride, const float* b, int64_t columns, int64_t units,
                         bool add_c, Sums c) {
  with_constant_rows(
      rows, [=](auto count) { multiply_transposed_rows<Op, count>(a, stride, b, columns, units, add_c, c); });
}
