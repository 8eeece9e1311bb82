// The backward of linear layers and of what lies between two of them. Rows are taken a chunk at a time: first the
// gradients of the chunk's rows, then the sums over its rows that are the weights' gradients, so that a chunk is still
// in cache where it is summed.
// No include guard: included once per target, after linear_cpu_kernel.h, inside that target's namespace.

constexpr int64_t kGradientChain = 32 * kLanes;  // units of rows whose products are summed in one register

// Panels [begin, end) of a weight (in, out), as B.
template <class Op>
void pack_weight_transposed(const Linear& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t units = ceil_div(p.in, Op::kPerUnit), panel = units_of<Op>(p.in) * kPair;
  for (int64_t pair = begin; pair < end; ++pair) {
    float* b = p.packed + pair * panel;
    pack_columns<Op>(static_cast<const T*>(p.weight) + pair * kPair, p.weight_stride, p.in, p.out - pair * kPair, kPair,
                     b);
    std::fill(b + units * kPair, b + panel, 0.f);
  }
}

template <class Op>
inline int64_t units_of(const Chunk& chunk) {
  return ceil_div(chunk.rows, Op::kPerUnit);
}

// `rows` rows of x to panels, from row `at` of the chunk on, which begins a unit.
template <class Op>
void pack_panels(const typename Op::Element* x, int64_t stride, int64_t rows, const Chunk& chunk, int64_t at,
                 const Panels& p) {
  if (!p.data) return;
  for (int64_t pair = 0; pair * kPair < p.features; ++pair)
    pack_columns<Op>(x + pair * kPair, stride, rows, p.features - pair * kPair, kPair,
                     p.data + (pair * units_of<Op>(chunk) + at / Op::kPerUnit) * kPair);
}

// Adds the sums over `units` of a panel's columns to `sums`, or stores them. Summed a few at a time: that is exacter.
template <class Op>
inline void sum_columns(const float* panel, int64_t units, bool add_sums, float* sums) {
  Vec ones[Op::kPerUnit];
#pragma GCC unroll 2
  for (int j = 0; j < Op::kPerUnit; ++j) ones[j] = broadcast(1);
  const Vec one = Op::interleave(ones);
  for (int v = 0; v < kPair; v += kLanes) {
    Vec total = zero();
    for (int64_t u = 0; u < units; u += kLanes) {
      Vec part = zero();
      for (int64_t i = u; i < std::min(u + kLanes, units); ++i) part = Op::dot(load(panel + i * kPair + v), one, part);
      total = add(total, part);
    }
    store(sums + v, add_sums ? add(load(sums + v), total) : total);
  }
}

// Squares [begin, end), of pairs of vectors either way, of a weight's gradient; with the first of a row the bias's. Of
// the bias's alone there is one in a row.
template <class Op>
void weight_gradient(const WeightGradient& p, const Chunk& chunk, int64_t begin, int64_t end) {
  constexpr int rows = kLanes / 2;
  const int64_t units = units_of<Op>(chunk), across = p.sums ? ceil_div(p.x.features, kPair) : 1;
  const int64_t columns = across * kPair;
  for (int64_t done = 0; done < units; done += kGradientChain) {
    const int64_t steps = std::min(kGradientChain, units - done);
    const bool add_sums = chunk.first > 0 || done > 0;
    for (int64_t square = begin; square < end; ++square) {
      const int64_t out = square / across, in = square % across;
      const float* a = p.dout.data + (out * units + done) * kPair;
      for (int64_t r = 0; p.sums && r < kPair; r += rows) {
        const float* b = p.x.data + (in * units + done) * kPair;
        float* c = p.sums + (out * kPair + r) * columns + in * kPair;
        prefetch<1>(c, columns, rows, kPair);
        multiply_transposed_tile<Op, rows, 2>(a + r, kPair, b, kPair, steps, add_sums, {c, columns, kLanes});
      }
      if (in == 0 && p.bias_sums) sum_columns<Op>(a, steps, add_sums, p.bias_sums + out * kPair);
    }
  }
}

