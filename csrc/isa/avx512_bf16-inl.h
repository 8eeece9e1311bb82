// Vector primitives for AVX-512 with AVX512_BF16.
// vector-inl.h includes it, once for each set, and has the include guard.

#ifndef NEST_FAST_ISA
#define NEST_FAST_ISA avx512_bf16
#endif
#include <immintrin.h>

#include <cstdint>

#include "../elements.h"
#include "avx512-inl.h"
#include "target.h"

NEST_FAST_BEGIN_ISA

// How to multiply, as Floats in vector-inl.h: pairs of bf16 that are neighbours in K, by vdpbf16ps (VNNI pairs).
struct VnniPairs {
  using Element = BFloat16;
  static constexpr int kVnni = 2;
  static constexpr uint32_t kSigns = 0x80008000;
  // As in Floats, a degree lower: the error, 3e-6, is far below what bf16 resolves.
  static constexpr float kExp2[] = {0x1.3a02ccp-7f, 0x1.c9fc46p-5f, 0x1.ec0378p-3f, 0x1.62e12cp-1f, 1};

  static Vec dot(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  static Vec load_row(const BFloat16* p) { return load(reinterpret_cast<const float*>(p)); }
  static Vec load_column(const BFloat16* p, int64_t stride) {
    return _mm512_castsi512_ps(_mm512_or_si512(load_bits(p), _mm512_slli_epi32(load_bits(p + stride), 16)));
  }
  static Vec from_floats(const Vec (&x)[2]) {
    return _mm512_castsi512_ps(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x[1], x[0])));
  }
  static Vec interleave(const Vec (&x)[2]) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x[0])));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x[1])));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};

NEST_FAST_END_ISA
