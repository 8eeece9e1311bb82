// Linear layers with what stands before and after them in the same pass: LayerNorm, bias, GELU, residual sum. Rows are
// taken a chunk at a time, so that what lies between two layers stays in cache.
// No include guard: included once per target, after cpu_matrix.h, inside that target's namespace.

constexpr int64_t kLinearChain = 16 * kLanes;  // products summed in one register before a sum is stored

template <class Op>
inline int64_t units_of(int64_t features) {
  return round_up(ceil_div(features, Op::kPerUnit), kLanes);
}

template <class Op>
int64_t packed_floats(int64_t in, int64_t out) {
  return units_of<Op>(in) * round_up(out, kPair);
}

// Pairs [begin, end) of vectors of output features of a weight (out, in), as B: (pairs, units, kPair).
template <class Op>
void pack_weight(const Linear& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t panel = units_of<Op>(p.in) * kPair;
  for (int64_t pair = begin; pair < end; ++pair)
    pack_transposed<Op>(static_cast<const T*>(p.weight) + pair * kPair * p.weight_stride, p.weight_stride,
                        p.out - pair * kPair, p.in, kPair, p.packed + pair * panel);
}

// Rows of x as A, normalised first if there is a norm; `row` has room for one.
template <class Op>
void pack_input(const typename Op::Element* x, int64_t stride, int64_t rows, int64_t features, const Norm& norm,
                float* row, float* a) {
  if (!norm.weight) return pack_rows<Op>(x, stride, rows, features, 0, a);
  constexpr int width = kLanes * Op::kPerUnit;
  for (int64_t r = 0; r < rows; ++r, x += stride) {
    for (int64_t c = 0; c < round_up(features, width); c += kLanes) store(row + c, load_part(x + c, features - c));
    layer_norm(row, features, norm.weight, norm.bias, norm.eps);
    for (int64_t c = 0; c < features; c += width) {
      Vec unit[Op::kPerUnit];
#pragma GCC unroll 2
      for (int j = 0; j < Op::kPerUnit; ++j) unit[j] = load(row + c + j * kLanes);
      store(a + c / width * kPanel + r * kLanes, Op::from_floats(unit));
    }
  }
}

// Rows of x as A, in tiles of at most kRows rows. All but the last have an even number: neighbours can be a unit.
struct Tiles {
  int64_t rows, count, tile_rows;

  explicit Tiles(int64_t rows)
      : rows(rows), count(ceil_div(rows, kRows)), tile_rows(round_up(ceil_div(rows, count), 2)) {}
  int64_t first(int64_t tile) const { return tile * tile_rows; }
  int64_t size(int64_t tile) const { return std::min(tile_rows, rows - first(tile)); }
};

template <class Op>
void pack_tiles(const Tiles& tiles, const typename Op::Element* x, int64_t stride, int64_t features, const Norm& norm,
                float* row, float* a) {
  for (int64_t tile = 0; tile < tiles.count; ++tile, a += units_of<Op>(features) * kRows)
    pack_input<Op>(x + tiles.first(tile) * stride, stride, tiles.size(tile), features, norm, row, a);
}

// Phi(x) by a rational function of x^2 with an error below 3e-8.
inline Vec normal_cdf(Vec x) {
  const Vec t = mul(x, x);
  Vec p = broadcast(0x1.7f1230p-25f), q = broadcast(0x1.3ca834p-20f);
  for (const float c : {0x1.a613c8p-17f, 0x1.6239fap-12f, 0x1.3286c0p-7f, 0x1.15ee7ep-4f, 0x1.988452p-1f})
    p = mul_add(p, t, broadcast(c));
  for (const float c : {0x1.339870p-14f, 0x1.ee3d56p-10f, 0x1.d5d5d0p-6f, 0x1.01c00ep-2f, 1.f})
    q = mul_add(q, t, broadcast(c));
  const Vec half = broadcast(0.5f), phi = mul_add(mul(x, half), p / q, half);
  // Further out it is 0 or 1 in float32. NaN is neither further out nor within.
  const Vec bound = broadcast(5.6f);
  return x > bound ? broadcast(1) : x < -bound ? zero() : phi;
}

