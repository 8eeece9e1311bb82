// Block aggregation on the CPU: registration, checks, and the choice of the vector instructions.
// block_aggregate-inl.h has the computation.

#include "block_aggregate.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "sizes.h"
#include "threads.h"

#define NEST_FAST_KERNELS "block_aggregate-inl.h"
#include "foreach_isa.h"

namespace nest_fast {
namespace {

constexpr ByDtype<BlockAggregateKernels> kKernels[] = {NEST_FAST_BY_ISA(kBlockAggregate)};

// Pairs of rows for which a thread reads the filters, and computes again two rows that are another range's.
constexpr int64_t kPairsAtLeast = 7;

// --- checks ----------------------------------------------------------------------------------------------------------

// A contiguous (C',) of floats.
const float* vector(const char* name, const Tensor& x, int64_t channels) {
  check_dtype(name, x, ScalarType::Float);
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == channels && x.is_contiguous(), name, ": expected ", channels,
                  " contiguous floats");
  return static_cast<const float*>(x.const_data_ptr());
}

void check_dense(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1 || x.numel() == 0, name,
                  ": expected stride 1 of the last dimension, got ", x.stride(3));
}

// Blocks (B, T, N, C) on a grid, whose data may be written or not.
template <class Void>
Image<Void> blocks(const char* name, Void* data, const Tensor& x, Size2 grid, Size2 block) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == grid.h * grid.w && x.size(2) == block.h * block.w, name,
                  ": expected (B, T, N, C) with T = ", grid.h * grid.w, " and N = ", block.h * block.w);
  check_dense(name, x);
  Image<Void> image{data, x.stride(0)};
  for (int64_t h = 0; h < grid.h * block.h; ++h)
    image.rows.push_back(h / block.h * grid.w * x.stride(1) + h % block.h * block.w * x.stride(2));
  for (int64_t w = 0; w < grid.w * block.w; ++w)
    image.columns.push_back(w / block.w * x.stride(1) + w % block.w * x.stride(2));
  return image;
}

// An image (B, H, W, C).
template <class Void>
Image<Void> image(const char* name, Void* data, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, name, ": expected 4 dimensions (B, H, W, C), got ", x.dim());
  check_dense(name, x);
  Image<Void> image{data, x.stride(0)};
  for (int64_t h = 0; h < x.size(1); ++h) image.rows.push_back(h * x.stride(1));
  for (int64_t w = 0; w < x.size(2); ++w) image.columns.push_back(w * x.stride(2));
  return image;
}

// The grid of blocks that half of height x width is cut into.
Size2 half_grid(int64_t height, int64_t width, Size2 block) {
  STD_TORCH_CHECK(height % 2 == 0 && width % 2 == 0 && height / 2 % block.h == 0 && width / 2 % block.w == 0,
                  "out_block_size: expected (", block.h, ", ", block.w, ") to divide half of the image (", height, ", ",
                  width, ")");
  return {height / 2 / block.h, width / 2 / block.w};
}

// --- the operations --------------------------------------------------------------------------------------------------

// What both forwards take besides their input.
struct Parameters {
  const std::optional<Tensor>& conv_bias;
  const Tensor &norm_weight, &norm_bias;
  const std::optional<Tensor>& pos_embed;
  Size2 out_block;
  double eps;
  bool same, training;
};

// What both forwards give: mean, rstd and argmax are for the gradient, empty without `training`.
struct Outputs {
  Tensor out, mean, rstd, argmax;
};

// The bias as it was given, or as many zeros.
const float* conv_bias_of(const std::optional<Tensor>& conv_bias, int64_t channels, std::vector<float>& zeros) {
  if (conv_bias) return vector("conv_bias", *conv_bias, channels);
  zeros.resize(channels);
  return zeros.data();
}

