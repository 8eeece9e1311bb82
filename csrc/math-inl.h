// Functions of vectors: powers of 2 and LayerNorm.

#if defined(NEST_FAST_MATH_INL_H_) == defined(NEST_FAST_TOGGLE)
#ifdef NEST_FAST_MATH_INL_H_
#undef NEST_FAST_MATH_INL_H_
#else
#define NEST_FAST_MATH_INL_H_
#endif

#include <cmath>
#include <cstdint>
#include <iterator>

#include "isa/vector-inl.h"

NEST_FAST_BEGIN_ISA

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

NEST_FAST_END_ISA

#endif  // per-target include guard