inline Vec gelu(Vec x) { return mul(x, normal_cdf(x)); }

// 2 sqrt(2 / pi) (x + 0.044715 x^3): the formula with tanh is x times the logistic function of it.
inline Vec logistic_argument(Vec x) {
  return mul(x, mul_add(mul(x, x), broadcast(2 * 0.7978845608f * 0.044715f), broadcast(2 * 0.7978845608f)));
}

// e^-|u|.
inline Vec decay(Vec u) {
  Vec x[] = {mul(u > zero() ? -u : u, broadcast(1.44269504f))};
  exp2_negative<Floats<float>>(x);
  return x[0];
}

inline Vec gelu_tanh(Vec x) {
  const Vec u = logistic_argument(x), d = decay(u), one = broadcast(1);
  return mul(x, (u > zero() ? one : d) / add(one, d));
}

inline Vec activate(Activation activation, Vec x) { return activation == kGelu ? gelu(x) : gelu_tanh(x); }

// use(tile, column) for tile after tile under one pair of vectors of columns after another.
template <class Use>
void for_each_pair(const Tiles& tiles, int64_t columns, Use use) {
  for (int64_t column = 0; column < columns; column += kPair)
    for (int64_t tile = 0; tile < tiles.count; ++tile) use(tile, column);
}

// a @ weight^T, in the order in which pairs of the weight's vectors stay in cache; use(tile, column, c) gets each product
// (rows of the tile, kPair) in c.
template <class Op, class Use>
void multiply_tiles(const Tiles& tiles, const float* a, const Linear& p, Use use) {
  const int64_t units = units_of<Op>(p.in);
  alignas(64) float c[kRows * kPair];
  for_each_pair(tiles, p.out, [&](int64_t tile, int64_t column) {
    multiply<Op>(tiles.size(tile), a + tile * units * kRows, p.packed + column * units, kPair, units, kLinearChain,
                 {c, kPair, kLanes});
    use(tile, column, c);
  });
}

// Stores c + bias to rows of out, from `column` on; or residual + scale * (c + bias) if there is one.
template <class T>
void store_rows(const float* c, int64_t rows, int64_t column, const Linear& p, const Residual<const T>& residual,
                T* out, int64_t out_stride) {
  const Vec scale = broadcast(residual.scale);
  for (int64_t v = column; v < std::min(column + kPair, p.out); v += kLanes, c += kLanes) {
    const int64_t count = p.out - v;
    const Vec bias = p.bias ? load_part(static_cast<const T*>(p.bias) + v, count) : zero();
    for (int64_t r = 0; r < rows; ++r) {
      Vec x = add(load(c + r * kPair), bias);
      if (residual.x) x = mul_add(x, scale, load_part(residual.x + r * residual.stride + v, count));
      store_part(out + r * out_stride + v, count, x);
    }
  }
}

// Stores activation(c + bias) as columns of the next product's A, and c + bias to rows of `hidden` if that is wanted.
template <class Op>
void store_packed(const float* c, int64_t rows, int64_t column, const Linear& p, Activation activation, float* a,
                  typename Op::Element* hidden) {
  using T = typename Op::Element;
  if (hidden) store_rows<T>(c, rows, column, p, {}, hidden, p.out);
  constexpr int width = kLanes * Op::kPerUnit;
  for (int64_t v = column; v < std::min(column + kPair, round_up(p.out, width)); v += width, c += width) {
    Vec bias[Op::kPerUnit];
#pragma GCC unroll 2
    for (int j = 0; j < Op::kPerUnit; ++j) {
      const int64_t at = v + j * kLanes;
      bias[j] = p.bias ? load_part(static_cast<const T*>(p.bias) + at, p.out - at) : zero();
    }
    for (int64_t r = 0; r < rows; ++r) {
      Vec unit[Op::kPerUnit];
#pragma GCC unroll 2
      for (int j = 0; j < Op::kPerUnit; ++j)
        unit[j] = activate(activation, add(load(c + r * kPair + j * kLanes), bias[j]));
      store(a + v / width * kPanel + r * kLanes, Op::from_floats(unit));
    }
  }
}