// Sets what both forwards share. `like` (B, ...) gives the dtype. Outputs keep what `p` points to.
Outputs prepare(Aggregate& p, const Tensor& like, const Parameters& given) {
  const int64_t B = like.size(0), H = p.height, W = p.width, channels = p.out_channels;
  const Size2 out_block = given.out_block, grid = half_grid(H, W, out_block);
  const int64_t T = grid.h * grid.w, N = out_block.h * out_block.w, kept = given.training ? B : 0;
  p.conv_bias = conv_bias_of(given.conv_bias, channels, p.zeros);
  p.norm_weight = vector("norm_weight", given.norm_weight, channels);
  p.norm_bias = vector("norm_bias", given.norm_bias, channels);
  p.eps = static_cast<float>(given.eps);
  p.before = given.same ? 0 : 1;
  if (given.pos_embed) {
    const Tensor& pos_embed = *given.pos_embed;
    check_dtype("pos_embed", pos_embed, like.scalar_type());
    STD_TORCH_CHECK(pos_embed.dim() == 4 && pos_embed.size(0) == 1 && pos_embed.size(3) == channels,
                    "pos_embed: expected (1, T/4, N, C')");
    p.pos = blocks("pos_embed", pos_embed.const_data_ptr(), pos_embed, grid, out_block);
  }
  using torch::stable::new_empty;
  Tensor out = new_empty(like, {B, T, N, channels});
  Tensor mean = new_empty(like, {kept, H, W}, ScalarType::Float);
  Tensor rstd = new_empty(like, {kept, H, W}, ScalarType::Float);
  Tensor argmax = new_empty(like, {kept, T, N, channels}, ScalarType::Byte);
  p.out = blocks("out", out.mutable_data_ptr(), out, grid, out_block);
  p.mean = static_cast<float*>(mean.mutable_data_ptr());
  p.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  if (given.training) p.argmax = blocks("argmax", argmax.mutable_data_ptr(), argmax, grid, out_block);
  return {out, mean, rstd, argmax};
}

// The sizes of the filters as Winograd's algorithm takes them.
std::vector<int64_t> packed_size(const BlockAggregateKernels& isa, int64_t channels, int64_t out_channels) {
  return {ceil_div(out_channels, isa.nr), 16, round_up(ceil_div(channels, isa.vnni), isa.lanes), isa.nr};
}

// The filters of a convolution for Winograd's algorithm. In every call, or by the caller, who then answers for it that
// the weight is the same.
Tensor transform_filters(const BlockAggregateKernels& isa, int64_t channels, int64_t out_channels, const Tensor& like,
                         const void* weight, const int64_t (&stride)[4]) {
  Tensor transformed = torch::stable::new_empty(like, packed_size(isa, channels, out_channels), ScalarType::Float);
  const Filters filters{weight,
                        {stride[0], stride[1], stride[2], stride[3]},
                        channels,
                        out_channels,
                        static_cast<float*>(transformed.mutable_data_ptr())};
  parallel_for(transformed.size(0), [&](int64_t begin, int64_t end) { isa.transform_filters(filters, begin, end); });
  return transformed;
}

Tensor transform_filters(const BlockAggregateKernels& isa, const Tensor& weight) {
  return transform_filters(isa, weight.size(1), weight.size(0), weight, weight.const_data_ptr(),
                           {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)});
}

// conv_weight (C', C, 3, 3) as floats (groups, 16, K steps, NR), for the set of instructions in use.
Tensor pack_filters(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                  "weight: expected (C', C, 3, 3), got ", weight.dim(), " dimensions");
  return transform_filters(kernels_for(kKernels, "weight", weight.scalar_type()), weight);
}

