// The MLP half of a transformer layer on the CPU, with the LayerNorm before it and the sum after it, and its backward:
// registration and checks. mlp_layer-inl.h has the computation.

#include "mlp_layer.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "linear_gradient.h"
#include "packed_linear.h"
#include "sizes.h"
#include "threads.h"

#define NEST_FAST_KERNELS "mlp_layer-inl.h"
#include "foreach_isa.h"

namespace nest_fast {
namespace {

constexpr ByDtype<MlpLayerKernels> kKernels[] = {NEST_FAST_BY_ISA(kMlpLayer)};

Activation activation_of(const std::string& name) {
  if (name == "gelu") return kGelu;
  STD_TORCH_CHECK(name == "gelu_tanh", "activation: expected \"gelu\" or \"gelu_tanh\", got \"", name, "\"");
  return kGeluTanh;
}

// x + branch_scale * fc2(activation(fc1(norm(x)))), or without a norm fc2(activation(fc1(x))), for rows x (rows,
// features); and for the gradient fc1's output (rows, hidden), empty without `training`. Beside weights of 16 bits x,
// and the result, may be floats where there is a norm.
std::tuple<Tensor, Tensor> mlp_layer_cpp(Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                                         double eps, Tensor fc1_weight, std::optional<Tensor> fc1_bias,
                                         std::string activation, Tensor fc2_weight, std::optional<Tensor> fc2_bias,
                                         double branch_scale, bool training, std::optional<Tensor> fc1_packed,
                                         std::optional<Tensor> fc2_packed) {
  const ScalarType dtype = weight_dtype(x, fc1_weight, norm_weight.has_value());
  const MlpLayerKernels& isa = kernels_for(kKernels, "x", dtype);
  const int64_t rows = x.size(0), features = x.size(1);
  MlpLayer p{};
  p.x = rows_of("x", x, x.scalar_type(), features, p.x_stride);
  p.float_x = x.scalar_type() == ScalarType::Float;
  p.rows = rows;
  STD_TORCH_CHECK(norm_weight.has_value() == norm_bias.has_value(), "norm_bias: expected as norm_weight, None or not");
  if (norm_weight) {
    p.norm = norm_of(*norm_weight, *norm_bias, eps, features);
    p.residual = {p.x, p.x_stride, static_cast<float>(branch_scale)};
  }
  p.activation = activation_of(activation);
  Tensor out = torch::stable::new_empty(x, {rows, features});
  Tensor hidden = torch::stable::new_empty(x, {training ? rows : 0, fc1_weight.size(0)}, dtype);
  p.out = out.mutable_data_ptr();
  if (training) p.hidden = hidden.mutable_data_ptr();
  if (out.numel() == 0) return {out, hidden};
  const PackedLinear fc1("fc1_weight", isa.packing, fc1_weight, fc1_bias, dtype, features, fc1_packed);
  const PackedLinear fc2("fc2_weight", isa.packing, fc2_weight, fc2_bias, dtype, fc1.linear.out, fc2_packed);
  STD_TORCH_CHECK(fc2.linear.out == features, "fc2_weight: expected ", features, " output features, got ",
                  fc2.linear.out);
  p.fc1 = fc1.linear, p.fc2 = fc2.linear;
  for_row_tiles(isa.packing, rows, [&](int64_t begin, int64_t end) { isa.mlp_layer(p, begin, end); });
  return {out, hidden};
}

// For the gradient dout (rows, features) of fc2(activation(hidden)) with hidden (rows, hidden features) = fc1(x): those
// of x, and of fc1's weight and bias, and of fc2's. output_mask says which are wanted; the others are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_layer_cpp_bwd(Tensor dout, Tensor x, Tensor hidden,
                                                                     Tensor fc1_weight, std::string activation,
                                                                     Tensor fc2_weight, std::vector<bool> output_mask) {
  const BranchMask wanted(output_mask);
  const ScalarType dtype = dout.scalar_type();
  const MlpLayerKernels& isa = kernels_for(kKernels, "dout", dtype);
  const int64_t rows = dout.size(0), features = dout.size(1), hidden_features = fc1_weight.size(0);
  const PackedLinear fc1 =
      PackedLinear::transposed("fc1_weight", isa.packing, fc1_weight, dtype, hidden_features, features);
  const PackedLinear fc2 =
      PackedLinear::transposed("fc2_weight", isa.packing, fc2_weight, dtype, features, hidden_features);
  const int64_t chunk_rows = rows_of_chunk(isa.packing, rows, 2 * (features + hidden_features));
  Gradient fc1_gradient(isa.packing, wanted.first, dout, hidden_features, features, chunk_rows);
  Gradient fc2_gradient(isa.packing, wanted.second, dout, features, hidden_features, chunk_rows);
  MlpLayerBackward p{fc1.linear, fc2.linear, activation_of(activation)};
  p.dout = rows_of("dout", dout, dtype, features, p.dout_stride);
  p.x = rows_of("x", x, dtype, features, p.x_stride);
  p.hidden = kept_rows_of("hidden", hidden, dout, hidden_features);
  check_rows(x, rows);
  Tensor dx = wanted.dx ? torch::stable::new_empty(x, {rows, features}) : nothing(x);
  if (wanted.dx) p.dx = dx.mutable_data_ptr();
  p.fc1_weight = fc1_gradient.p, p.fc2_weight = fc2_gradient.p;
  backward_by_chunks(isa.packing, isa.mlp_layer_backward, p, rows, chunk_rows, {&fc1_gradient, &fc2_gradient});
  return {dx, fc1_gradient.weight(dout), fc1_gradient.bias(dout), fc2_gradient.weight(dout), fc2_gradient.bias(dout)};
}

}  // namespace
}  // namespace nest_fast

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CPU, m) {
  m.impl("mlp_layer_cpp", TORCH_BOX(&nest_fast::mlp_layer_cpp));
  m.impl("mlp_layer_cpp_bwd", TORCH_BOX(&nest_fast::mlp_layer_cpp_bwd));
}
