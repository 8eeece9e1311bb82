// The micro-kernel: small matrix products on packed operands, MR x NR sums in registers; and what packs them.
//
// Operands are packed by K steps of 32 bits (isa/vector-inl.h says what is in one), carried as floats whatever they
// hold. A is (steps / kLanes, MR, kLanes), so that the distance between rows is a constant; B is (steps, columns); the
// products are floats.

#if defined(NEST_FAST_MATRIX_INL_H_) == defined(NEST_FAST_TOGGLE)
#ifdef NEST_FAST_MATRIX_INL_H_
#undef NEST_FAST_MATRIX_INL_H_
#else
#define NEST_FAST_MATRIX_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "isa/vector-inl.h"
#include "sizes.h"

NEST_FAST_BEGIN_ISA

constexpr int64_t kPanelA = kMR * kLanes;  // floats of packed A from kLanes steps to the next
constexpr int64_t kNR = 2 * kLanes;        // columns of B that are multiplied together

// Where the MR x NR sums of a product go: floats from one row to the next, and from one vector of a row to the next.
struct Sums {
  float* data;
  int64_t row, vec;
};

// Memory that is needed soon, on its way to the second-level cache while products are computed: some lines from `next`
// on in every kLanes K steps. All of them at once would wait for each other, and the products for them.
struct Ahead {
  const float* next = nullptr;
  int64_t lines = 0;

  void bring() {
    for (int64_t i = 0; i < lines; ++i, next += kLine) __builtin_prefetch(next, 0, 2);
  }

  static constexpr int64_t kLine = 64 / sizeof(float);
};

// The same of rows that lie apart, all of which are there after `times` times kLanes K steps.
class RowsAhead {
 public:
  explicit RowsAhead(int64_t times) : times_(times) {}

  // At most four times: x (rows, dim), `stride` from one row to the next.
  template <class T>
  void add(const T* x, int64_t stride, int64_t rows, int64_t dim) {
    const int64_t bytes = sizeof(T);
    // A row that does not begin with a line may end in one more.
    const bool aligned = (reinterpret_cast<uintptr_t>(x) | static_cast<uintptr_t>(stride * bytes)) % kLine == 0;
    const int64_t in_row = ceil_div(dim * bytes + (aligned ? 0 : kLine - 1), kLine);
    pieces_[count_++] = {reinterpret_cast<const char*>(x), rows, in_row, stride * bytes - in_row * kLine};
    if (count_ == 1) now_ = pieces_[0], left_in_row_ = in_row;
    left_ += rows * in_row;
    each_time_ = ceil_div(left_, times_);
  }

