// Linear layers within attention_layer and mlp_layer: what linear-inl.h computes on.

#pragma once

#include <cstdint>

namespace nest_fast {

// A product with a weight, whose rows are dense, of which `in` features are summed; and the weight as the product takes
// it, B of matrix-inl.h by NR columns: (groups, K steps, NR). bias may be null.
struct Linear {
  int64_t in, out;
  const void *weight, *bias;
  int64_t weight_stride;
  float* packed_b;
};

// weight is null where there is none.
struct Norm {
  const float *weight, *bias;
  float eps;
};

// Rows to which `scale` times the result is added; x is null where there are none.
template <class T>
struct Residual {
  const T* x = nullptr;
  int64_t stride = 0;
  float scale = 1;
};

// residual + scale * (norm(x) @ weight^T + bias). Rows are dense; strides are between them. Row r of what is multiplied
// is row x_index[r] of x, and row r of the product is row out_index[r] of out and the residual, r itself where there is
// no index. A negative one stands for a row of zeros, and for one that is not stored.
struct LinearLayer {
  Linear linear;
  Norm norm;
  Residual<void> residual;
  int64_t rows, x_stride;
  const void* x;
  void* out;
  const int64_t *x_index = nullptr, *out_index = nullptr;
  bool float_x = false, float_out = false;  // x, which is normalised; out and the residual
};

// Rows [first, first + rows): as many as are taken at a time in the backward.
struct Chunk {
  int64_t first, rows;
};

// Columns of a chunk's rows as an operand of products over rows, B of matrix-inl.h by NR columns: (groups, K steps,
// NR). data is null where nobody wants them.
struct PackedB {
  int64_t features;
  float* data;
};

// sums (outs, ins), NR times whole groups of both, is the gradient of a weight; that of its bias beside it. Null where
// it is not wanted.
struct WeightGradient {
  PackedB dout, x;
  float *sums, *bias_sums;
};

// The Linear is the product with a weight as it lies here, not transposed. dx is null where it is not wanted.
struct LinearBackward {
  Linear linear;
  int64_t dout_stride, x_stride;
  const void *dout, *x;
  void* dx;
  WeightGradient weight;
};

// Those for what holds a linear layer's memory, packed_linear.h and linear_gradient.h.
struct LinearKernels {
  int64_t mr, nr, vnni;  // rows and columns of the micro-kernel, elements of K in a step
  int64_t (*packed_floats)(int64_t in, int64_t out);
  void (*pack_weight)(const Linear&, int64_t begin, int64_t end);                            // groups of NR columns
  void (*pack_weight_transposed)(const Linear&, int64_t begin, int64_t end);                 // the same
  void (*weight_gradient)(const WeightGradient&, const Chunk&, int64_t begin, int64_t end);  // squares of NR x NR
  void (*round_sums)(const float*, int64_t stride, int64_t features, void* out, int64_t begin, int64_t end);  // rows
};

}  // namespace nest_fast
