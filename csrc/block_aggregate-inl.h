// max_pool(layer_norm(conv3x3(x) + bias)) + pos_embed, row by row: every row of the convolution's output is normalised
// once, while it is in cache, and serves the two or three rows of windows that it lies in.
//
// The convolution is Winograd's F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR
// 2016, arXiv 1509.09308): 16 products of matrices (tiles x C) @ (C x C') where the direct form needs 36, and its
// shorter sums are more accurate in float32. A value that is not finite reaches no pixel that it would not reach there.
//
// Tiles are packed as A of matrix-inl.h; filters as B, (groups of NR of C', 16, K steps, NR).

#if defined(NEST_FAST_BLOCK_AGGREGATE_INL_H_) == defined(NEST_FAST_TOGGLE)
#ifdef NEST_FAST_BLOCK_AGGREGATE_INL_H_
#undef NEST_FAST_BLOCK_AGGREGATE_INL_H_
#else
#define NEST_FAST_BLOCK_AGGREGATE_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "block_aggregate.h"
#include "isa/vector-inl.h"
#include "math-inl.h"
#include "matrix-inl.h"
#include "scratch.h"
#include "sizes.h"

NEST_FAST_BEGIN_ISA

constexpr int64_t kConvolutionKC = 256;

// --- the convolution -------------------------------------------------------------------------------------------------

// G g G^T of the filters g, for groups [begin, end) of NR output channels.
template <class Op>
void transform_filters(const Filters& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  const int64_t k_steps = round_up(ceil_div(p.channels, Op::kVnni), kLanes);
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t part = 2 * begin; part < 2 * end; ++part) {
    const int64_t outputs = std::clamp<int64_t>(p.out_channels - part * kLanes, 0, kLanes);
    float* to = p.transformed + part / 2 * 16 * k_steps * kNR + part % 2 * kLanes;
    for (int64_t k = 0; k < k_steps; ++k, to += kNR) {
      Vec transformed[16][Op::kVnni];
      for (int j = 0; j < Op::kVnni; ++j) {
        T gathered[9][kLanes] = {};
        const int64_t channel = k * Op::kVnni + j;
        const T* from = weight + part * kLanes * p.stride[0] + channel * p.stride[1];
        if (channel < p.channels)
          for (int64_t o = 0; o < outputs; ++o, from += p.stride[0])
            for (int tap = 0; tap < 9; ++tap) gathered[tap][o] = from[tap / 3 * p.stride[2] + tap % 3 * p.stride[3]];
        const Vec half = broadcast(0.5f);
        Vec columns[4][3];  // G g
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          const Vec first = load(gathered[i]), middle = load(gathered[3 + i]), last = load(gathered[6 + i]);
          const Vec ends = mul(add(first, last), half);
          columns[0][i] = first;
          columns[1][i] = mul_add(middle, half, ends);
          columns[2][i] = sub(ends, mul(middle, half));
          columns[3][i] = last;
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vec ends = mul(add(columns[i][0], columns[i][2]), half);
          transformed[4 * i][j] = columns[i][0];
          transformed[4 * i + 1][j] = mul_add(columns[i][1], half, ends);
          transformed[4 * i + 2][j] = sub(ends, mul(columns[i][1], half));
          transformed[4 * i + 3][j] = columns[i][2];
        }
      }
      for (int xi = 0; xi < 16; ++xi) store(to + xi * k_steps * kNR, Op::interleave(transformed[xi]));
    }
  }
}

// B^T d B of one tile d of 4 x 4 pixels; number xi of the 16 results goes to v + xi * step.
template <class Op>
inline void transform_tile(const typename Op::Element* const (&d)[4][4], int64_t channels, float* v, int64_t step) {
  for (int64_t c = 0; c < channels; v += kPanelA) {
    Vec transformed[16][Op::kVnni];
#pragma GCC unroll 2
    for (int j = 0; j < Op::kVnni; ++j, c += kLanes) {
      Vec rows[4][4];  // B^T d
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec d0 = load_part(d[0][i] + c, channels - c), d1 = load_part(d[1][i] + c, channels - c);
        const Vec d2 = load_part(d[2][i] + c, channels - c), d3 = load_part(d[3][i] + c, channels - c);
        rows[0][i] = sub(d0, d2);
        rows[1][i] = add(d1, d2);
        rows[2][i] = sub(d2, d1);
        rows[3][i] = sub(d1, d3);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        transformed[4 * i][j] = sub(rows[i][0], rows[i][2]);
        transformed[4 * i + 1][j] = add(rows[i][1], rows[i][2]);
        transformed[4 * i + 2][j] = sub(rows[i][2], rows[i][1]);
        transformed[4 * i + 3][j] = sub(rows[i][1], rows[i][3]);
      }
    }
#pragma GCC unroll 16
    for (int xi = 0; xi < 16; ++xi) store(v + xi * step, Op::from_floats(transformed[xi]));
  }
}

