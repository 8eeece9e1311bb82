// blockify and its kin on the CPU: every dtype of 1 to 16 bytes, any strides, one pass over memory.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "blockify_ops.h"

namespace nest_fast {
namespace {

// The two innermost dimensions: `row.size` runs of `run.size` elements each, contiguous in the output.
template <typename T>
struct Plane {
  const T* in;
  const T* pos;  // null without a position embedding
  T* out;
  Dim row;
  Dim run;
};

template <typename T, int64_t kBytes>
void copy_short_runs(const Plane<T>& p) {
  for (int64_t j = 0; j < p.row.size; ++j) std::memcpy(p.out + j * p.row.out, p.in + j * p.row.in, kBytes);
}

template <int64_t kBytes>
using Unsigned = std::conditional_t<kBytes == 1, uint8_t, std::conditional_t<kBytes == 2, uint16_t, uint32_t>>;

// Elements of a and b, counted through both.
template <int... kIndex, typename V>
V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, V{kIndex...});
#endif
}

// The transposition of 4 x 4 elements: reads 4 along `row` at 4 places along `run`, writes 4 along `run`.
template <typename T>
void transpose_4x4(const T* in, int64_t in_run, T* out, int64_t out_row) {
  using V __attribute__((vector_size(4 * sizeof(T)))) = Unsigned<sizeof(T)>;
  V a, b, c, d;
  std::memcpy(&a, in, sizeof(V));
  std::memcpy(&b, in + in_run, sizeof(V));
  std::memcpy(&c, in + 2 * in_run, sizeof(V));
  std::memcpy(&d, in + 3 * in_run, sizeof(V));
  const V ab_low = shuffle<0, 4, 1, 5>(a, b), ab_high = shuffle<2, 6, 3, 7>(a, b);
  const V cd_low = shuffle<0, 4, 1, 5>(c, d), cd_high = shuffle<2, 6, 3, 7>(c, d);
  a = shuffle<0, 1, 4, 5>(ab_low, cd_low);
  b = shuffle<2, 3, 6, 7>(ab_low, cd_low);
  c = shuffle<0, 1, 4, 5>(ab_high, cd_high);
  d = shuffle<2, 3, 6, 7>(ab_high, cd_high);
  std::memcpy(out, &a, sizeof(V));
  std::memcpy(out + out_row, &b, sizeof(V));
  std::memcpy(out + 2 * out_row, &c, sizeof(V));
  std::memcpy(out + 3 * out_row, &d, sizeof(V));
}

// An image with channels first: in[i * run.in + j] goes to out[j * row.out + i].
template <typename T>
void transpose_plane(const Plane<T>& p) {
  int64_t begin = 0;
  if constexpr (sizeof(T) <= 4) {
    if (p.row.in == 1 && p.row.size >= 4 && p.run.size >= 4) {
      for (int64_t j = 0; j < p.row.size; j += 4) {
        j = std::min(j, p.row.size - 4);  // the last tile may overlap the one before
        for (int64_t i = 0; i + 4 <= p.run.size; i += 4) {
          transpose_4x4(p.in + j + i * p.run.in, p.run.in, p.out + j * p.row.out + i, p.row.out);
        }
      }
      begin = p.run.size & ~int64_t{3};
    }
  }
  for (int64_t j = 0; j < p.row.size; ++j) {
    for (int64_t i = begin; i < p.run.size; ++i) {
      p.out[j * p.row.out + i] = p.in[j * p.row.in + i * p.run.in];
    }
  }
}

// memcpy, but not a call to it: for some kB that uses the processor's string move, which is slow where the output is
// fresh memory, faulting in page by page.
inline void copy_baseline(const char* in, char* out, int64_t bytes) {
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) std::memcpy(out + i, in + i, 64);
  std::memcpy(out + i, in + i, bytes - i);
}

#if defined(__x86_64__)
#define NEST_FAST_AVX2 __attribute__((target("avx2,f16c")))
#define NEST_FAST_AVX512 __attribute__((target("avx512f,avx512bw")))

const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");

