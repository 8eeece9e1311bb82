// The MLP half of a transformer layer: what mlp_layer-inl.h computes on.

#pragma once

#include <cstdint>

#include "linear.h"

namespace nest_fast {

enum Activation { kGelu, kGeluTanh };

// Without a norm it is the branch alone: nothing is added to it.
struct MlpLayer {
  Linear fc1, fc2;
  Norm norm;
  Residual<void> residual;
  Activation activation;
  int64_t rows, x_stride;
  const void* x;
  void* out;
  void* hidden;  // fc1's output, or null where it is not wanted
  bool float_x;  // x, out and the residual, whatever the weights are
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
