// Vector primitives for AVX2 with FMA and F16C.
// vector-inl.h includes it, once for each set, and has the include guard.

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "../elements.h"
#include "target.h"

NEST_FAST_BEGIN_ISA

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kMR = 6;  // 6 rows x 2 vectors of sums, 2 vectors of B and 1 of A: 15 of 16 registers

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec mul_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // b where either is NaN
inline Vec flip(Vec a, uint32_t bits) { return _mm256_xor_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(bits))); }
inline Vec shift_to_exponent(Vec a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23)); }
inline float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float largest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load_first(const float* p, int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane));
}
inline Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const BFloat16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline void store(Half* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// To bf16 in the upper half of each lane, to nearest, ties to even, NaN to NaN; what is in the lower half is left over.
inline __m256i round_to_bf16(Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const Vec nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(even), broadcast(NAN), nan));
}

inline void store(BFloat16* p, Vec x) {
  const __m256i high = _mm256_srli_epi32(round_to_bf16(x), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

// Of 2 * kLanes neighbours in memory those with even numbers in one vector, those with odd ones in the other: each is a
// float once the other of its lane is shifted or masked out.
inline void load_neighbours(const BFloat16* p, Vec (&x)[2]) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  x[0] = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  x[1] = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
inline void store_neighbours(BFloat16* p, const Vec (&x)[2]) {
  const __m256i even = _mm256_srli_epi32(round_to_bf16(x[0]), 16), odd = round_to_bf16(x[1]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(even, odd, 0b10101010));
}

// Rows a and b, S apart, of a matrix being transposed: exchanges a's lanes with bit S set for b's without.
template <int S>
inline void swap_off_diagonal(Vec& a, Vec& b) {
  const Vec top = S == 4   ? _mm256_permute2f128_ps(a, b, 0x20)
                  : S == 2 ? _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)))
                           : _mm256_blend_ps(a, _mm256_moveldup_ps(b), 0xaa);
  b = S == 4   ? _mm256_permute2f128_ps(a, b, 0x31)
      : S == 2 ? _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)))
               : _mm256_blend_ps(_mm256_movehdup_ps(a), b, 0xaa);
  a = top;
}

NEST_FAST_END_ISA
