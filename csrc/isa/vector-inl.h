// The vector primitives of the set of instructions, and what is the same for all: parts of vectors, and how floats are
// multiplied. The baseline, what every processor has, has no vectors.

#if defined(NEST_FAST_VECTOR_INL_H_) == defined(NEST_FAST_TOGGLE)
#ifdef NEST_FAST_VECTOR_INL_H_
#undef NEST_FAST_VECTOR_INL_H_
#else
#define NEST_FAST_VECTOR_INL_H_
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "target.h"

#if NEST_FAST_LEVEL > NEST_FAST_LEVEL_baseline

#if NEST_FAST_LEVEL == NEST_FAST_LEVEL_avx512_bf16
#include "avx512_bf16-inl.h"
#elif NEST_FAST_LEVEL == NEST_FAST_LEVEL_avx512
#include "avx512-inl.h"
#else
#include "avx2-inl.h"
#endif

NEST_FAST_BEGIN_ISA

// The first `count` elements at p, zeros behind them.
template <class T>
inline Vec load_part(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  if constexpr (std::is_same_v<T, float>)
    if (count >= 0) return load_first(p, count);
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

// How to multiply: here as floats, whatever the tensors hold. A product takes a K step at a time, 32 bits of either
// operand: a float, or two bf16 that are neighbours in K (a VNNI pair, in avx512_bf16-inl.h).
template <class T>
struct Floats {
  using Element = T;                              // of the tensors
  static constexpr int kVnni = 1;                 // elements of K in a step
  static constexpr uint32_t kSigns = 0x80000000;  // their sign bits
  // 2^x on [-1/2, 1/2] with the least relative error, 2e-7, that has 2^0 = 1.
  static constexpr float kExp2[] = {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1};

  static Vec dot(Vec a, Vec b, Vec c) { return mul_add(a, b, c); }  // a @ b + c, step by step
  static Vec load_row(const T* p) { return load(p); }               // kLanes steps whose elements lie in a row
  static Vec load_column(const T* p, int64_t) { return load(p); }   // kLanes columns of one step
  static Vec from_floats(const Vec (&x)[1]) { return x[0]; }        // kLanes * kVnni elements of a row
  static Vec interleave(const Vec (&x)[1]) { return x[0]; }         // step l: lane l of each
};

NEST_FAST_END_ISA

#endif  // not the baseline

#endif  // per-target include guard
