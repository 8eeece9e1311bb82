// The attention half of a transformer layer on the CPU, with the LayerNorm before it and the sum after it, and its
// backward: registration and checks. attention_layer-inl.h has the computation.

#include "attention_layer.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "added_scores.h"
#include "checks.h"
#include "dispatch.h"
#include "linear_gradient.h"
#include "packed_linear.h"
#include "sizes.h"
#include "threads.h"
#include "windows.h"

#define NEST_FAST_KERNELS "attention_layer-inl.h"
#include "foreach_isa.h"

namespace nest_fast {
namespace {

constexpr ByDtype<AttentionLayerKernels> kKernels[] = {NEST_FAST_BY_ISA(kAttentionLayer)};

// Rows that are computed together where blocks are small, so that the weights are read less often.
constexpr int64_t kRowsAtOnce = 196;
// Slices of rows whose sums are the gradient of the scales, whatever the threads.
constexpr int64_t kScaleSlices = 64;

// How many images so many rows are, whose windows have so many tokens; 0 without windows.
int64_t images_of(const Windows& windows, int64_t rows, int64_t tokens) {
  if (!windows.any()) return 0;
  const int64_t image_rows = windows.image.h * windows.image.w;
  STD_TORCH_CHECK(rows % image_rows == 0, "windows: expected a divisor of ", rows, " rows, got an image of ",
                  image_rows);
  STD_TORCH_CHECK(tokens == windows.tokens(), "tokens: expected ", windows.tokens(), " as windows has, got ", tokens);
  return rows / image_rows;
}

void check_scales(const std::optional<Tensor>& scales, const Heads& heads) {
  STD_TORCH_CHECK(!scales || heads.kv_heads == heads.heads, "scales: expected none where one key head is all heads'");
}

// The same as isa.attention_layer for all blocks, what lies between the matmuls in memory.
void attention_layer_by_parts(const AttentionLayerKernels& isa, const AttentionLayer& p, int64_t blocks,
                              const Tensor& like) {
  const int64_t tokens = p.heads.tokens, rows = blocks * tokens, features = p.qkv.in, unsaved = p.qkv_out ? 0 : rows;
  Tensor qkv = torch::stable::new_empty(like, {unsaved, p.qkv.out});
  Tensor attended = torch::stable::new_empty(like, {unsaved, features});
  void* const qkv_data = p.qkv_out ? p.qkv_out : qkv.mutable_data_ptr();
  void* const attended_data = p.qkv_out ? p.attended : attended.mutable_data_ptr();
  const int64_t bytes = like.element_size();
  const bool unit = p.added.scales != nullptr, copied = unit && p.qkv_out;
  Tensor copy = torch::stable::new_empty(like, {copied ? rows : 0, p.qkv.out});
  void* const multiplied = copied ? copy.mutable_data_ptr() : qkv_data;
  const BlockAttention attention{p.heads.inputs(multiplied, bytes, p.scale), p.heads.whole(attended_data, bytes),
                                 p.heads.dim, p.lse, p.added};
  const auto linear = [&](const LinearLayer& layer) {
    for_row_tiles(isa.packing, rows, [&](int64_t begin, int64_t end) { isa.linear(layer, begin, end); });
  };
  linear({p.qkv, p.norm, {}, rows, p.x_stride, p.x, qkv_data, p.index, nullptr, p.float_x});
  const UnitVectors vectors{p.heads, rows, 0, qkv_data, multiplied};
  if (unit) parallel_for(rows, [&](int64_t begin, int64_t end) { isa.unit_vectors(vectors, begin, end); });
  parallel_for(blocks * p.heads.heads * isa.attention.row_blocks_per_head(tokens),
               [&](int64_t begin, int64_t end) { isa.attention.attend(attention, begin, end); });
  linear({p.proj, {}, p.residual, rows, features, attended_data, p.out, nullptr, p.index, false, p.float_x});
}

// x + branch_scale * proj(attention(qkv(norm(x)))), or without a norm proj(attention(qkv(x))), inside each block, for
// rows x (blocks * tokens, features), or inside each window, for rows x (images * H * W, features). Beside weights of
// 16 bits x, and the result, may be floats where there is a norm. qkv gives q of every head, then k, then v of `heads`
// or of one. bias (heads, tokens, tokens) and mask (groups, tokens, tokens) are added to the scores; with scales
// (heads,) q and k have length 1, and the scores are multiplied by these. Then for the gradient, empty without
// `training`, in the order of blocks: the output of qkv, that of the attention, and lse, the logarithms of its sums,
// (blocks, heads, tokens), or with anything added or with scales (blocks, heads, tokens, 2), as AddedScores has it.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_layer_cpp(
    Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps, Tensor qkv_weight,
    std::optional<Tensor> qkv_bias, Tensor proj_weight, std::optional<Tensor> proj_bias, std::optional<Tensor> bias,
    std::optional<Tensor> mask, std::optional<Tensor> scales, IntHeaderOnlyArrayRef windows, int64_t tokens,
    int64_t heads, int64_t kv_heads, double scale, double branch_scale, bool training,
    std::optional<Tensor> qkv_packed, std::optional<Tensor> proj_packed) {
  const ScalarType dtype = weight_dtype(x, qkv_weight, norm_weight.has_value());
  const AttentionLayerKernels& isa = kernels_for(kKernels, "x", dtype);
  const int64_t features = x.size(1);
  const Windows cut(windows);
  const int64_t images = images_of(cut, x.size(0), tokens);
  const int64_t rows = cut.any() ? images * cut.count() * tokens : x.size(0);
  AttentionLayer p{.heads = Heads(rows, features, tokens, heads, kv_heads)};
  p.x = rows_of("x", x, x.scalar_type(), features, p.x_stride);
  p.float_x = x.scalar_type() == ScalarType::Float;
  p.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(norm_weight.has_value() == norm_bias.has_value(), "norm_bias: expected as norm_weight, None or not");
  if (norm_weight) {
    p.norm = norm_of(*norm_weight, *norm_bias, eps, features);
    p.residual = {p.x, p.x_stride, static_cast<float>(branch_scale)};
  }
  check_scales(scales, p.heads);
  const int64_t blocks = rows / tokens, kept = training ? rows : 0, packed_features = p.heads.packed_features();
  const ScoreTables tables(bias, mask, scales, cut, blocks, heads, tokens, false);
  p.added = tables.added;
  using torch::stable::new_empty;
  Tensor out = new_empty(x, {x.size(0), features});
  Tensor qkv_out = new_empty(x, {kept, packed_features}, dtype), attended = new_empty(x, {kept, features}, dtype);
  std::vector<int64_t> lse_size{kept / tokens, heads, tokens};
  if (p.added.any()) lse_size.push_back(2);
  Tensor lse = new_empty(x, lse_size, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  if (training) {
    p.qkv_out = qkv_out.mutable_data_ptr();
    p.attended = attended.mutable_data_ptr();
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
  }
  if (out.numel() == 0) return {out, qkv_out, attended, lse};
  const PackedLinear qkv("qkv_weight", isa.packing, qkv_weight, qkv_bias, dtype, features, qkv_packed);
  const PackedLinear proj("proj_weight", isa.packing, proj_weight, proj_bias, dtype, features, proj_packed);
  STD_TORCH_CHECK(qkv.linear.out == packed_features, "qkv_weight: expected ", packed_features, " output features, got ",
                  qkv.linear.out);
  STD_TORCH_CHECK(proj.linear.out == features, "proj_weight: expected ", features, " output features, got ",
                  proj.linear.out);
  p.qkv = qkv.linear, p.proj = proj.linear;
  const std::vector<int64_t> index = cut.rows(images);
  p.index = cut.any() ? index.data() : nullptr;
  p.blocks_at_once = std::max<int64_t>(kRowsAtOnce / tokens, 1);
  const int64_t threads = torch::stable::get_num_threads();
  // A block is one thread's work. Where that leaves threads idle, the parts are divided one by one.
  if (4 * blocks >= 3 * ceil_div(blocks, threads) * threads)
    parallel_for(blocks, [&](int64_t begin, int64_t end) { isa.attention_layer(p, begin, end); });
  else
    attention_layer_by_parts(isa, p, blocks, qkv_out);
  return {out, qkv_out, attended, lse};
}

struct LinearGradients {
  Tensor dx, weight, bias;
};

// The gradients, as far as they are wanted, of x @ weight^T + bias for rows dout (rows, outs) and x (rows, ins).
LinearGradients linear_backward(const AttentionLayerKernels& isa, const char* name, const Tensor& weight,
                                const Tensor& dout, const Tensor& x, bool want_dx, LinearMask wanted) {
  const ScalarType dtype = dout.scalar_type();
  const int64_t rows = dout.size(0), outs = dout.size(1), ins = x.size(1);
  const PackedLinear linear = PackedLinear::transposed(name, isa.packing, weight, dtype, outs, ins);
  const int64_t chunk_rows = rows_of_chunk(isa.packing, rows, outs + ins);
  Gradient gradient(isa.packing, wanted, dout, outs, ins, chunk_rows);
  LinearBackward p{linear.linear};
  p.dout = rows_of("dout", dout, dtype, outs, p.dout_stride);
  p.x = rows_of("x", x, dtype, ins, p.x_stride);
  check_rows(x, rows);
  Tensor dx = want_dx ? torch::stable::new_empty(x, {rows, ins}) : nothing(x);
  if (want_dx) p.dx = dx.mutable_data_ptr();
  p.weight = gradient.p;
  backward_by_chunks(isa.packing, isa.linear_backward, p, rows, chunk_rows, {&gradient});
  return {dx, gradient.weight(dout), gradient.bias(dout)};
}

// For the gradient dout (rows, features) of proj(attention(qkv)) with qkv (rows, packed features) = qkv_layer(x): those
// of x, and of the weight and bias of the qkv layer, and of proj; of the bias that is added to the scores, and of their
// scales. Rows are those of blocks, also of windows. output_mask says which are wanted; the others are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_layer_cpp_bwd(
    Tensor dout, Tensor x, Tensor qkv, Tensor attended, Tensor lse, Tensor qkv_weight, Tensor proj_weight,
    std::optional<Tensor> bias, std::optional<Tensor> mask, std::optional<Tensor> scales,
    IntHeaderOnlyArrayRef windows, int64_t tokens, int64_t heads, int64_t kv_heads, double scale,
    std::vector<bool> output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 7, "output_mask: expected 7 bools, got ", output_mask.size());
  const bool want_dbias = output_mask[5], want_dscales = output_mask[6];
  STD_TORCH_CHECK(bias || !want_dbias, "output_mask: expected no gradient of a bias that is not there");
  STD_TORCH_CHECK(scales || !want_dscales, "output_mask: expected no gradient of scales that are not there");
  output_mask.resize(5);
  const BranchMask wanted(output_mask);
  const AttentionLayerKernels& isa = kernels_for(kKernels, "dout", dout.scalar_type());
  const int64_t rows = dout.size(0), features = dout.size(1), bytes = dout.element_size();
  const Heads cut(rows, features, tokens, heads, kv_heads);
  check_scales(scales, cut);
  const ScoreTables tables(bias, mask, scales, Windows(windows), rows / tokens, heads, tokens, true);
  const void* const qkv_data = kept_rows_of("qkv", qkv, dout, cut.packed_features());
  const void* const attended_data = kept_rows_of("attended", attended, dout, features);
  const float* const lse_data = lse_of(lse, rows * heads * (tables.added.any() ? 2 : 1));
  const bool want_dqkv = wanted.dx || wanted.first.any() || want_dbias || want_dscales;
  const LinearGradients proj =
      linear_backward(isa, "proj_weight", proj_weight, dout, attended, want_dqkv, wanted.second);
  const auto floats = [&](std::vector<int64_t> sizes) { return torch::stable::new_empty(x, sizes, ScalarType::Float); };
  if (!want_dqkv) return {nothing(x), nothing(x), nothing(x), proj.weight, proj.bias, floats({0}), floats({0})};
  Tensor dqkv = torch::stable::new_empty(qkv, {rows, cut.packed_features()});
  void* const dqkv_data = dqkv.mutable_data_ptr();
  Tensor unit = torch::stable::new_empty(qkv, {scales ? rows : 0, cut.packed_features()});
  const int64_t slice_rows = std::max<int64_t>(ceil_div(rows, kScaleSlices), 1);
  Tensor slices = floats({want_dscales ? ceil_div(rows, slice_rows) : 0, heads});
  UnitVectors vectors{cut, rows, slice_rows, qkv_data, unit.mutable_data_ptr(), dqkv_data, tables.added.scales};
  if (want_dscales) vectors.dscales = static_cast<float*>(slices.mutable_data_ptr());
  if (scales) parallel_for(rows, [&](int64_t begin, int64_t end) { isa.unit_vectors(vectors, begin, end); });
  const void* const multiplied = scales ? vectors.unit : qkv_data;
  BlockAttentionBackward p{cut.inputs(multiplied, bytes, static_cast<float>(scale)),
                           cut.whole(attended_data, bytes),
                           cut.whole(proj.dx.const_data_ptr(), bytes),
                           cut.q(dqkv_data, bytes),
                           cut.k(dqkv_data, bytes),
                           cut.v(dqkv_data, bytes),
                           lse_data,
                           rows / tokens,
                           kv_heads < heads ? heads : 1};
  p.added = tables.added;
  const BiasGradient dbias(p, dout, want_dbias);
  parallel_for(p.tasks(), [&](int64_t begin, int64_t end) { isa.attention.attend_backward(p, begin, end); });
  if (scales)
    parallel_for(ceil_div(rows, slice_rows),
                 [&](int64_t begin, int64_t end) { isa.unit_vectors_backward(vectors, begin, end); });
  Tensor dscales = floats({want_dscales ? heads : 0});
  float* const sums = static_cast<float*>(dscales.mutable_data_ptr());
  for (int64_t head = 0; head < dscales.numel(); ++head) {
    sums[head] = 0;
    for (int64_t slice = 0; slice < slices.size(0); ++slice) sums[head] += vectors.dscales[slice * heads + head];
  }
  const LinearGradients in = linear_backward(isa, "qkv_weight", qkv_weight, dqkv, x, wanted.dx, wanted.first);
  return {in.dx, in.weight, in.bias, proj.weight, proj.bias, dbias.sum(dout), dscales};
}

}  // namespace
}  // namespace nest_fast

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CPU, m) {
  m.impl("attention_layer_cpp", TORCH_BOX(&nest_fast::attention_layer_cpp));
  m.impl("attention_layer_cpp_bwd", TORCH_BOX(&nest_fast::attention_layer_cpp_bwd));
}
