// Elements of 16 bits, and what one of them is as a float, for code without vectors.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace nest_fast {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(Half x) { return c10::Half(x.bits, c10::Half::from_bits()); }
inline float to_float(BFloat16 x) { return c10::BFloat16(x.bits, c10::BFloat16::from_bits()); }

// a + b, rounded once.
template <class T>
inline T sum_of(T a, T b) {
  return a + b;
}
template <>
inline Half sum_of(Half a, Half b) {
  return {c10::Half(to_float(a) + to_float(b)).x};
}
template <>
inline BFloat16 sum_of(BFloat16 a, BFloat16 b) {
  return {c10::BFloat16(to_float(a) + to_float(b)).x};
}

}  // namespace nest_fast
