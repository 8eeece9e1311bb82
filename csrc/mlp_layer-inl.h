// x + scale * fc2(activation(fc1(norm(x)))) and its backward, some rows at a time: what lies between the matmuls stays
// in cache.

#if defined(NEST_FAST_MLP_LAYER_INL_H_) == defined(NEST_FAST_TOGGLE)
#ifdef NEST_FAST_MLP_LAYER_INL_H_
#undef NEST_FAST_MLP_LAYER_INL_H_
#else
#define NEST_FAST_MLP_LAYER_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "isa/vector-inl.h"
#include "linear-inl.h"
#include "math-inl.h"
#include "matrix-inl.h"
#include "mlp_layer.h"
#include "scratch.h"
#include "sizes.h"

NEST_FAST_BEGIN_ISA

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

template <Activation ACTIVATION>
inline Vec activate(Vec x) {
  return ACTIVATION == kGelu ? gelu(x) : gelu_tanh(x);
}

struct Activated {
  Vec value, slope;
};

template <Activation ACTIVATION>
inline Activated activate_with_slope(Vec x) {
  const Vec one = broadcast(1);
  if constexpr (ACTIVATION == kGelu) {  // Phi(x) + x phi(x)
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

// Stores activation(c + bias) as columns of the next product's A, and c + bias to rows of `hidden` if that is wanted.
template <class Op, Activation ACTIVATION>
void store_packed(const float* c, int64_t rows, int64_t column, const Linear& p, float* a,
                  typename Op::Element* hidden) {
  using T = typename Op::Element;
  if (hidden) store_rows<T>(c, rows, column, p, {}, hidden, p.out);
  constexpr int width = kLanes * Op::kVnni;
  for (int64_t v = column; v < std::min(column + kNR, round_up(p.out, width)); v += width, c += width) {
    Vec bias[Op::kVnni];
#pragma GCC unroll 2
    for (int j = 0; j < Op::kVnni; ++j) {
      const int64_t feature = v + j * kLanes;
      bias[j] = p.bias ? load_part(static_cast<const T*>(p.bias) + feature, p.out - feature) : zero();
    }
    for (int64_t r = 0; r < rows; ++r) {
      Vec parts[Op::kVnni];
#pragma GCC unroll 2
      for (int j = 0; j < Op::kVnni; ++j) parts[j] = activate<ACTIVATION>(add(load(c + r * kNR + j * kLanes), bias[j]));
      store(a + v / width * kPanelA + r * kLanes, Op::from_floats(parts));
    }
  }
}

// Row tiles [begin, end) of x + scale * fc2(activation(fc1(norm(x)))).
template <class Op>
void mlp_layer(const MlpLayer& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t in_floats = k_steps_of<Op>(p.fc1.in) * kMR, hidden_floats = k_steps_of<Op>(p.fc2.in) * kMR;
  const int64_t at_once = tiles_at_once(in_floats + hidden_floats);
  const auto store_tile = p.activation == kGelu ? store_packed<Op, kGelu> : store_packed<Op, kGeluTanh>;
  const auto [row, a, hidden] = scratch(round_up(p.fc1.in, kNR), at_once * in_floats, at_once * hidden_floats);
  for_tiles(p.rows, begin, end, at_once, [&](const Tiles& tiles, int64_t first) {
    pack_from<Op>(tiles, p.x, p.float_x, p.x_stride, nullptr, first, p.fc1.in, p.norm, row, a);
    multiply_tiles<Op>(tiles, a, p.fc1, [&](int64_t tile, int64_t column, const float* c) {
      T* saved = p.hidden ? static_cast<T*>(p.hidden) + (first + tiles.first(tile)) * p.fc1.out : nullptr;
      if (saved) prefetch<1>(saved + tiles.size(tile) * p.fc1.out + column, p.fc1.out, kMR, kNR);  // the next tile
      store_tile(c, tiles.size(tile), column, p.fc1, hidden + tile * hidden_floats, saved);
    });
    multiply_tiles<Op>(tiles, hidden, p.fc2, [&](int64_t tile, int64_t column, const float* c) {
      store_to<T>(c, tiles.size(tile), column, p.fc2, p.residual, p.out, p.float_x, nullptr, first + tiles.first(tile));
    });
  });
}

// --- backward ---

// c is the gradient of what the activation gave for these rows and columns of `hidden`. Stores the gradient of
// `hidden`, as columns of the next product's A and packed as B, from row `offset` of the chunk on; and what the
// activation gave, packed as B; as far as they are wanted.
template <class Op, Activation ACTIVATION>
void store_hidden_gradient(const float* c, int64_t rows, int64_t column, const typename Op::Element* hidden, float* a,
                           const Chunk& chunk, int64_t offset, const PackedB& gradient, const PackedB& value) {
  constexpr int vnni = Op::kVnni, width = kLanes * vnni;
  const int64_t features = gradient.features, group = (column / kNR * k_steps_of<Op>(chunk) + offset / vnni) * kNR;
  for (int64_t r = 0; r < rows; r += vnni)
    for (int64_t v = 0; v < kNR; v += width) {
      Vec dh[vnni][vnni], h[vnni][vnni];  // columns' vectors, rows
#pragma GCC unroll 2
      for (int j = 0; j < vnni; ++j)
#pragma GCC unroll 2
        for (int i = 0; i < vnni; ++i) {
          dh[j][i] = h[j][i] = zero();
          const int64_t first = column + v + j * kLanes;
          if (r + i >= rows || first >= features) continue;
          const auto x = load_part(hidden + (r + i) * features + first, features - first);
          const Activated y = activate_with_slope<ACTIVATION>(x);
          h[j][i] = y.value;
          dh[j][i] = mul(y.slope, load(c + (r + i) * kNR + v + j * kLanes));
        }
#pragma GCC unroll 2
      for (int i = 0; i < vnni; ++i) {
        Vec parts[vnni];
#pragma GCC unroll 2
        for (int j = 0; j < vnni; ++j) parts[j] = dh[j][i];
        if (r + i < rows && column + v < features)
          store(a + (column + v) / width * kPanelA + (r + i) * kLanes, Op::from_floats(parts));
      }
#pragma GCC unroll 2
      for (int j = 0; j < vnni; ++j) {
        const int64_t to = group + r / vnni * kNR + v + j * kLanes;
        if (gradient.data) store(gradient.data + to, Op::interleave(dh[j]));
        if (value.data) store(value.data + to, Op::interleave(h[j]));
      }
    }
}

// Row tiles [begin, end) of a chunk: the gradient of fc1's input; both layers' inputs and outputs' gradients packed as
// B; as far as they are wanted.
template <class Op>
void mlp_layer_backward(const MlpLayerBackward& p, const Chunk& chunk, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t features = p.fc2.in, hidden_features = p.fc1.in;
  const int64_t in_floats = k_steps_of<Op>(features) * kMR, hidden_floats = k_steps_of<Op>(hidden_features) * kMR;
  const int64_t at_once = tiles_at_once(in_floats + hidden_floats);
  const auto store_tile =
      p.activation == kGelu ? store_hidden_gradient<Op, kGelu> : store_hidden_gradient<Op, kGeluTanh>;
  const auto [a, dhidden] = scratch(at_once * in_floats, at_once * hidden_floats);
  for_tiles(chunk.rows, begin, end, at_once, [&](const Tiles& tiles, int64_t offset) {
    const int64_t first = chunk.first + offset;
    const T* dout = static_cast<const T*>(p.dout) + first * p.dout_stride;
    const T* hidden = static_cast<const T*>(p.hidden) + first * hidden_features;
    const auto store_hidden = [&](int64_t tile, int64_t column, const float* c) {
      const int64_t row = tiles.first(tile);
      if (tile + 1 < tiles.count)
        prefetch<0>(hidden + tiles.first(tile + 1) * hidden_features + column, hidden_features, kMR, kNR);
      else
        prefetch<0>(hidden + column + kNR, hidden_features, kMR, kNR);
      store_tile(c, tiles.size(tile), column, hidden + row * hidden_features, dhidden + tile * hidden_floats, chunk,
                 offset + row, p.fc1_weight.dout, p.fc2_weight.x);
    };
    if (p.dx || p.fc1_weight.dout.data) {
      pack_tiles<Op>(tiles, dout, p.dout_stride, features, {}, nullptr, a);
      multiply_tiles<Op>(tiles, a, p.fc2, store_hidden);
    } else if (p.fc2_weight.x.data) {
      alignas(64) const float no_gradient[kMR * kNR] = {};
      for_each_group(tiles, hidden_features,
                     [&](int64_t tile, int64_t column) { store_hidden(tile, column, no_gradient); });
    }
    if (p.dx)
      multiply_tiles<Op>(tiles, dhidden, p.fc1, [&](int64_t tile, int64_t column, const float* c) {
        store_rows<T>(c, tiles.size(tile), column, p.fc1, {},
                      static_cast<T*>(p.dx) + (first + tiles.first(tile)) * features, features);
      });
    pack_chunk<Op>(dout, p.dout_stride, tiles.rows, chunk, offset, p.fc2_weight.dout);
    pack_chunk<Op>(static_cast<const T*>(p.x) + first * p.x_stride, p.x_stride, tiles.rows, chunk, offset,
                   p.fc1_weight.x);
  });
}

template <class Op>
constexpr MlpLayerKernels kMlpLayer = {kLinear<Op>, mlp_layer<Op>, mlp_layer_backward<Op>};

NEST_FAST_END_ISA

#endif  // per-target include guard