// x (B, T, N, C), blocks on a grid; an image (B, H, W, C) is one block. Returns out (B, T', N', C') in blocks of
// out_block_size, and for the gradient, empty without `training`: the convolution's output y (B, H, W, C') without its
// bias, mean and rstd (B, H, W) of its pixels with it, and argmax, shaped as out, each maximum's index in its window.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> block_aggregate_cpp_fwd(
    Tensor x, Tensor conv_weight, std::optional<Tensor> conv_bias, Tensor norm_weight, Tensor norm_bias,
    std::optional<Tensor> pos_embed, IntHeaderOnlyArrayRef grid_size, IntHeaderOnlyArrayRef block_size,
    IntHeaderOnlyArrayRef out_block_size, double eps, bool same, bool training, std::optional<Tensor> conv_packed) {
  const BlockAggregateKernels& isa = kernels_for(kKernels, "x", x.scalar_type());
  const Size2 grid = size2("grid_size", grid_size), block = size2("block_size", block_size);
  Aggregate p{};
  p.x = blocks("x", x.const_data_ptr(), x, grid, block);
  p.height = grid.h * block.h, p.width = grid.w * block.w;
  p.channels = x.size(3), p.out_channels = conv_weight.size(0);
  check_dtype("conv_weight", conv_weight, x.scalar_type());
  STD_TORCH_CHECK(conv_weight.dim() == 4 && conv_weight.size(1) == p.channels && conv_weight.size(2) == 3 &&
                      conv_weight.size(3) == 3,
                  "conv_weight: expected (C', ", p.channels, ", 3, 3)");
  const int64_t B = x.size(0);
  const auto [out, mean, rstd, argmax] = prepare(
      p, x,
      {conv_bias, norm_weight, norm_bias, pos_embed, size2("out_block_size", out_block_size), eps, same, training});
  Tensor y = torch::stable::new_empty(x, {training ? B : 0, p.height, p.width, p.out_channels});
  p.y = image("y", y.mutable_data_ptr(), y);
  if (out.numel() == 0) return {out, y, mean, rstd, argmax};

  if (conv_packed) check_packed("conv_packed", *conv_packed, packed_size(isa, p.channels, p.out_channels));
  const Tensor filters = conv_packed ? *conv_packed : transform_filters(isa, conv_weight);
  p.filters = static_cast<const float*>(filters.const_data_ptr());
  parallel_for(
      B * p.height / 2, [&](int64_t begin, int64_t end) { isa.aggregate(p, begin, end); }, 1, kPairsAtLeast);
  return {out, y, mean, rstd, argmax};
}

// The same from the convolution's output y (B, H, W, C') without its bias on; y is not returned.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_pool_cpp_fwd(Tensor y, std::optional<Tensor> conv_bias,
                                                             Tensor norm_weight, Tensor norm_bias,
                                                             std::optional<Tensor> pos_embed,
                                                             IntHeaderOnlyArrayRef out_block_size, double eps,
                                                             bool same, bool training) {
  const BlockAggregateKernels& isa = kernels_for(kKernels, "y", y.scalar_type());
  Aggregate p{};
  p.given_y = image("y", y.const_data_ptr(), y);
  p.height = y.size(1), p.width = y.size(2), p.out_channels = y.size(3);
  const auto [out, mean, rstd, argmax] = prepare(
      p, y,
      {conv_bias, norm_weight, norm_bias, pos_embed, size2("out_block_size", out_block_size), eps, same, training});
  if (out.numel() > 0)
    parallel_for(y.size(0) * p.height / 2, [&](int64_t begin, int64_t end) { isa.norm_pool(p, begin, end); });
  return {out, mean, rstd, argmax};
}

// dout in blocks as out was returned; the rest as the forward took and gave it. Returns dy (B, H, W, C') in y's dtype,
// and (3, C') floats: gradients of norm_weight, norm_bias and conv_bias.
std::tuple<Tensor, Tensor> norm_pool_cpp_bwd(Tensor dout, Tensor y, std::optional<Tensor> conv_bias, Tensor norm_weight,
                                             Tensor mean, Tensor rstd, Tensor argmax,
                                             IntHeaderOnlyArrayRef out_block_size, bool same) {
  const BlockAggregateKernels& isa = kernels_for(kKernels, "y", y.scalar_type());
  check_dtype("dout", dout, y.scalar_type());
  NormPoolBackward p{};
  p.y = image("y", y.const_data_ptr(), y);
  const int64_t B = y.size(0);
  p.height = y.size(1), p.width = y.size(2), p.out_channels = y.size(3);
  p.before = same ? 0 : 1;
  const Size2 block = size2("out_block_size", out_block_size);
  const Size2 grid = half_grid(p.height, p.width, block);
  p.dout = blocks("dout", dout.const_data_ptr(), dout, grid, block);
  p.argmax = blocks("argmax", argmax.const_data_ptr(), argmax, grid, block);
  p.conv_bias = conv_bias_of(conv_bias, p.out_channels, p.zeros);
  p.norm_weight = vector("norm_weight", norm_weight, p.out_channels);
  check_dtype("mean", mean, ScalarType::Float);
  check_dtype("rstd", rstd, ScalarType::Float);
  check_dtype("argmax", argmax, ScalarType::Byte);
  STD_TORCH_CHECK(mean.numel() == B * p.height * p.width && rstd.numel() == mean.numel() && mean.is_contiguous() &&
                      rstd.is_contiguous(),
                  "mean, rstd: expected contiguous (B, H, W)");
  STD_TORCH_CHECK(
      dout.size(0) == B && dout.size(3) == p.out_channels && argmax.size(0) == B && argmax.size(3) == p.out_channels,
      "dout, argmax: expected the batch and channels of y");
  p.mean = static_cast<const float*>(mean.const_data_ptr());
  p.rstd = static_cast<const float*>(rstd.const_data_ptr());

  Tensor dy = torch::stable::new_empty(y, {B, p.height, p.width, p.out_channels});
  p.dy = image("dy", dy.mutable_data_ptr(), dy);
  Tensor dparams = torch::stable::new_empty(y, {3, p.out_channels}, ScalarType::Float);
  const int64_t rows = dy.numel() > 0 ? B * p.height : 0, sums = dparams.numel();
  Tensor partial = torch::stable::new_empty(y, {rows, 3, p.out_channels}, ScalarType::Float);
  p.partial_sums = static_cast<float*>(partial.mutable_data_ptr());
  parallel_for(rows, [&](int64_t begin, int64_t end) { isa.norm_pool_bwd(p, begin, end); });
  std::vector<double> row_sum(sums);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < sums; ++i) row_sum[i] += p.partial_sums[row * sums + i];
  std::copy(row_sum.begin(), row_sum.end(), static_cast<float*>(dparams.mutable_data_ptr()));
  return {dy, dparams};
}

