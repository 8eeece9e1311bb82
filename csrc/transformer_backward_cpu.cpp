// The backward of a transformer layer's parts on the CPU: registration and checks. linear_backward_cpu_kernel.h and
// block_attention_cpu_kernel.h have the computation.

#include "transformer_cpu.h"

namespace nest_fast {
namespace {

constexpr int64_t kChunkFloats = 1 << 20;  // of the panels of a chunk of rows

// Rows [first, first + rows).
struct Chunk {
  int64_t first, rows;
};

// Columns of a chunk's rows as the operands of products over rows: (pairs of vectors, units of rows, kPair). data is
// null where nobody wants them.
struct Panels {
  int64_t features;
  float* data;
};

// sums (outs, ins), whole pairs of vectors of both, is the gradient of a weight; that of its bias beside it. Null where
// it is not wanted.
struct WeightGradient {
  Panels dout, x;
  float *sums, *bias_sums;
};

// Rows are dense; strides are between them. A Linear is the product with a weight as it lies here, not transposed. dx
// is null where it is not wanted.
struct LinearBackward {
  Linear linear;
  int64_t dout_stride, x_stride;
  const void *dout, *x;
  void* dx;
  WeightGradient weight;
};

struct MlpBackward {
  Linear fc1, fc2;
  Activation activation;
  int64_t dout_stride, x_stride;
  const void *dout, *x, *hidden;
  void* dx;
  WeightGradient fc1_weight, fc2_weight;
};

#define NEST_FAST_KERNEL "transformer_backward_cpu_kernel.h"
#include "cpu_for_each_isa.h"

struct Kernels {
  int64_t rows, per_unit;  // of a tile; of a unit
  WeightPacking packing;
  void (*linear_backward)(const LinearBackward&, const Chunk&, int64_t begin, int64_t end);  // tiles of rows
  void (*mlp_backward)(const MlpBackward&, const Chunk&, int64_t begin, int64_t end);
  void (*weight_gradient)(const WeightGradient&, const Chunk&, int64_t begin, int64_t end);  // squares
  void (*round_sums)(const float*, int64_t stride, int64_t features, void* out, int64_t begin, int64_t end);  // rows
  void (*attend_backward)(const BlockAttentionBackward&, int64_t begin, int64_t end);  // heads
};

#define NEST_FAST_KERNELS(isa, op)                                                    \
  {isa::kRows,                                                                        \
   isa::op::kPerUnit,                                                                 \
   {isa::kPair, isa::packed_floats<isa::op>, isa::pack_weight_transposed<isa::op>},   \
   isa::linear_backward<isa::op>,                                                     \
   isa::mlp_backward<isa::op>,                                                        \
   isa::weight_gradient<isa::op>,                                                     \
   isa::round_sums<isa::op::Element>,                                                 \
   isa::attend_backward<isa::op>}
constexpr ByDtype<Kernels> kKernels[] = {NEST_FAST_BY_ISA(NEST_FAST_KERNELS)};

// Which gradients of a linear layer are wanted.
struct LinearMask {
  bool weight, bias;

  bool any() const { return weight || bias; }
};

// Which gradients of a branch are wanted: those of its input and of its two linear layers.
struct BranchMask {
  bool dx;
  LinearMask first, second;

  explicit BranchMask(const std::vector<bool>& mask) {
    STD_TORCH_CHECK(mask.size() == 5, "output_mask: wanted 5 bools, got ", mask.size());
    dx = mask[0], first = {mask[1], mask[2]}, second = {mask[3], mask[4]};
  }
};

// What is returned for a gradient that is not wanted.
Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// A weight's gradient with the memory of its sums and of a chunk's panels.
struct Gradient {
  const Kernels& isa;
  const LinearMask wanted;
  WeightGradient p{};
  Tensor sums, bias_sums, dout_panels, x_panels;

  Gradient(const Kernels& isa, LinearMask wanted, const Tensor& like, int64_t outs, int64_t ins, int64_t chunk_rows)
      : isa(isa), wanted(wanted) {
    const auto floats = [&](bool wanted, Tensor& memory, std::vector<int64_t> sizes) -> float* {
      if (!wanted) return nullptr;
      memory = torch::stable::new_empty(like, sizes, ScalarType::Float);
      if (chunk_rows == 0) torch::stable::zero_(memory);  // otherwise the first chunk's sums are stored
      return static_cast<float*>(memory.mutable_data_ptr());
    };
    const int64_t units = ceil_div(chunk_rows, isa.per_unit), rows = whole(outs), columns = whole(ins);
    p.dout = {outs, floats(wanted.any(), dout_panels, {rows, units})};
    p.x = {ins, floats(wanted.weight, x_panels, {columns, units})};
    p.sums = floats(wanted.weight, sums, {rows, columns});
    p.bias_sums = floats(wanted.bias, bias_sums, {rows});
  }

