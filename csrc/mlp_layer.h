// The MLP half of a transformer layer: what mlp_layer-inl.h computes on.

#pragma once

#include <cstdint>

#include "linear.h"

namespace nest_fast {

enum Activation { kGelu, kGeluTanh };

struct MlpLayer {
  Linear fc1, fc2;
  Norm norm;
  Activation activation;
  int64_t rows, x_stride;
  float branch_scale;
  const void* x;
  void* out;
  void* hidden;  // fc1's output, or null where it is not wanted
};

struct MlpLayerBackward {
  Linear fc1, fc2;  // as in LinearBackward
  Activation activation;
  int64_t dout_stride, x_stride;
  const void *dout, *x, *hidden;
  void* dx;
  WeightGradient fc1_weight, fc2_weight;
};

struct MlpLayerKernels {
  LinearKernels packing;
  void (*mlp_layer)(const MlpLayer&, int64_t begin, int64_t end);                                 // tiles of rows
  void (*mlp_layer_backward)(const MlpLayerBackward&, const Chunk&, int64_t begin, int64_t end);  // the same
};

}  // namespace nest_fast