// The gradient of the convolution's input, in blocks on a grid, from that of its output dy (B, H, W, C'): itself a
// convolution, with the weight's channels exchanged and its filters turned by half a circle.
Tensor block_aggregate_cpp_dx(Tensor dy, Tensor conv_weight, IntHeaderOnlyArrayRef grid_size,
                              IntHeaderOnlyArrayRef block_size) {
  const BlockAggregateKernels& isa = kernels_for(kKernels, "dy", dy.scalar_type());
  const Size2 grid = size2("grid_size", grid_size), block = size2("block_size", block_size);
  Aggregate p{};
  p.x = image("dy", dy.const_data_ptr(), dy);
  p.height = dy.size(1), p.width = dy.size(2), p.channels = dy.size(3);
  STD_TORCH_CHECK(p.height == grid.h * block.h && p.width == grid.w * block.w && p.height % 2 == 0 && p.width % 2 == 0,
                  "dy: expected an even height and width as grid_size and block_size say");
  check_dtype("conv_weight", conv_weight, dy.scalar_type());
  STD_TORCH_CHECK(conv_weight.dim() == 4 && conv_weight.size(0) == p.channels && conv_weight.size(2) == 3 &&
                      conv_weight.size(3) == 3,
                  "conv_weight: expected (", p.channels, ", C, 3, 3)");
  p.out_channels = conv_weight.size(1);
  Tensor dx = torch::stable::new_empty(dy, {dy.size(0), grid.h * grid.w, block.h * block.w, p.out_channels});
  p.out = blocks("dx", dx.mutable_data_ptr(), dx, grid, block);
  if (dx.numel() == 0) return dx;
  const int64_t rows = conv_weight.stride(2), columns = conv_weight.stride(3);
  const char* last = static_cast<const char*>(conv_weight.const_data_ptr()) +
                     2 * (rows + columns) * static_cast<int64_t>(conv_weight.element_size());
  const Tensor filters = transform_filters(isa, p.channels, p.out_channels, dy, last,
                                           {conv_weight.stride(1), conv_weight.stride(0), -rows, -columns});
  p.filters = static_cast<const float*>(filters.const_data_ptr());
  parallel_for(
      dy.size(0) * p.height / 2, [&](int64_t begin, int64_t end) { isa.convolve(p, begin, end); }, 1, kPairsAtLeast);
  return dx;
}

}  // namespace
}  // namespace nest_fast

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CPU, m) {
  m.impl("block_aggregate_cpp_dx", TORCH_BOX(&nest_fast::block_aggregate_cpp_dx));
  m.impl("block_aggregate_cpp_fwd", TORCH_BOX(&nest_fast::block_aggregate_cpp_fwd));
  m.impl("norm_pool_cpp_fwd", TORCH_BOX(&nest_fast::norm_pool_cpp_fwd));
  m.impl("norm_pool_cpp_bwd", TORCH_BOX(&nest_fast::norm_pool_cpp_bwd));
  m.impl("pack_filters", TORCH_BOX(&nest_fast::pack_filters));
}