// Rows [begin, end) of sums, which are `stride` apart, rounded to dense rows.
template <class T>
void round_sums(const float* sums, int64_t stride, int64_t features, void* out, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r)
    for (int64_t c = 0; c < features; c += kLanes)
      store_part(static_cast<T*>(out) + r * features + c, features - c, load(sums + r * stride + c));
}

// Row tiles [begin, end) of a chunk: dx = dout @ weight, and dout and x to panels, as far as they are wanted.
template <class Op>
void linear_backward(const LinearBackward& p, const Chunk& chunk, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t outs = p.linear.in, ins = p.linear.out;
  const int64_t tile_floats = units_of<Op>(outs) * kRows, at_once = tiles_at_once(tile_floats);
  Scratch scratch(at_once * tile_floats);
  float* const a = scratch.take(at_once * tile_floats);
  for_tiles(chunk.rows, begin, end, at_once, [&](const Tiles& tiles, int64_t at) {
    const int64_t first = chunk.first + at;
    const T* dout = static_cast<const T*>(p.dout) + first * p.dout_stride;
    if (p.dx) {
      pack_tiles<Op>(tiles, dout, p.dout_stride, outs, {}, nullptr, a);
      multiply_tiles<Op>(tiles, a, p.linear, [&](int64_t tile, int64_t column, const float* c) {
        store_rows<T>(c, tiles.size(tile), column, p.linear, {},
                      static_cast<T*>(p.dx) + (first + tiles.first(tile)) * ins, ins);
      });
    }
    pack_panels<Op>(dout, p.dout_stride, tiles.rows, chunk, at, p.weight.dout);
    pack_panels<Op>(static_cast<const T*>(p.x) + first * p.x_stride, p.x_stride, tiles.rows, chunk, at, p.weight.x);
  });
}

struct Activated {
  Vec value, slope;
};

inline Activated activate_with_slope(Activation activation, Vec x) {
  const Vec one = broadcast(1);
  if (activation == kGelu) {  // Phi(x) + x phi(x)
    Vec density[] = {mul(mul(x, x), broadcast(-0.5f * 1.44269504f))};
    exp2_negative<Floats<float>>(density);
    const Vec cdf = normal_cdf(x);
    return {mul(x, cdf), mul_add(mul(x, broadcast(0.398942280f)), density[0], cdf)};
  }
  // s(u) + x u' s(u) (1 - s(u)), which is d / (1 + d)^2 with d = e^-|u|.
  const Vec u = logistic_argument(x), d = decay(u), inverse = one / add(one, d);
  const Vec logistic = mul(u > zero() ? one : d, inverse);
  const Vec du = mul_add(mul(x, x), broadcast(6 * 0.7978845608f * 0.044715f), broadcast(2 * 0.7978845608f));
  // d vanishes before du overflows.
  return {mul(x, logistic), mul_add(mul(mul(x, mul(d, inverse)), inverse), du, logistic)};
}