  void bring() {
    for (int64_t i = std::min(each_time_, left_); i > 0; --i, --left_) {
      __builtin_prefetch(now_.next, 0, 2);
      now_.next += kLine;
      if (--left_in_row_ == 0) {
        now_.next += now_.apart;
        if (--now_.rows == 0 && left_ > 1) now_ = pieces_[++piece_];
        left_in_row_ = now_.in_row;
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes

  struct Piece {
    const char* next;
    int64_t rows, in_row, apart;
  };

  Piece pieces_[4], now_;
  int64_t times_, left_ = 0, each_time_ = 0, left_in_row_ = 0;
  int count_ = 0, piece_ = 0;
};

// How often a product with B (k_steps, columns) brings some.
inline int64_t times_of(int64_t columns, int64_t k_steps) { return ceil_div(columns, kNR) * ceil_div(k_steps, kLanes); }

// How `count` products, each of so many K steps, share in bringing `floats`.
class Shares {
 public:
  Shares(int64_t floats, int64_t k_steps, int64_t count)
      : floats_(floats),
        lines_(ceil_div(floats, ceil_div(k_steps, kLanes) * count * Ahead::kLine)),
        share_(ceil_div(k_steps, kLanes) * lines_ * Ahead::kLine) {}

  Ahead of(const float* data, int64_t index) const {
    if (index * share_ >= floats_) return {};
    return {data + index * share_, lines_};
  }

 private:
  int64_t floats_, lines_, share_;
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

  // Adds the product of one K step: a is its column, `stride` floats from one row to the next, b its row.
  void add_step(const float* a, int64_t stride, const float* b) {
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
        float* sum = c.data + r * c.row + v * c.vec;
        store(sum, add_c ? add(load(sum), sums_[r][v]) : sums_[r][v]);
      }
  }

 private:
  Vec sums_[ROWS][VECS];
};

// c[ROWS, VECS] = a[ROWS, k_steps] @ b[k_steps, VECS], or its sum with c.
template <class Op, int ROWS, int VECS, class SomeAhead>
[[gnu::always_inline]] inline void multiply_tile(const float* a, const float* b, int64_t columns, int64_t k_steps,
                                                 bool add_c, Sums c, SomeAhead& ahead) {
  Tile<Op, ROWS, VECS> tile;
  for (; k_steps > 0; k_steps -= kLanes, a += kPanelA) {
    ahead.bring();
    const int64_t steps = std::min<int64_t>(k_steps, kLanes);
    for (int64_t k = 0; k < steps; ++k, b += columns) tile.add_step(a + k, kLanes, b);
  }
  tile.store_to(c, add_c);
}

// As multiply; a long chain of additions loses precision, so it is cut after `kc` steps, a multiple of kLanes.
template <class Op, int ROWS, class SomeAhead>
void multiply_exactly(const float* a, const float* b, int64_t columns, int64_t k_steps, int64_t kc, const Sums& c,
                      const SomeAhead& on_the_way) {
  SomeAhead ahead = on_the_way;
  for (int64_t done = 0; done < k_steps; done += kc, a += kc / kLanes * kPanelA, b += kc * columns) {
    const int64_t steps = std::min(kc, k_steps - done);
    float* part = c.data;
    int64_t first = 0;
    for (; first + kNR <= columns; first += kNR, part += 2 * c.vec)
      multiply_tile<Op, ROWS, 2>(a, b + first, columns, steps, done > 0, {part, c.row, c.vec}, ahead);
    if (first < columns)
      multiply_tile<Op, ROWS, 1>(a, b + first, columns, steps, done > 0, {part, c.row, c.vec}, ahead);
  }
}

// callback(ROWS) with the ROWS, 1 to MR, that `rows` is, as a constant.
template <class Callback, int... I>
void with_constant(std::integer_sequence<int, I...>, int64_t rows, const Callback& callback) {
  using Call = void (*)(const Callback&);
  static constexpr Call by_rows[] = {
      [](const Callback& callback) { callback(std::integral_constant<int, I + 1>()); }...};
  by_rows[rows - 1](callback);
}
template <class Callback>
void with_constant_rows(int64_t rows, const Callback& callback) {
  with_constant(std::make_integer_sequence<int, kMR>(), rows, callback);
}

// c[rows, columns] = a[rows, k_steps] @ b[k_steps, columns], for at most MR rows and columns that fill vectors.
template <class Op, class SomeAhead = Ahead>
void multiply(int64_t rows, const float* a, const float* b, int64_t columns, int64_t k_steps, int64_t kc,
              const Sums& c, const SomeAhead& ahead = {}) {
  with_constant_rows(rows, [&](auto count) { multiply_exactly<Op, count>(a, b, columns, k_steps, kc, c, ahead); });
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
void pack_a(const typename Op::Element* x, int64_t stride, int64_t rows, int64_t dim, uint32_t flipped, float* a) {
  constexpr int width = kLanes * Op::kVnni;
  typename Op::Element copy[kMR][width];
  for (int64_t d = 0; d < dim; d += width, a += kPanelA) {
    int64_t step = stride;
    const auto* source = dim - d < width ? readable(x + d, step, rows, dim - d, copy) : x + d;
    for (int64_t r = 0; r < rows; ++r) store(a + r * kLanes, flip(Op::load_row(source + r * step), flipped));
  }
}

// x^T as B, from x (rows, dim): the summed dimension is dim. Writes whole squares: steps past dim are zeros.
template <class Op>
void pack_b_transposed(const typename Op::Element* x, int64_t stride, int64_t rows, int64_t dim, int64_t columns,
                       float* b) {
  constexpr int width = kLanes * Op::kVnni;
  typename Op::Element copy[kLanes][width];
  for (int64_t d = 0; d < dim; d += width, b += kLanes * columns)
    for (int64_t first = 0; first < columns; first += kLanes) {
      int64_t step = stride;
      const auto* source = readable(x + first * stride + d, step, rows - first, dim - d, copy);
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) square[r] = Op::load_row(source + r * step);
      transpose<kLanes / 2>(square);
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) store(b + k * columns + first, square[k]);
    }
}

// x (rows, dim) as B: the summed dimension is rows.
template <class Op>
void pack_b(const typename Op::Element* x, int64_t stride, int64_t rows, int64_t dim, int64_t columns, float* b) {
  typename Op::Element copy[Op::kVnni][kLanes];
  for (int64_t r = 0; r < rows; r += Op::kVnni, b += columns)
    for (int64_t d = 0; d < columns; d += kLanes) {
      int64_t step = stride;
      const auto* source = readable(x + r * stride + d, step, rows - r, dim - d, copy);
      store(b + d, Op::load_column(source, step));
    }
}

// As multiply_tile, for an A that lies transposed: (k_steps, rows), `stride` floats from one step to the next.
template <class Op, int ROWS, int VECS>
inline void multiply_transposed_tile(const float* a, int64_t stride, const float* b, int64_t columns, int64_t k_steps,
                                     bool add_c, Sums c, Ahead ahead = {}) {
  Tile<Op, ROWS, VECS> tile;
  for (; k_steps > 0; k_steps -= kLanes) {
    ahead.bring();
    const int64_t steps = std::min<int64_t>(k_steps, kLanes);
    for (int64_t k = 0; k < steps; ++k, a += stride, b += columns) tile.add_step(a, 1, b);
  }
  tile.store_to(c, add_c);
}

template <class Op, int ROWS>
void multiply_transposed_rows(const float* a, int64_t stride, const float* b, int64_t columns, int64_t k_steps,
                              bool add_c, Sums c) {
  int64_t first = 0;
  for (; first + kNR <= columns; first += kNR, c.data += 2 * c.vec)
    multiply_transposed_tile<Op, ROWS, 2>(a, stride, b + first, columns, k_steps, add_c, c);
  if (first < columns) multiply_transposed_tile<Op, ROWS, 1>(a, stride, b + first, columns, k_steps, add_c, c);
}

// c[rows, columns] = a^T @ b[k_steps, columns], or its sum with c, as multiply.
template <class Op>
void multiply_transposed(int64_t rows, const float* a, int64_t stride, const float* b, int64_t columns, int64_t k_steps,
                         bool add_c, Sums c) {
  with_constant_rows(
      rows, [=](auto count) { multiply_transposed_rows<Op, count>(a, stride, b, columns, k_steps, add_c, c); });
}

// Rows that are needed soon to the second-level cache: those of a head lie apart, and the hardware does not foresee
// them.
template <int TO_WRITE, class T>
inline void prefetch(const T* x, int64_t stride, int64_t rows, int64_t dim) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(x + r * stride + d, TO_WRITE, 2);
}

NEST_FAST_END_ISA

#endif  // per-target include guard