// A residual from row `at` on.
template <class T>
Residual<const T> rows_at(const Residual<const void>& p, int64_t at) {
  if (!p.x) return {};
  return {static_cast<const T*>(p.x) + at * p.stride, p.stride, p.scale};
}

// Tiles of rows that are computed together: so many that reading the weight is little work for them, while what lies
// between the layers, `floats` a tile, stays in cache.
inline int64_t tiles_at_once(int64_t floats) {
  return std::clamp<int64_t>(kCache / 2 / (floats * int64_t{sizeof(float)}), 1, 8);
}

// use(tiles, first) for row tiles [begin, end) of `rows` rows, at most `at_once` of them together, from row `first` on.
template <class Use>
void for_tiles(int64_t rows, int64_t begin, int64_t end, int64_t at_once, Use use) {
  const int64_t last = std::min(end * kRows, rows);
  for (int64_t first = begin * kRows; first < last; first += at_once * kRows)
    use(Tiles(std::min(at_once * kRows, last - first)), first);
}

// Row tiles [begin, end) of residual + scale * (norm(x) @ weight^T + bias).
template <class Op>
void linear(const LinearLayer& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t tile_floats = units_of<Op>(p.linear.in) * kRows, at_once = tiles_at_once(tile_floats);
  Scratch scratch(round_up(p.linear.in, kPair) + at_once * tile_floats);
  float* const row = scratch.take(round_up(p.linear.in, kPair));
  float* const a = scratch.take(at_once * tile_floats);
  for_tiles(p.rows, begin, end, at_once, [&](const Tiles& tiles, int64_t first) {
    pack_tiles<Op>(tiles, static_cast<const T*>(p.x) + first * p.x_stride, p.x_stride, p.linear.in, p.norm, row, a);
    multiply_tiles<Op>(tiles, a, p.linear, [&](int64_t tile, int64_t column, const float* c) {
      const int64_t at = first + tiles.first(tile);
      store_rows<T>(c, tiles.size(tile), column, p.linear, rows_at<T>(p.residual, at),
                    static_cast<T*>(p.out) + at * p.linear.out, p.linear.out);
    });
  });
}

// Row tiles [begin, end) of x + scale * fc2(activation(fc1(norm(x)))).
template <class Op>
void mlp(const MlpLayer& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t in_floats = units_of<Op>(p.fc1.in) * kRows, hidden_floats = units_of<Op>(p.fc2.in) * kRows;
  const int64_t at_once = tiles_at_once(in_floats + hidden_floats);
  Scratch scratch(round_up(p.fc1.in, kPair) + at_once * (in_floats + hidden_floats));
  float* const row = scratch.take(round_up(p.fc1.in, kPair));
  float* const a = scratch.take(at_once * in_floats);
  float* const hidden = scratch.take(at_once * hidden_floats);
  for_tiles(p.rows, begin, end, at_once, [&](const Tiles& tiles, int64_t first) {
    const T* x = static_cast<const T*>(p.x) + first * p.x_stride;
    T* out = static_cast<T*>(p.out) + first * p.fc2.out;
    pack_tiles<Op>(tiles, x, p.x_stride, p.fc1.in, p.norm, row, a);
    multiply_tiles<Op>(tiles, a, p.fc1, [&](int64_t tile, int64_t column, const float* c) {
      T* saved = p.hidden ? static_cast<T*>(p.hidden) + (first + tiles.first(tile)) * p.fc1.out : nullptr;
      if (saved) prefetch<1>(saved + tiles.size(tile) * p.fc1.out + column, p.fc1.out, kRows, kPair);  // the next tile
      store_packed<Op>(c, tiles.size(tile), column, p.fc1, p.activation, hidden + tile * hidden_floats, saved);
    });
    multiply_tiles<Op>(tiles, hidden, p.fc2, [&](int64_t tile, int64_t column, const float* c) {
      const int64_t at = tiles.first(tile);
      store_rows<T>(c, tiles.size(tile), column, p.fc2, {x + at * p.x_stride, p.x_stride, p.branch_scale},
                    out + at * p.fc2.out, p.fc2.out);
    });
  });
}