// A^T m A of one tile: 2 x 2 pixels of a vector of channels. Number xi of its 16 parts is at m + xi * step.
inline void transform_back(const float* m, int64_t step, float* y, int64_t row_stride, int64_t pixel_stride) {
  Vec rows[2][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec m0 = load(m + i * step), m1 = load(m + (4 + i) * step);
    const Vec m2 = load(m + (8 + i) * step), m3 = load(m + (12 + i) * step);
    rows[0][i] = add(add(m0, m1), m2);
    rows[1][i] = sub(sub(m1, m2), m3);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    store(y + i * row_stride, add(add(rows[i][0], rows[i][1]), rows[i][2]));
    store(y + i * row_stride + pixel_stride, sub(sub(rows[i][1], rows[i][2]), rows[i][3]));
  }
}

// The convolution's output, some rows at a time.
template <class Op>
class Winograd {
  using T = typename Op::Element;

 public:
  static constexpr bool kComputes = true;

  explicit Winograd(const Aggregate& p)
      : p_(p),
        tile_columns_(p.width / 2),
        // As many rows at a time as fill two tiles of MR, over which the filters then pass once.
        tile_rows_(std::min(p.height / 2, ceil_div(2 * kMR, tile_columns_))),
        k_steps_(round_up(ceil_div(p.channels, Op::kVnni), kLanes)),
        stride_(round_up(p.out_channels, kNR)),
        memory_{{&v_, 16 * k_steps_ * round_up(tiles(), kMR)}, {&m_, 16 * kNR * tiles()}, {&y_, 4 * tiles() * stride_}},
        zeros_(new T[p.channels]()) {}

  int64_t stride() const { return stride_; }  // of pixels in a row, in floats

  // Row h of image b; rows up to `last` will be wanted.
  const float* row(int64_t b, int64_t h, int64_t last) {
    const int64_t tile_row = h / 2;
    if (b != image_ || tile_row < first_ || tile_row >= end_) {
      image_ = b, first_ = tile_row, end_ = std::min(tile_row + tile_rows_, last / 2 + 1);
      compute();
    }
    return y_ + (h - 2 * first_) * p_.width * stride_;
  }

 private:
  int64_t tiles() const { return tile_rows_ * tile_columns_; }

  void compute() {
    const int64_t tiles = (end_ - first_) * tile_columns_, groups = ceil_div(tiles, kMR);
    const int64_t rows = ceil_div(tiles, groups), group = k_steps_ * kMR;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const T* d[4][4];
      const int64_t h = 2 * (first_ + tile / tile_columns_) - 1, w = 2 * (tile % tile_columns_) - 1;
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
          const bool inside = h + i >= 0 && h + i < p_.height && w + j >= 0 && w + j < p_.width;
          d[i][j] = inside ? p_.x.template at<const T>(image_, h + i, w + j) : zeros_.get();
        }
      transform_tile<Op>(d, p_.channels, v_ + tile / rows * group + tile % rows * kLanes, groups * group);
    }
    const float* filters = p_.filters;
    const Shares next(k_steps_ * kNR, k_steps_, groups);
    for (int64_t c = 0; c < stride_; c += kNR) {
      for (int xi = 0; xi < 16; ++xi, filters += k_steps_ * kNR) {
        const bool last = xi == 15 && c + kNR >= stride_;
        for (int64_t i = 0; i < groups; ++i)
          multiply<Op>(std::min(rows, tiles - i * rows), v_ + (xi * groups + i) * group, filters, kNR, k_steps_,
                       kConvolutionKC, {m_ + (xi * tiles + i * rows) * kNR, kNR, kLanes},
                       last ? Ahead{} : next.of(filters + k_steps_ * kNR, i));
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = tile / tile_columns_, column = tile % tile_columns_;
        float* y = y_ + (2 * row * p_.width + 2 * column) * stride_ + c;
        for (int half = 0; half < 2; ++half)
          transform_back(m_ + tile * kNR + half * kLanes, tiles * kNR, y + half * kLanes, p_.width * stride_, stride_);
      }
    }
  }

  const Aggregate& p_;
  const int64_t tile_columns_, tile_rows_, k_steps_, stride_;
  float *v_, *m_, *y_;
  const Scratch memory_;
  const std::unique_ptr<T[]> zeros_;
  int64_t image_ = -1, first_ = 0, end_ = 0;
};

