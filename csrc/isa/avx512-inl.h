// Vector primitives for AVX-512 (F, BW, DQ, VL).
// vector-inl.h includes it, once for each set, and has the include guard.

#ifndef NEST_FAST_ISA
#define NEST_FAST_ISA avx512
#endif
#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "../elements.h"
#include "target.h"

NEST_FAST_BEGIN_ISA

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kMR = 14;  // 14 rows x 2 vectors of sums, 2 vectors of B and 1 of A: 31 of 32 registers; 14 divides 196

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec mul_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline Vec flip(Vec a, uint32_t bits) { return _mm512_xor_ps(a, _mm512_castsi512_ps(_mm512_set1_epi32(bits))); }
inline Vec shift_to_exponent(Vec a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23)); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load_first(const float* p, int64_t count) { return _mm512_maskz_loadu_ps((1u << count) - 1, p); }
inline Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline __m512i load_bits(const BFloat16* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const BFloat16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(load_bits(p), 16)); }

inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void store(Half* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// To bf16 in the upper half of each lane, to nearest, ties to even, NaN to NaN; what is in the lower half is left over.
// Not by vcvtneps2bf16, which drops subnormals.
inline __m512i round_to_bf16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i down = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_mask_add_epi32(down, odd, bits, _mm512_set1_epi32(0x8000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}

inline void store(BFloat16* p, Vec x) {
  const __m256i rounded = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(x), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
}

// Of 2 * kLanes neighbours in memory those with even numbers in one vector, those with odd ones in the other: each is a
// float once the other of its lane is shifted or masked out.
inline void load_neighbours(const BFloat16* p, Vec (&x)[2]) {
  const __m512i bits = _mm512_loadu_si512(p);
  x[0] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  x[1] = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
inline void store_neighbours(BFloat16* p, const Vec (&x)[2]) {
  const __m512i even = _mm512_srli_epi32(round_to_bf16(x[0]), 16), odd = round_to_bf16(x[1]);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, even, odd));
}

// Rows a and b, S apart, of a matrix being transposed: exchanges a's lanes with bit S set for b's without.
template <int S>
inline void swap_off_diagonal(Vec& a, Vec& b) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 right = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(S));
  const __m512i upper = _mm512_mask_add_epi32(lane, right, lane, _mm512_set1_epi32(16 - S));  // b's left beside a's
  const __m512i lower = _mm512_add_epi32(lane, _mm512_mask_set1_epi32(_mm512_set1_epi32(S), right, 16));
  const Vec top = _mm512_permutex2var_ps(a, upper, b);
  b = _mm512_permutex2var_ps(a, lower, b);
  a = top;
}

NEST_FAST_END_ISA