NEST_FAST_AVX2 inline __m256i load_bytes(const char* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

NEST_FAST_AVX2 inline void store_bytes(char* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

NEST_FAST_AVX2 void copy_avx2(const char* in, char* out, int64_t bytes) {
  if (bytes < 32) return copy_baseline(in, out, bytes);
  int64_t i = 0;
  for (; i + 128 <= bytes; i += 128) {  // loads before stores: a tenth faster than in turns, and than wider moves
    const __m256i a = load_bytes(in + i), b = load_bytes(in + i + 32);
    const __m256i c = load_bytes(in + i + 64), d = load_bytes(in + i + 96);
    store_bytes(out + i, a);
    store_bytes(out + i + 32, b);
    store_bytes(out + i + 64, c);
    store_bytes(out + i + 96, d);
  }
  for (; i < bytes; i += 32) {  // the last move may overlap the one before
    const int64_t at = std::min(i, bytes - 32);
    store_bytes(out + at, load_bytes(in + at));
  }
}
#endif

template <typename T>
void copy_run(const T* in, T* out, int64_t n) {
  const auto* from = reinterpret_cast<const char*>(in);
  auto* to = reinterpret_cast<char*>(out);
#if defined(__x86_64__)
  if (has_avx2) return copy_avx2(from, to, n * sizeof(T));
#endif
  copy_baseline(from, to, n * sizeof(T));
}

template <typename T>
void copy_plane(const Plane<T>& p) {
  if (p.run.in == 1) {
    switch (p.run.size * sizeof(T)) {  // with a constant size a copy is one or two moves, not a call
      case 4: return copy_short_runs<T, 4>(p);
      case 8: return copy_short_runs<T, 8>(p);
      case 16: return copy_short_runs<T, 16>(p);
      case 32: return copy_short_runs<T, 32>(p);
      case 64: return copy_short_runs<T, 64>(p);
    }
    for (int64_t j = 0; j < p.row.size; ++j) copy_run(p.in + j * p.row.in, p.out + j * p.row.out, p.run.size);
    return;
  }
  transpose_plane(p);
}

// out = in + pos, rounded once; n elements. `out` may be `in`.
template <typename T>
void add_baseline(const T* in, const T* pos, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] + pos[i];
}

#if defined(__x86_64__)
template <typename T>
NEST_FAST_AVX2 void add_avx2(const T* in, const T* pos, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] + pos[i];
}

NEST_FAST_AVX2 inline __m256 load(const c10::Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <>
NEST_FAST_AVX2 void add_avx2(const c10::Half* in, const c10::Half* pos, c10::Half* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 sum = _mm256_add_ps(load(in + i), load(pos + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
  }
  add_baseline(in + i, pos + i, out + i, n - i);
}

// To bfloat16 in the upper half of each lane: nearest even, and NaN stays NaN. The lower half is left over.
NEST_FAST_AVX2 inline __m256i round_bfloat16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}

template <>
NEST_FAST_AVX2 void add_avx2(const c10::BFloat16* in, const c10::BFloat16* pos, c10::BFloat16* out, int64_t n) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {  // of two neighbours in a lane each is a float once the other is shifted or masked out
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pos + i));
    const __m256 even = _mm256_add_ps(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
                                      _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)));
    const __m256 odd = _mm256_add_ps(_mm256_castsi256_ps(_mm256_and_si256(a, upper)),
                                     _mm256_castsi256_ps(_mm256_and_si256(b, upper)));
    const __m256i low = _mm256_srli_epi32(round_bfloat16(even), 16);
    const __m256i sum = _mm256_blend_epi16(low, round_bfloat16(odd), 0b10101010);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), sum);
  }
  add_baseline(in + i, pos + i, out + i, n - i);
}

// The same with fewer instructions, of which there are enough to matter. Not vcvtneps2bf16, which drops subnormals.
NEST_FAST_AVX512 inline __m512i round_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i down = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_mask_add_epi32(down, odd, bits, _mm512_set1_epi32(0x8000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}

NEST_FAST_AVX512 void add_avx512(const c10::BFloat16* in, const c10::BFloat16* pos, c10::BFloat16* out, int64_t n) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512i a = _mm512_loadu_si512(in + i);
    const __m512i b = _mm512_loadu_si512(pos + i);
    const __m512 even = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                                      _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)));
    const __m512 odd = _mm512_add_ps(_mm512_castsi512_ps(_mm512_and_si512(a, upper)),
                                     _mm512_castsi512_ps(_mm512_and_si512(b, upper)));
    const __m512i low = _mm512_srli_epi32(round_bfloat16(even), 16);
    _mm512_storeu_si512(out + i, _mm512_mask_blend_epi16(0xaaaaaaaa, low, round_bfloat16(odd)));
  }
  add_avx2(in + i, pos + i, out + i, n - i);
}
#endif

template <typename T>
void add(const T* in, const T* pos, T* out, int64_t n) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (has_avx512) return add_avx512(in, pos, out, n);
  }
  if (has_avx2) return add_avx2(in, pos, out, n);
#endif
  add_baseline(in, pos, out, n);
}

