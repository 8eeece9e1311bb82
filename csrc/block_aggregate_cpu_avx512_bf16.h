// Multiplication for block_aggregate_cpu_kernel.h with AVX512_BF16. No include guard: included once, after
// the vector primitives for AVX-512, in one namespace.

// As Floats is for floats: pairs of bf16, multiplied and summed by vdpbf16ps.
struct PairsOfBFloat16 {
  using Element = BFloat16;
  static constexpr int kPerUnit = 2;

  static Vec dot(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  static Vec from_floats(const Vec (&x)[2]) {
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
  }
  static Vec interleave(const Vec (&x)[2]) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[0]));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[1]));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};
