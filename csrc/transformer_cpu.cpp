// A transformer layer's parts on the CPU, each with the LayerNorm before it and the sum after it: registration and
// checks. linear_cpu_kernel.h and attention_layer_cpu_kernel.h have the computation.

#include "block_attention_cpu.h"
#include "cpu_dispatch.h"

namespace nest_fast {
namespace {

constexpr int64_t kCache = 1 << 20;  // bytes of a core's second-level cache, or less

enum Activation { kGelu, kGeluTanh };

// A layer's weight (out, in), whose rows are dense, and bias or null; and the weight as the products take it.
struct Linear {
  int64_t in, out;
  const void *weight, *bias;
  int64_t weight_stride;
  float* packed;
};

// weight is null where there is none.
struct Norm {
  const float *weight, *bias;
  float eps;
};

// Rows to which `scale` times the result is added; x is null where there are none.
template <class T>
struct Residual {
  T* x = nullptr;
  int64_t stride = 0;
  float scale = 1;
};

// Rows are dense; strides are between them.
struct LinearLayer {
  Linear linear;
  Norm norm;
  Residual<const void> residual;
  int64_t rows, x_stride;
  const void* x;
  void* out;
};

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

struct AttentionLayer {
  Linear qkv, proj;
  Norm norm;
  int64_t tokens, heads, kv_heads, dim, x_stride;  // of a block; of a head; between tokens
  float scale, branch_scale;
  const void* x;
  void* out;
  void *qkv_out, *attended;  // what the gradient needs, or null
  float* lse;

  // Attention inside the blocks that lie one behind the other in a packed qkv, dense as out is.
  BlockAttention attention(void* packed, void* out, int64_t element_size) const {
    const auto heads_from = [&](int64_t head, int64_t count) {
      void* first = static_cast<char*>(packed) + head * dim * element_size;
      return Operand{first, 0, tokens * qkv.out, qkv.out, count == 1 ? 0 : dim};
    };
    BlockAttention p{};
    p.q = heads_from(0, heads), p.k = heads_from(heads, kv_heads), p.v = heads_from(heads + kv_heads, kv_heads);
    p.out = {out, 0, tokens * heads * dim, heads * dim, dim};
    p.blocks = std::numeric_limits<int64_t>::max();  // of one image: all
    p.tokens = tokens, p.heads = heads, p.dim = dim, p.scale = scale, p.lse = lse;
    return p;
  }
};

#define NEST_FAST_KERNEL "transformer_cpu_kernel.h"
#include "cpu_for_each_isa.h"

struct Kernels {
  int64_t rows, pair;  // of a tile; columns of a panel of the packed weight
  int64_t (*packed_floats)(int64_t in, int64_t out);
  void (*pack_weight)(const Linear&, int64_t begin, int64_t end);  // pairs of vectors of output features
  void (*linear)(const LinearLayer&, int64_t begin, int64_t end);  // tiles of rows
  void (*mlp)(const MlpLayer&, int64_t begin, int64_t end);
  void (*attention_layer)(const AttentionLayer&, int64_t begin, int64_t end);  // blocks
  int64_t (*strips_per_head)(int64_t tokens);
  void (*attend)(const BlockAttention&, int64_t begin, int64_t end);  // strips of query rows
};

#define NEST_FAST_KERNELS(isa, op)                                                                                \
  {isa::kRows, isa::kPair, isa::packed_floats<isa::op>, isa::pack_weight<isa::op>, isa::linear<isa::op>, \
   isa::mlp<isa::op>, isa::attention_layer<isa::op>, isa::strips_per_head, isa::attend<isa::op>}
constexpr ByDtype<Kernels> kKernels[] = {NEST_FAST_BY_ISA(NEST_FAST_KERNELS)};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Work>
void parallel_for(int64_t count, Work work) {
  torch::stable::parallel_for(0, count, 1, work);
}

void check_dtype(const char* name, const Tensor& x, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": wanted dtype ", toString(dtype), ", got ",
                  toString(x.scalar_type()));
}

// Rows (count, features) that are dense, and how far apart they lie.
const void* rows_of(const char* name, const Tensor& x, ScalarType dtype, int64_t features, int64_t& stride) {
  check_dtype(name, x, dtype);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == features, name, ": wanted 2 dimensions, the last ", features);
  STD_TORCH_CHECK(x.stride(1) == 1 || features == 1 || x.numel() == 0, name, ": wanted dense rows, got stride ",
                  x.stride(1));
  stride = x.stride(0);
  return x.const_data_ptr();
}

template <class T>
const T* vector_of(const char* name, const Tensor& x, ScalarType dtype, int64_t size) {
  check_dtype(name, x, dtype);
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == size && x.is_contiguous(), name, ": wanted ", size,
                  " contiguous elements");
  return static_cast<const T*>(x.const_data_ptr());
}

Norm norm_of(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps, int64_t features) {
  if (!weight) return {};
  STD_TORCH_CHECK(bias, "norm_bias: wanted one with norm_weight, got none");
  return {vector_of<float>("norm_weight", *weight, ScalarType::Float, features),
          vector_of<float>("norm_bias", *bias, ScalarType::Float, features), static_cast<float>(eps)};
}

Activation activation_of(const std::string& name) {
  if (name == "gelu") return kGelu;
  STD_TORCH_CHECK(name == "gelu_tanh", "activation: wanted \"gelu\" or \"gelu_tanh\", got \"", name, "\"");
  return kGeluTanh;
}

