// blockify and its kin, plane by plane: out = in (+ pos), gathered by an index map, in every dtype of 1 to 16 bytes.

#if defined(NEST_FAST_BLOCKIFY_INL_H_) == defined(NEST_FAST_TOGGLE)
#ifdef NEST_FAST_BLOCKIFY_INL_H_
#undef NEST_FAST_BLOCKIFY_INL_H_
#else
#define NEST_FAST_BLOCKIFY_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "blockify.h"
#include "elements.h"
#include "isa/vector-inl.h"

NEST_FAST_BEGIN_ISA

// One plane of Planes, in T.
template <class T>
struct Plane {
  const T* in;
  const T* pos;
  T* out;
  Dim row;
  Dim run;
};

template <class T, int64_t BYTES>
void copy_short_runs(const Plane<T>& p) {
  for (int64_t j = 0; j < p.row.size; ++j) std::memcpy(p.out + j * p.row.out, p.in + j * p.row.in, BYTES);
}

template <int64_t BYTES>
using Unsigned = std::conditional_t<BYTES == 1, uint8_t, std::conditional_t<BYTES == 2, uint16_t, uint32_t>>;

// Elements of a and b, counted through both.
template <int... INDEX, class V>
V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, INDEX...);
#else
  return __builtin_shuffle(a, b, V{INDEX...});
#endif
}

// The transposition of 4 x 4 elements: reads 4 along `row` at 4 places along `run`, writes 4 along `run`.
template <class T>
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
template <class T>
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
inline void copy_blocks(const char* in, char* out, int64_t bytes) {
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) std::memcpy(out + i, in + i, 64);
  std::memcpy(out + i, in + i, bytes - i);
}

#if NEST_FAST_LEVEL > NEST_FAST_LEVEL_baseline
inline __m256i load_bytes(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline void store_bytes(char* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

inline void copy_bytes(const char* in, char* out, int64_t bytes) {
  if (bytes < 32) return copy_blocks(in, out, bytes);
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
    const int64_t last = std::min(i, bytes - 32);
    store_bytes(out + last, load_bytes(in + last));
  }
}
#else
inline void copy_bytes(const char* in, char* out, int64_t bytes) { copy_blocks(in, out, bytes); }
#endif

template <class T>
void copy_plane(const Plane<T>& p) {
  if (p.run.in == 1) {
    switch (p.run.size * sizeof(T)) {  // with a constant size a copy is one or two moves, not a call
      case 4: return copy_short_runs<T, 4>(p);
      case 8: return copy_short_runs<T, 8>(p);
      case 16: return copy_short_runs<T, 16>(p);
      case 32: return copy_short_runs<T, 32>(p);
      case 64: return copy_short_runs<T, 64>(p);
    }
    for (int64_t j = 0; j < p.row.size; ++j)
      copy_bytes(reinterpret_cast<const char*>(p.in + j * p.row.in), reinterpret_cast<char*>(p.out + j * p.row.out),
                 p.run.size * sizeof(T));
    return;
  }
  transpose_plane(p);
}

// out = in + pos, rounded once; n elements. `out` may be `in`.
template <class T>
void add_run(const T* in, const T* pos, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = sum_of(in[i], pos[i]);
}

#if NEST_FAST_LEVEL > NEST_FAST_LEVEL_baseline
template <>
void add_run(const Half* in, const Half* pos, Half* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, add(load(in + i), load(pos + i)));
  for (; i < n; ++i) out[i] = sum_of(in[i], pos[i]);
}

inline void add_neighbours(const BFloat16* in, const BFloat16* pos, BFloat16* out) {
  Vec x[2], y[2];
  load_neighbours(in, x);
  load_neighbours(pos, y);
  for (int i = 0; i < 2; ++i) x[i] = add(x[i], y[i]);
  store_neighbours(out, x);
}

template <>
void add_run(const BFloat16* in, const BFloat16* pos, BFloat16* out, int64_t n) {
  constexpr int64_t width = 2 * kLanes;
  int64_t i = 0;
  for (; i + width <= n; i += width) add_neighbours(in + i, pos + i, out + i);
  if (i == n) return;
  BFloat16 x[width] = {}, y[width] = {};
  std::memcpy(x, in + i, (n - i) * sizeof(BFloat16));
  std::memcpy(y, pos + i, (n - i) * sizeof(BFloat16));
  add_neighbours(x, y, x);
  std::memcpy(out + i, x, (n - i) * sizeof(BFloat16));
}
#endif

template <class T>
void add_plane(const Plane<T>& p) {
  const bool strided = p.run.in != 1;
  if (strided) transpose_plane(p);  // then the plane is in cache
  for (int64_t j = 0; j < p.row.size; ++j) {
    T* out = p.out + j * p.row.out;
    const T* in = strided ? out : p.in + j * p.row.in;
    const T* pos = p.pos + j * p.row.pos;
    if (p.run.pos == 1) {
      add_run(in, pos, out, p.run.size);
    } else {  // of a single channel
      for (int64_t i = 0; i < p.run.size; ++i) out[i] = sum_of(in[i], pos[i * p.run.pos]);
    }
  }
}

// Runs through the planes of `map` in order, from the one that begins with element number `index`.
class Cursor {
 public:
  Cursor(const IndexMap& map, int64_t index) : offsets(map.at(index)), map_(map), dims_(std::max(0, map.rank() - 2)) {
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

  Offsets offsets;

 private:
  void move(const Dim& dim, int64_t steps) {
    offsets.in += steps * dim.in;
    offsets.pos += steps * dim.pos;
    offsets.out += steps * dim.out;
  }

  const IndexMap& map_;
  const int dims_;
  int64_t i_[IndexMap::kMaxRank] = {};
};

template <class T, void (*WORK)(const Plane<T>&)>
void fill_planes(const Planes& p, int64_t begin, int64_t end) {
  const T *in = static_cast<const T*>(p.in), *pos = static_cast<const T*>(p.pos);
  T* out = static_cast<T*>(p.out);
  for (Cursor cursor(p.map, begin * p.row.size * p.run.size); begin < end; ++begin, cursor.next()) {
    const Offsets& at = cursor.offsets;
    WORK({in + at.in, pos ? pos + at.pos : nullptr, out + at.out, p.row, p.run});
  }
}

template <class T>
constexpr BlockifyKernels::Fill kCopy = fill_planes<T, copy_plane<T>>;
template <class T>
constexpr BlockifyKernels::Fill kAdd = fill_planes<T, add_plane<T>>;

struct Wide {
  uint64_t half[2];
};

template <class Float = float>  // a template: only what a table takes is compiled
constexpr BlockifyKernels kBlockify = {kCopy<uint8_t>, kCopy<uint16_t>, kCopy<uint32_t>, kCopy<uint64_t>, kCopy<Wide>,
                                       kAdd<double>,   kAdd<Float>,     kAdd<Half>,      kAdd<BFloat16>};

NEST_FAST_END_ISA

#endif  // per-target include guard