// The convolution's output as somebody else computed it.
template <class T>
class Given {
 public:
  static constexpr bool kComputes = false;

  explicit Given(const Aggregate& p) : p_(p) {}
  int64_t stride() const { return p_.given_y.columns[1]; }
  const T* row(int64_t b, int64_t h, int64_t) const { return p_.given_y.at<const T>(b, h, 0); }

 private:
  const Aggregate& p_;
};

// --- what follows it -------------------------------------------------------------------------------------------------

using Ints = decltype(Vec{} < Vec{});
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

inline Ints load_bytes(const uint8_t* p, int64_t count = kLanes) {
  Bytes bytes = {};
  std::memcpy(&bytes, p, count >= kLanes ? kLanes : count);
  return __builtin_convertvector(bytes, Ints);
}

inline void store_bytes(uint8_t* p, Ints x, int64_t count = kLanes) {
  const Bytes bytes = __builtin_convertvector(x, Bytes);
  std::memcpy(p, &bytes, count >= kLanes ? kLanes : count);
}

// The largest so far and its index in the window, as max_pool2d has it: the first of equals, and NaN over all.
struct Largest {
  Vec value;
  Ints index;

  template <bool WITH_INDEX>
  void take(Vec x, Ints x_index) {
    const Ints larger = (x > value) | (x != x);
    value = larger ? x : value;
    if constexpr (WITH_INDEX) index = larger ? x_index : index;
  }
};

// Three rows of windows' maxima along the width, each of a normalised row of the convolution's output.
template <class T, bool TRAINING>
class Pool {
 public:
  explicit Pool(const Aggregate& p)
      : p_(p),
        stride_(round_up(p.out_channels, kLanes)),
        memory_{{&z_, p.width * stride_}, {&maxima_, p.width / 2 * 3 * stride_}},
        argmax_(new uint8_t[TRAINING ? 3 * p.width / 2 * stride_ : 0]) {}

  // Row h of the convolution's output; `is_mine` if what the gradient needs of it is this thread's to write.
  template <class Source>
  void add_row(Source& source, int64_t b, int64_t h, int64_t last, bool is_mine) {
    const auto* y = source.row(b, h, last);
    for (int64_t w = 0; w < p_.width; ++w) normalise<Source::kComputes>(y + w * source.stride(), b, h, w, is_mine);
    float* maxima = maxima_ + h % 3 * p_.width / 2 * stride_;
    uint8_t* argmax = argmax_.get() + h % 3 * p_.width / 2 * stride_;
    const int64_t before = p_.before;
    for (int64_t j = 0; j < p_.width / 2; ++j) {
      const int64_t start = 2 * j - before, first = std::max<int64_t>(0, start), end = std::min(start + 3, p_.width);
      for (int64_t c = 0; c < stride_; c += kLanes) {
        Largest largest{load(z_ + first * stride_ + c), Ints{} + static_cast<int>(first - start)};
        for (int64_t w = first + 1; w < end; ++w)
          largest.take<TRAINING>(load(z_ + w * stride_ + c), Ints{} + static_cast<int>(w - start));
        store(maxima + j * stride_ + c, largest.value);
        if constexpr (TRAINING) store_bytes(argmax + j * stride_ + c, largest.index);
      }
    }
  }