// A weight and its copy as the products take it. Packed anew in every call, which costs as much as reading it once: a
// remembered copy would not see a weight that is changed through its data.
struct PackedLinear {
  Linear linear;
  Tensor packed;

  PackedLinear(const char* name, const Kernels& isa, const Tensor& weight, const std::optional<Tensor>& bias,
               ScalarType dtype, int64_t in) {
    STD_TORCH_CHECK(weight.dim() == 2, name, ": wanted 2 dimensions (out, in), got ", weight.dim());
    linear.in = in;
    linear.out = weight.size(0);
    linear.weight = rows_of(name, weight, dtype, in, linear.weight_stride);
    linear.bias = bias ? vector_of<void>("bias", *bias, dtype, linear.out) : nullptr;
    packed = torch::stable::new_empty(weight, {isa.packed_floats(in, linear.out)}, ScalarType::Float);
    linear.packed = static_cast<float*>(packed.mutable_data_ptr());
    parallel_for(ceil_div(linear.out, isa.pair), [&](int64_t begin, int64_t end) { isa.pack_weight(linear, begin, end); });
  }
};

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
  const PackedLinear fc1("fc1_weight", isa, fc1_weight, fc1_bias, dtype, features);
  const PackedLinear fc2("fc2_weight", isa, fc2_weight, fc2_bias, dtype, fc1.linear.out);
  STD_TORCH_CHECK(fc2.linear.out == features, "fc2_weight: wanted ", features, " output features, got ",
                  fc2.linear.out);
  p.fc1 = fc1.linear, p.fc2 = fc2.linear;
  parallel_for(ceil_div(rows, isa.rows), [&](int64_t begin, int64_t end) { isa.mlp(p, begin, end); });
  return {out, hidden};
}

// The same as isa.attention_layer for all blocks, what lies between the matmuls in memory.
void attention_layer_by_parts(const Kernels& isa, const AttentionLayer& p, int64_t blocks, const Tensor& like) {
  const int64_t rows = blocks * p.tokens, features = p.qkv.in, unsaved = p.qkv_out ? 0 : rows;
  Tensor qkv = torch::stable::new_empty(like, {unsaved, p.qkv.out});
  Tensor attended = torch::stable::new_empty(like, {unsaved, features});
  void* const qkv_data = p.qkv_out ? p.qkv_out : qkv.mutable_data_ptr();
  void* const attended_data = p.qkv_out ? p.attended : attended.mutable_data_ptr();
  const BlockAttention attention = p.attention(qkv_data, attended_data, like.element_size());
  const auto linear = [&](const LinearLayer& layer) {
    parallel_for(ceil_div(rows, isa.rows), [&](int64_t begin, int64_t end) { isa.linear(layer, begin, end); });
  };
  linear({p.qkv, p.norm, {}, rows, p.x_stride, p.x, qkv_data});
  parallel_for(blocks * p.heads * isa.strips_per_head(p.tokens),
               [&](int64_t begin, int64_t end) { isa.attend(attention, begin, end); });
  linear({p.proj, {}, {p.x, p.x_stride, p.branch_scale}, rows, features, attended_data, p.out});
}

// x + branch_scale * proj(attention(qkv(norm(x)))) inside each block, for rows x (blocks * tokens, features). qkv gives q
// of every head, then k, then v of `heads` or of one. Then for the gradient, empty without `training`: the output of qkv,
// that of the attention, and lse (blocks, heads, tokens), the logarithms of its sums.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_layer_cpp(
    Tensor x, Tensor norm_weight, Tensor norm_bias, double eps, Tensor qkv_weight, std::optional<Tensor> qkv_bias,
    Tensor proj_weight, std::optional<Tensor> proj_bias, int64_t tokens, int64_t heads, int64_t kv_heads, double scale,
    double branch_scale, bool training) {
  const ScalarType dtype = x.scalar_type();
  const Kernels& isa = kernels_for(kKernels, "x", dtype);
  const int64_t rows = x.size(0), features = x.size(1);
  AttentionLayer p{};
  p.x = rows_of("x", x, dtype, features, p.x_stride);
  STD_TORCH_CHECK(tokens > 0 && rows % tokens == 0, "tokens: wanted a divisor of ", rows, " rows, got ", tokens);
  STD_TORCH_CHECK(heads > 0 && features % heads == 0, "heads: wanted a divisor of ", features, " features, got ", heads);
  STD_TORCH_CHECK(kv_heads == heads || kv_heads == 1, "kv_heads: wanted ", heads, " or 1, got ", kv_heads);
  p.tokens = tokens, p.heads = heads, p.kv_heads = kv_heads, p.dim = features / heads;
  p.scale = static_cast<float>(scale), p.branch_scale = static_cast<float>(branch_scale);
  p.norm = norm_of(norm_weight, norm_bias, eps, features);
  const int64_t kept = training ? rows : 0, packed_features = (heads + 2 * kv_heads) * p.dim;
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
  const PackedLinear qkv("qkv_weight", isa, qkv_weight, qkv_bias, dtype, features);
  const PackedLinear proj("proj_weight", isa, proj_weight, proj_bias, dtype, features);
  STD_TORCH_CHECK(qkv.linear.out == packed_features, "qkv_weight: wanted ", packed_features, " output features, got ", qkv.linear.out);
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