  int64_t pairs(int64_t features) const { return ceil_div(features, isa.packing.pair); }
  int64_t whole(int64_t features) const { return pairs(features) * isa.packing.pair; }

  void add_chunk(const Chunk& chunk) const {
    if (!wanted.any()) return;
    parallel_for(pairs(p.dout.features) * (wanted.weight ? pairs(p.x.features) : 1),
                 [&](int64_t begin, int64_t end) { isa.weight_gradient(p, chunk, begin, end); });
  }

  // The weight's (outs, ins) in the dtype of `like`.
  Tensor weight(const Tensor& like) const {
    if (!wanted.weight) return nothing(like);
    const int64_t outs = p.dout.features, ins = p.x.features;
    if (like.scalar_type() == ScalarType::Float && outs == whole(outs) && ins == whole(ins)) return sums;
    Tensor out = torch::stable::new_empty(like, {outs, ins});
    void* data = out.mutable_data_ptr();
    parallel_for(outs, [&](int64_t begin, int64_t end) { isa.round_sums(p.sums, whole(ins), ins, data, begin, end); });
    return out;
  }

  Tensor bias(const Tensor& like) const {
    if (!wanted.bias) return nothing(like);
    Tensor out = torch::stable::new_empty(like, {p.dout.features});
    isa.round_sums(p.bias_sums, 0, p.dout.features, out.mutable_data_ptr(), 0, 1);
    return out;
  }
};

// As many rows as `features` of them, in panels, fill a chunk; whole tiles.
int64_t rows_of_chunk(const Kernels& isa, int64_t rows, int64_t features) {
  const int64_t fitting = kChunkFloats * isa.per_unit / features / isa.rows * isa.rows;
  return std::min(rows, std::max(fitting, isa.rows));
}

// Chunk after chunk, `backward` of its rows, which leaves them in the panels of `gradients`, and then their sums.
template <class P>
void backward_by_chunks(const Kernels& isa, void (*backward)(const P&, const Chunk&, int64_t begin, int64_t end),
                        const P& p, int64_t rows, int64_t chunk_rows,
                        std::initializer_list<const Gradient*> gradients) {
  for (int64_t first = 0; first < rows; first += chunk_rows) {
    const Chunk chunk{first, std::min(chunk_rows, rows - first)};
    parallel_for(ceil_div(chunk.rows, isa.rows), [&](int64_t begin, int64_t end) { backward(p, chunk, begin, end); });
    for (const Gradient* gradient : gradients) gradient->add_chunk(chunk);
  }
}

void check_rows(const Tensor& x, int64_t rows) {
  STD_TORCH_CHECK(x.size(0) == rows, "x: wanted ", rows, " rows as dout has, got ", x.size(0));
}

// What the forward kept: as many rows as dout has, without gaps.
void* kept_rows_of(const char* name, const Tensor& x, const Tensor& dout, int64_t features) {
  int64_t stride;
  const void* data = rows_of(name, x, dout.scalar_type(), features, stride);
  STD_TORCH_CHECK(x.size(0) == dout.size(0) && x.is_contiguous(), name, ": wanted ", dout.size(0),
                  " contiguous rows as dout has, got ", x.size(0), x.is_contiguous() ? "" : " with gaps");
  return const_cast<void*>(data);
}

struct LinearGradients {
  Tensor dx, weight, bias;
};

// The gradients, as far as they are wanted, of x @ weight^T + bias for rows dout (rows, outs) and x (rows, ins).
LinearGradients linear_backward(const Kernels& isa, const char* name, const Tensor& weight, const Tensor& dout,
                                const Tensor& x, bool want_dx, LinearMask wanted) {
  const ScalarType dtype = dout.scalar_type();
  const int64_t rows = dout.size(0), outs = dout.size(1), ins = x.size(1);
  const PackedLinear linear = PackedLinear::transposed(name, isa.packing, weight, dtype, outs, ins);
  const int64_t chunk_rows = rows_of_chunk(isa, rows, outs + ins);
  Gradient gradient(isa, wanted, dout, outs, ins, chunk_rows);
  LinearBackward p{linear.linear};
  p.dout = rows_of("dout", dout, dtype, outs, p.dout_stride);
  p.x = rows_of("x", x, dtype, ins, p.x_stride);
  check_rows(x, rows);
  Tensor dx = want_dx ? torch::stable::new_empty(x, {rows, ins}) : nothing(x);
  if (want_dx) p.dx = dx.mutable_data_ptr();
  p.weight = gradient.p;
  backward_by_chunks(isa, isa.linear_backward, p, rows, chunk_rows, {&gradient});
  return {dx, gradient.weight(dout), gradient.bias(dout)};
}

// For the gradient dout (rows, features) of fc2(activation(hidden)) with hidden (rows, hidden features) = fc1(x): those
// of x, and of fc1's weight and bias, and of fc2's. output_mask says which are wanted; the others are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_layer_cpp_bwd(Tensor dout, Tensor x, Tensor hidden,
                                                                     Tensor fc1_weight, std::string activation,
                                                                     Tensor fc2_weight, std::vector<bool> output_mask) {
  const BranchMask wanted(output_mask);
  const ScalarType dtype = dout.scalar_type();
  const Kernels& isa = kernels_for(kKernels, "dout", dtype);
  const int64_t rows = dout.size(0), features = dout.size(1), hidden_features = fc1_weight.size(0);
  const PackedLinear fc1 =
      PackedLinear::transposed("fc1_weight", isa.packing, fc1_weight, dtype, hidden_features, features);
  const PackedLinear fc2 =
      PackedLinear::transposed("fc2_weight", isa.packing, fc2_weight, dtype, features, hidden_features);
  const int64_t chunk_rows = rows_of_chunk(isa, rows, 2 * (features + hidden_features));
  Gradient fc1_gradient(isa, wanted.first, dout, hidden_features, features, chunk_rows);
  Gradient fc2_gradient(isa, wanted.second, dout, features, hidden_features, chunk_rows);
  MlpBackward p{fc1.linear, fc2.linear, activation_of(activation)};
  p.dout = rows_of("dout", dout, dtype, features, p.dout_stride);
  p.x = rows_of("x", x, dtype, features, p.x_stride);
  p.hidden = kept_rows_of("hidden", hidden, dout, hidden_features);
  check_rows(x, rows);
  Tensor dx = wanted.dx ? torch::stable::new_empty(x, {rows, features}) : nothing(x);
  if (wanted.dx) p.dx = dx.mutable_data_ptr();
  p.fc1_weight = fc1_gradient.p, p.fc2_weight = fc2_gradient.p;
  backward_by_chunks(isa, isa.mlp_backward, p, rows, chunk_rows, {&fc1_gradient, &fc2_gradient});
  return {dx, fc1_gradient.weight(dout), fc1_gradient.bias(dout), fc2_gradient.weight(dout), fc2_gradient.bias(dout)};
}

// For the gradient dout (rows, features) of proj(attention(qkv)) with qkv (rows, packed features) = qkv_layer(x): those
// of x, and of the weight and bias of the qkv layer, and of proj. output_mask says which are wanted; the others are
// empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_layer_cpp_bwd(
    Tensor dout, Tensor x, Tensor qkv, Tensor attended, Tensor lse, Tensor qkv_weight, Tensor proj_weight,
    int64_t tokens, int64_t heads, int64_t kv_heads, double scale, std::vector<bool> output_mask) {
  const BranchMask wanted(output_mask);
  const Kernels& isa = kernels_for(kKernels, "dout", dout.scalar_type());
  const int64_t rows = dout.size(0), features = dout.size(1), bytes = dout.element_size();
  const Heads cut(rows, features, tokens, heads, kv_heads);
  void* const qkv_data = kept_rows_of("qkv", qkv, dout, cut.packed_features());
  void* const attended_data = kept_rows_of("attended", attended, dout, features);
  float* const lse_data = lse_of(lse, rows * heads);
  const bool want_dqkv = wanted.dx || wanted.first.any();
  const LinearGradients proj =
      linear_backward(isa, "proj_weight", proj_weight, dout, attended, want_dqkv, wanted.second);
  if (!want_dqkv) return {nothing(x), nothing(x), nothing(x), proj.weight, proj.bias};
  Tensor dqkv = torch::stable::new_empty(qkv, {rows, cut.packed_features()});
  BlockAttentionBackward p{cut.attention(qkv_data, attended_data, bytes, static_cast<float>(scale), lse_data)};
  p.dout = cut.at(proj.dx.mutable_data_ptr(), features, 0, heads, bytes);
  cut.unpack(dqkv.mutable_data_ptr(), bytes, p.dq, p.dk, p.dv);
  const int64_t together = kv_heads < heads ? heads : 1;  // the heads that share a gradient are one task
  parallel_for(rows / tokens * heads / together, [&](int64_t begin, int64_t end) {
    isa.attend_backward(p, begin * together, end * together);
  });
  const LinearGradients in = linear_backward(isa, "qkv_weight", qkv_weight, dqkv, x, wanted.dx, wanted.first);
  return {in.dx, in.weight, in.bias, proj.weight, proj.bias};
}

}  // namespace
}  // namespace nest_fast

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CPU, m) {
  m.impl("attention_layer_cpp_bwd", TORCH_BOX(&nest_fast::attention_layer_cpp_bwd));
  m.impl("mlp_layer_cpp_bwd", TORCH_BOX(&nest_fast::mlp_layer_cpp_bwd));
}