  // Row i of the output, from its three rows (two where the third would be padding).
  void write_row(int64_t b, int64_t i) const {
    const int64_t start = 2 * i - p_.before, first = std::max<int64_t>(0, start), end = std::min(start + 3, p_.height);
    for (int64_t j = 0; j < p_.width / 2; ++j) {
      T* out = p_.out.at<T>(b, i, j);
      const T* pos = p_.pos.data ? p_.pos.at<const T>(0, i, j) : nullptr;
      for (int64_t c = 0; c < p_.out_channels; c += kLanes) {
        Largest largest = at(first, start, j, c);
        for (int64_t h = first + 1; h < end; ++h) {
          const Largest other = at(h, start, j, c);
          largest.take<TRAINING>(other.value, other.index);
        }
        const int64_t count = p_.out_channels - c;
        store_part(out + c, count, pos ? add(largest.value, load_part(pos + c, count)) : largest.value);
        if constexpr (TRAINING) store_bytes(p_.argmax.at<uint8_t>(b, i, j) + c, largest.index, count);
      }
    }
  }

 private:
  template <bool COMPUTED, class S>
  void normalise(const S* y, int64_t b, int64_t h, int64_t w, bool is_mine) {
    const int64_t channels = p_.out_channels;
    float* z = z_ + w * stride_;
    for (int64_t c = 0; c < stride_; c += kLanes) {
      const Vec given = load_part(y + c, channels - c);
      if (TRAINING && COMPUTED && is_mine) store_part(p_.y.at<T>(b, h, w) + c, channels - c, given);
      store(z + c, add(given, load_part(p_.conv_bias + c, channels - c)));
    }
    const auto [mean, rstd] = layer_norm(z, channels, p_.norm_weight, p_.norm_bias, p_.eps);
    if (TRAINING && is_mine) {
      const int64_t pixel = (b * p_.height + h) * p_.width + w;
      p_.mean[pixel] = mean;
      p_.rstd[pixel] = rstd;
    }
  }

  Largest at(int64_t h, int64_t start, int64_t j, int64_t c) const {
    const int64_t offset = (h % 3 * p_.width / 2 + j) * stride_ + c;
    Largest largest{load(maxima_ + offset), {}};
    if constexpr (TRAINING) largest.index = load_bytes(argmax_.get() + offset) + static_cast<int>(3 * (h - start));
    return largest;
  }

  const Aggregate& p_;
  const int64_t stride_;
  float *z_, *maxima_;
  const Scratch memory_;
  const std::unique_ptr<uint8_t[]> argmax_;
};

template <class T, bool TRAINING, class Source>
void pool_rows(const Aggregate& p, int64_t begin, int64_t end) {
  const int64_t out_height = p.height / 2;
  Source source(p);
  Pool<T, TRAINING> pool(p);
  for (int64_t b = begin / out_height; b * out_height < end; ++b) {
    const int64_t first = std::max<int64_t>(0, begin - b * out_height);
    const int64_t stop = std::min(end - b * out_height, out_height);
    const int64_t last = std::min(p.height, 2 * stop + 1 - p.before) - 1;
    int64_t h = std::max<int64_t>(0, 2 * first - p.before);
    for (int64_t i = first; i < stop; ++i) {
      for (; h < std::min(2 * i + 3 - p.before, p.height); ++h)
        pool.add_row(source, b, h, last, h / 2 >= first && h / 2 < stop);
      pool.write_row(b, i);
    }
  }
}

// Rows [begin, end) of the output, counted through all images.
template <class Op>
void aggregate(const Aggregate& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  (p.argmax.data ? pool_rows<T, true, Winograd<Op>> : pool_rows<T, false, Winograd<Op>>)(p, begin, end);
}

template <class T>
void norm_pool(const Aggregate& p, int64_t begin, int64_t end) {
  (p.argmax.data ? pool_rows<T, true, Given<T>> : pool_rows<T, false, Given<T>>)(p, begin, end);
}