template <typename T>
void add_plane(const Plane<T>& p) {
  const bool strided = p.run.in != 1;
  if (strided) transpose_plane(p);  // then the plane is in cache
  for (int64_t j = 0; j < p.row.size; ++j) {
    T* out = p.out + j * p.row.out;
    const T* in = strided ? out : p.in + j * p.row.in;
    const T* pos = p.pos + j * p.row.pos;
    if (p.run.pos == 1) {
      add(in, pos, out, p.run.size);
    } else {  // of a single channel
      for (int64_t i = 0; i < p.run.size; ++i) out[i] = in[i] + pos[i * p.run.pos];
    }
  }
}

// Runs through the planes of `map` in order, from the one that begins with element number `index`.
class Cursor {
 public:
  Cursor(const IndexMap& map, int64_t index) : at(map.at(index)), map_(map), dims_(std::max(0, map.rank() - 2)) {
    map.decompose(index, [&](int d, int64_t i) { i_[d] = i; });
  }

  void next() {
    for (int d = dims_ - 1; d >= 0; --d) {
      move(map_.dim(d), 1);
      if (++i_[d] < map_.dim(d).size) return;
      move(map_.dim(d), -i_[d]);
      i_[d] = 0;
    }
  }

  Offsets at;

 private:
  void move(const Dim& dim, int64_t steps) {
    at.in += steps * dim.in;
    at.pos += steps * dim.pos;
    at.out += steps * dim.out;
  }

  const IndexMap& map_;
  const int dims_;
  int64_t i_[IndexMap::kMaxRank] = {};
};

template <typename T, void (*work)(const Plane<T>&)>
void fill_planes(IndexMap map, const Tensor& in, const std::optional<Tensor>& pos, const Tensor& out) {
  const auto* in_data = static_cast<const T*>(in.const_data_ptr());
  const auto* pos_data = pos ? static_cast<const T*>(pos->const_data_ptr()) : nullptr;
  auto* out_data = static_cast<T*>(out.mutable_data_ptr());
  const int last = map.rank() - 1;
  if (map.dim(last).size < 16) {  // patches: short runs cost least in a plane of many
    int longest = last - 1;
    for (int d = last - 2; d >= std::max(0, last - 3); --d) {
      if (map.dim(d).size > map.dim(longest).size) longest = d;
    }
    if (longest >= 0) map.move(longest, last - 1);
  }
  const Dim run = map.dim(last);
  const Dim row = last > 0 ? map.dim(last - 1) : Dim{1, 0, 0, 0};
  constexpr int64_t kGrain = 32768;  // elements worth a thread, as in torch
  const int64_t plane = row.size * run.size;
  const int64_t grain = std::max<int64_t>(1, kGrain / plane);
  torch::stable::parallel_for(0, map.numel() / plane, grain, [&](int64_t begin, int64_t end) {
    for (Cursor cursor(map, begin * plane); begin < end; ++begin, cursor.next()) {
      const Offsets& at = cursor.at;
      work({in_data + at.in, pos_data ? pos_data + at.pos : nullptr, out_data + at.out, row, run});
    }
  });
}

struct Wide {
  uint64_t half[2];
};

void fill(const IndexMap& map, const Tensor& in, const std::optional<Tensor>& pos, const Tensor& out) {
  using torch::headeronly::ScalarType;
  if (pos) {
    switch (in.scalar_type()) {
      case ScalarType::Float: return fill_planes<float, add_plane>(map, in, pos, out);
      case ScalarType::Double: return fill_planes<double, add_plane>(map, in, pos, out);
      case ScalarType::Half: return fill_planes<c10::Half, add_plane>(map, in, pos, out);
      case ScalarType::BFloat16: return fill_planes<c10::BFloat16, add_plane>(map, in, pos, out);
      default: STD_TORCH_CHECK(false, "pos_embed: wanted float64, float32, float16 or bfloat16");
    }
  }
  switch (in.element_size()) {
    case 1: return fill_planes<uint8_t, copy_plane>(map, in, pos, out);
    case 2: return fill_planes<uint16_t, copy_plane>(map, in, pos, out);
    case 4: return fill_planes<uint32_t, copy_plane>(map, in, pos, out);
    case 8: return fill_planes<uint64_t, copy_plane>(map, in, pos, out);
    case 16: return fill_planes<Wide, copy_plane>(map, in, pos, out);
    default: STD_TORCH_CHECK(false, "x: wanted elements of 1, 2, 4, 8 or 16 bytes");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CPU, m) { register_ops(m); }

}  // namespace nest_fast