// c is the gradient of what the activation gave for these rows and columns of `hidden`. Stores the gradient of
// `hidden`, as columns of the next product's A and to panels, from row `at` of the chunk on; and what the activation
// gave, to panels; to those that are wanted.
template <class Op>
void store_hidden_gradient(const float* c, int64_t rows, int64_t column, const typename Op::Element* hidden,
                           Activation activation, float* a, const Chunk& chunk, int64_t at, const Panels& gradient,
                           const Panels& value) {
  constexpr int per_unit = Op::kPerUnit, width = kLanes * per_unit;
  const int64_t features = gradient.features, panel = (column / kPair * units_of<Op>(chunk) + at / per_unit) * kPair;
  for (int64_t r = 0; r < rows; r += per_unit)
    for (int64_t v = 0; v < kPair; v += width) {
      Vec dh[per_unit][per_unit], h[per_unit][per_unit];  // columns' vectors, rows
#pragma GCC unroll 2
      for (int j = 0; j < per_unit; ++j)
#pragma GCC unroll 2
        for (int i = 0; i < per_unit; ++i) {
          dh[j][i] = h[j][i] = zero();
          const int64_t first = column + v + j * kLanes;
          if (r + i >= rows || first >= features) continue;
          const auto x = load_part(hidden + (r + i) * features + first, features - first);
          const Activated y = activate_with_slope(activation, x);
          h[j][i] = y.value;
          dh[j][i] = mul(y.slope, load(c + (r + i) * kPair + v + j * kLanes));
        }
#pragma GCC unroll 2
      for (int i = 0; i < per_unit; ++i) {
        Vec unit[per_unit];
#pragma GCC unroll 2
        for (int j = 0; j < per_unit; ++j) unit[j] = dh[j][i];
        if (r + i < rows && column + v < features)
          store(a + (column + v) / width * kPanel + (r + i) * kLanes, Op::from_floats(unit));
      }
#pragma GCC unroll 2
      for (int j = 0; j < per_unit; ++j) {
        const int64_t to = panel + r / per_unit * kPair + v + j * kLanes;
        if (gradient.data) store(gradient.data + to, Op::interleave(dh[j]));
        if (value.data) store(value.data + to, Op::interleave(h[j]));
      }
    }
}

// Row tiles [begin, end) of a chunk: the gradient of fc1's input; both layers' inputs and outputs' gradients to panels;
// as far as they are wanted.
template <class Op>
void mlp_backward(const MlpBackward& p, const Chunk& chunk, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t features = p.fc2.in, hidden_features = p.fc1.in;
  const int64_t in_floats = units_of<Op>(features) * kRows, hidden_floats = units_of<Op>(hidden_features) * kRows;
  const int64_t at_once = tiles_at_once(in_floats + hidden_floats);
  Scratch scratch(at_once * (in_floats + hidden_floats));
  float* const a = scratch.take(at_once * in_floats);
  float* const dhidden = scratch.take(at_once * hidden_floats);
  for_tiles(chunk.rows, begin, end, at_once, [&](const Tiles& tiles, int64_t at) {
    const int64_t first = chunk.first + at;
    const T* dout = static_cast<const T*>(p.dout) + first * p.dout_stride;
    const T* hidden = static_cast<const T*>(p.hidden) + first * hidden_features;
    const auto store_hidden = [&](int64_t tile, int64_t column, const float* c) {
      const int64_t row = tiles.first(tile);
      if (tile + 1 < tiles.count)
        prefetch<0>(hidden + tiles.first(tile + 1) * hidden_features + column, hidden_features, kRows, kPair);
      else
        prefetch<0>(hidden + column + kPair, hidden_features, kRows, kPair);
      store_hidden_gradient<Op>(c, tiles.size(tile), column, hidden + row * hidden_features, p.activation,
                                dhidden + tile * hidden_floats, chunk, at + row, p.fc1_weight.dout, p.fc2_weight.x);
    };
    if (p.dx || p.fc1_weight.dout.data) {
      pack_tiles<Op>(tiles, dout, p.dout_stride, features, {}, nullptr, a);
      multiply_tiles<Op>(tiles, a, p.fc2, store_hidden);
    } else if (p.fc2_weight.x.data) {
      alignas(64) const float no_gradient[kRows * kPair] = {};
      for_each_pair(tiles, hidden_features,
                    [&](int64_t tile, int64_t column) { store_hidden(tile, column, no_gradient); });
    }
    if (p.dx)
      multiply_tiles<Op>(tiles, dhidden, p.fc1, [&](int64_t tile, int64_t column, const float* c) {
        store_rows<T>(c, tiles.size(tile), column, p.fc1, {},
                      static_cast<T*>(p.dx) + (first + tiles.first(tile)) * features, features);
      });
    pack_panels<Op>(dout, p.dout_stride, tiles.rows, chunk, at, p.fc2_weight.dout);
    pack_panels<Op>(static_cast<const T*>(p.x) + first * p.x_stride, p.x_stride, tiles.rows, chunk, at, p.fc1_weight.x);
  });
}