// Rows [begin, end) of the convolution's output alone, counted in pairs through all images, to `out`.
template <class Op>
void convolve(const Aggregate& p, int64_t begin, int64_t end) {
  using T = typename Op::Element;
  Winograd<Op> source(p);
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t b = pair / (p.height / 2), first = pair % (p.height / 2) * 2;
    const int64_t last = std::min(first + 2 * (end - pair), p.height) - 1;
    for (int64_t h = first; h < first + 2; ++h) {
      const float* y = source.row(b, h, last);
      for (int64_t w = 0; w < p.width; ++w, y += source.stride()) {
        T* out = p.out.at<T>(b, h, w);
        for (int64_t c = 0; c < p.out_channels; c += kLanes) store_part(out + c, p.out_channels - c, load(y + c));
      }
    }
  }
}

// --- its gradient ----------------------------------------------------------------------------------------------------

// Rows [begin, end) of the convolution's output, counted through all images.
template <class T>
void norm_pool_bwd(const NormPoolBackward& p, int64_t begin, int64_t end) {
  const int64_t channels = p.out_channels, stride = round_up(channels, kLanes);
  // Of dnorm_weight, dnorm_bias, dconv_bias; gradient of the normalised pixel before its scale and shift; that pixel.
  const auto [sums, dz, z] = scratch(3 * stride, stride, stride);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.height, h = row % p.height;
    std::fill(sums, sums + 3 * stride, 0.f);
    for (int64_t w = 0; w < p.width; ++w) {
      // The windows that a pixel lies in, and its index in them: one or two in each direction.
      struct {
        const T* dout;
        const uint8_t* argmax;
        int index;
      } windows[4];
      int count = 0;
      for (int64_t i = (h + p.before) / 2; i >= 0 && 2 * i - p.before + 3 > h; --i)
        for (int64_t j = (w + p.before) / 2; j >= 0 && 2 * j - p.before + 3 > w; --j)
          if (i < p.height / 2 && j < p.width / 2)
            windows[count++] = {p.dout.at<const T>(b, i, j), p.argmax.at<const uint8_t>(b, i, j),
                                static_cast<int>(3 * (h - 2 * i + p.before) + w - 2 * j + p.before)};
      const int64_t pixel = (b * p.height + h) * p.width + w;
      const Vec mean = broadcast(p.mean[pixel]), rstd = broadcast(p.rstd[pixel]);
      const T* y = p.y.at<const T>(b, h, w);
      Vec total = zero(), dot = zero();
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t left = channels - c;
        Vec dpool = zero();
        for (int i = 0; i < count; ++i) {
          const Ints chosen = load_bytes(windows[i].argmax + c, left) == windows[i].index;
          dpool = add(dpool, chosen ? load_part(windows[i].dout + c, left) : zero());
        }
        const Vec shifted = sub(add(load_part(y + c, left), load_part(p.conv_bias + c, left)), mean);
        const Vec normalised = mul(shifted, rstd), scaled = mul(dpool, load_part(p.norm_weight + c, left));
        store(z + c, normalised);
        store(dz + c, scaled);
        total = add(total, scaled);
        dot = mul_add(scaled, normalised, dot);
        store(sums + c, mul_add(dpool, normalised, load(sums + c)));
        store(sums + stride + c, add(dpool, load(sums + stride + c)));
      }
      const Vec mean_total = broadcast(sum(total) / channels), mean_dot = broadcast(sum(dot) / channels);
      T* dy = p.dy.at<T>(b, h, w);
      for (int64_t c = 0; c < channels; c += kLanes) {
        const Vec rest = sub(load(dz + c), mul_add(load(z + c), mean_dot, mean_total));
        const Vec gradient = mul(rest, rstd);
        store_part(dy + c, channels - c, gradient);
        store(sums + 2 * stride + c, add(gradient, load(sums + 2 * stride + c)));
      }
    }
    for (int i = 0; i < 3; ++i) std::copy_n(sums + i * stride, channels, p.partial_sums + (3 * row + i) * channels);
  }
}

template <class Op>
constexpr BlockAggregateKernels kBlockAggregate = {kLanes,
                                                   kNR,
                                                   Op::kVnni,
                                                   transform_filters<Op>,
                                                   aggregate<Op>,
                                                   convolve<Op>,
                                                   norm_pool<typename Op::Element>,
                                                   norm_pool_bwd<typename Op::Element>};

NEST_FAST_END_ISA

#endif  // per-target include guard
