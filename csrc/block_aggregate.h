// Block aggregation: what block_aggregate-inl.h computes on.

#pragma once

#include <cstdint>
#include <vector>

namespace nest_fast {

// An image, or the blocks of one: where each of its rows and columns begins, in elements. Channels are dense. Void is
// const where it is read.
template <class Void>
struct Image {
  Void* data = nullptr;
  int64_t batch = 0;
  std::vector<int64_t> rows, columns;

  template <class T>
  T* at(int64_t b, int64_t h, int64_t w) const {
    return static_cast<T*>(data) + b * batch + rows[h] + columns[w];
  }
};

// The forward: of x if it is given, else of the convolution's output given_y.
struct Aggregate {
  int64_t height, width, channels, out_channels;  // of x; C'
  int64_t before;                                 // padding of the pool above and on the left
  Image<const void> x, given_y, pos;              // pos.data is null where there is none
  Image<void> out;
  const float *filters, *conv_bias, *norm_weight, *norm_bias;
  float eps;
  // For the gradient, argmax.data null where none is wanted; y is that of x.
  float *mean, *rstd;
  Image<void> y, argmax;
  std::vector<float> zeros;  // the conv_bias where there is none
};

// The gradient down to the convolution's output.
struct NormPoolBackward {
  int64_t height, width, out_channels, before;
  Image<const void> dout, argmax, y;
  Image<void> dy;
  const float *conv_bias, *norm_weight, *mean, *rstd;
  float* partial_sums;  // (B, H, 3, C') of dnorm_weight, dnorm_bias, dconv_bias: the same for any number of threads
  std::vector<float> zeros;
};

struct Filters {
  const void* weight;
  int64_t stride[4];  // of output channels, input channels, rows, columns
  int64_t channels, out_channels;
  float* transformed;
};

struct BlockAggregateKernels {
  int64_t lanes, nr, vnni;  // of a vector, columns of the micro-kernel, elements of K in a step
  void (*transform_filters)(const Filters&, int64_t begin, int64_t end);       // groups of NR output channels
  void (*aggregate)(const Aggregate&, int64_t begin, int64_t end);             // rows of the output
  void (*convolve)(const Aggregate&, int64_t begin, int64_t end);              // pairs of rows
  void (*norm_pool)(const Aggregate&, int64_t begin, int64_t end);             // rows of the output
  void (*norm_pool_bwd)(const NormPoolBackward&, int64_t begin, int64_t end);  // rows of the convolution's output
};

}  // namespace nest_fast
