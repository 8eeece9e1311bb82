// A transformer layer's parts on the CPU, each with the LayerNorm before it and the sum after it: registration and
// checks. linear_cpu_kernel.h and attention_layer_cpu_kernel.h have the computation.

#include "transformer_cpu.h"

namespace nest_fast {
namespace {

#define NEST_FAST_KERNEL "transformer_cpu_kernel.h"
#include "cpu_for_each_isa.h"

struct Kernels {
  int64_t rows;  // of a tile
  WeightPacking packing;
  void (*linear)(const LinearLayer&, int64_t begin, int64_t end);  // tiles of rows
  void (*mlp)(const MlpLayer&, int64_t begin, int64_t end);
  void (*attention_layer)(const AttentionLayer&, int64_t begin, int64_t end);  // blocks
  int64_t (*strips_per_head)(int64_t tokens);
  void (*attend)(const BlockAttention&, int64_t begin, int64_t end);  // strips of query rows
};

#define NEST_FAST_KERNELS(isa, op)                                              \
  {isa::kRows,                                                                  \
   {isa::kPair, isa::packed_floats<isa::op>, isa::pack_weight<isa::op>},        \
   isa::linear<isa::op>,                                                        \
   isa::mlp<isa::op>,                                                           \
   isa::attention_layer<isa::op>,                                               \
   isa::strips_per_head,                                                        \
   isa::attend<isa::op>}
constexpr ByDtype<Kernels> kKernels[] = {NEST_FAST_BY_ISA(NEST_FAST_KERNELS)};

Norm norm_of(const Tensor& weight, const Tensor& bias, double eps, int64_t features) {
  return {vector_of<float>("norm_weight", weight, ScalarType::Float, features),
          vector_of<float>("norm_bias", bias, ScalarType::Float, features), static_cast<float>(eps)};
}

// x + branch_scale * fc2(activation(fc1(norm(x)))) for rows x (rows, features); and for the gradient fc1's output
// (rows, hidden), empty without `training`.
std::tuple<Tensor, Tensor> mlp_layer_cpp(Tensor x, Tensor norm_weight, Tensor norm_bias, double eps, Tensor fc1_weight,
                                         std::optional<Tensor> fc1_bias, std::string activation, Tensor fc2_weight,
                                         std::optional<Tensor> fc2_bias, double branch_scale, bool training) {
  const ScalarType dtype = x.scalar_type();
  const Kernels& isa = kernels_for(kKernels, "x", dtype);
  const int64_t rows = x.size(0), features = x.size(1);
  MlpLayer p{};
  p.x = rows_of("x", x, dtype, features, p.x_stride);
  p.rows = rows;
  p.norm = norm_of(norm_weight, norm_bias, eps, features);
  p.activation = activation_of(activation);
  p.branch_scale = static_cast<float>(branch_scale);
  Tensor out = torch::stable::new_empty(x, {rows, features});
  Tensor hidden = torch::stable::new_empty(x, {training ? rows : 0, fc1_weight.size(0)});
  p.out = out.mutable_data_ptr();
  if (training) p.hidden = hidden.mutable_data_ptr();
  if (out.numel() == 0) return {out, hidden};
  const PackedLinear fc1("fc1_weight", isa.packing, fc1_weight, fc1_bias, dtype, features);
  const PackedLinear fc2("fc2_weight", isa.packing, fc2_weight, fc2_bias, dtype, fc1.linear.out);
  STD_TORCH_CHECK(fc2.linear.out == features, "fc2_weight: wanted ", features, " output features, got ",
                  fc2.linear.out);
  p.fc1 = fc1.linear, p.fc2 = fc2.linear;
  parallel_for(ceil_div(rows, isa.rows), [&](int64_t begin, int64_t end) { isa.mlp(p, begin, end); });
  return {out, hidden};
}

// The same as isa.attention_layer for all blocks, what lies between the matmuls in memory.
void attention_layer_by_parts(const Kernels& isa, const AttentionLayer& p, int64_t blocks, const Tensor& like) {
  const int64_t tokens = p.heads.tokens, rows = blocks * tokens, features = p.qkv.in, unsaved = p.qkv_out ? 0 : rows;
  Tensor qkv = torch::stable::new_empty(like, {unsaved, p.qkv.out});
  Tensor attended = torch::stable::new_empty(like, {unsaved, features});
  void* const qkv_data = p.qkv_out ? p.qkv_out : qkv.mutable_data_ptr();
  void* const attended_data = p.qkv_out ? p.attended : attended.mutable_data_ptr();
  const BlockAttention attention = p.heads.attention(qkv_data, attended_data, like.element_size(), p.scale, p.lse);
  const auto linear = [&](const LinearLayer& layer) {
    parallel_for(ceil_div(rows, isa.rows), [&](int64_t begin, int64_t end) { isa.linear(layer, begin, end); });
  };
  linear({p.qkv, p.norm, {}, rows, p.x_stride, p.x, qkv_data});
  parallel_for(blocks * p.heads.heads * isa.strips_per_head(tokens),
               [&](int64_t begin, int64_t end) { isa.attend(attention, begin, end); });
  linear({p.proj, {}, {p.x, p.x_stride, p.branch_scale}, rows, features, attended_data, p.out});
}

// x + branch_scale * proj(attention(qkv(norm(x)))) inside each block, for rows x (blocks * tokens, features). qkv gives
// q of every head, then k, then v of `heads` or of one. Then for the gradient, empty without `training`: the output of
// qkv, that of the attention, and lse (blocks, heads, tokens), the logarithms of its sums.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_layer_cpp(
    Tensor x, Tensor norm_weight, Tensor norm_bias, double eps, Tensor qkv_weight, std::optional<Tensor> qkv_bias,
    Tensor proj_weight, std::optional<Tensor> proj_bias, int64_t tokens, int64_t heads, int64_t kv_heads, double scale,
    double branch_scale, bool training) {
  const ScalarType dtype = x.scalar_type();
  const Kernels& isa = kernels_for(kKernels, "x", dtype);
  const int64_t rows = x.size(0), features = x.size(1);
  AttentionLayer p{.heads = Heads(rows, features, tokens, heads, kv_heads)};
  p.x = rows_of("x", x, dtype, features, p.x_stride);
  p.scale = static_cast<float>(scale), p.branch_scale = static_cast<float>(branch_scale);
  p.norm = norm_of(norm_weight, norm_bias, eps, features);
  const int64_t kept = training ? rows : 0, packed_features = p.heads.packed_features();
  using torch::stable::new_empty;
  Tensor out = new_empty(x, {rows, features});
  Tensor qkv_out = new_empty(x, {kept, packed_features}), attended = new_empty(x, {kept, features});
  Tensor lse = new_empty(x, {kept / tokens, heads, tokens}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  if (training) {
    p.qkv_out = qkv_out.mutable_data_ptr();
    p.attended = attended.mutable_data_ptr();
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
  }
  if (out.numel() == 0) return {out, qkv_out, attended, lse};
  const PackedLinear qkv("qkv_weight", isa.packing, qkv_weight, qkv_bias, dtype, features);
  const PackedLinear proj("proj_weight", isa.packing, proj_weight, proj_bias, dtype, features);
  STD_TORCH_CHECK(qkv.linear.out == packed_features, "qkv_weight: wanted ", packed_features,
                  " output features, got ", qkv.linear.out);
  STD_TORCH_CHECK(proj.linear.out == features, "proj_weight: wanted ", features, " output features, got ",
                  proj.linear.out);
  p.qkv = qkv.linear, p.proj = proj.linear;
  const int64_t blocks = rows / tokens, threads = torch::stable::get_num_threads();
  // A block is one thread's work. Where that leaves threads idle, the parts are divided one by one.
  if (4 * blocks >= 3 * ceil_div(blocks, threads) * threads)
    parallel_for(blocks, [&](int64_t begin, int64_t end) { isa.attention_layer(p, begin, end); });
  else
    attention_layer_by_parts(isa, p, blocks, x);
  return {out, qkv_out, attended, lse};
}

}  // namespace
}  // namespace nest_fast

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CPU, m) {
  m.impl("attention_layer_cpp", TORCH_BOX(&nest_fast::attention_layer_cpp));
  m.impl("mlp_layer_cpp", TORCH_BOX(&nest_fast::mlp_layer_cpp));
}
