// Block aggregation on the CPU: registration, checks, and the choice of the vector instructions.
// block_aggregate_cpu_kernel.h has the computation.

#include "cpu_dispatch.h"

namespace nest_fast {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

// An image, or the blocks of one: where each of its rows and columns begins, in elements. Channels are dense.
struct Image {
  void* data = nullptr;
  int64_t batch = 0;
  std::vector<int64_t> rows, columns;

  template <class T>
  T* at(int64_t b, int64_t h, int64_t w) const {
    return static_cast<T*>(data) + b * batch + rows[h] + columns[w];
  }
};

// The forward: of x if it is given, else of the convolution's output y.
struct Aggregate {
  int64_t height, width, channels, out_channels;  // of x; C'
  int64_t before;                                 // padding of the pool above and on the left
  Image x, y, pos, out;                           // pos.data is null where there is none
  const float *filters, *conv_bias, *norm_weight, *norm_bias;
  float eps;
  // For the gradient, data null where none is wanted; then y is written where x is given.
  float *mean, *rstd;
  Image argmax;
};

// The gradient down to the convolution's output.
struct NormPoolBwd {
  int64_t height, width, out_channels, before;
  Image dout, argmax, y, dy;
  const float *conv_bias, *norm_weight, *mean, *rstd;
  float* partial_sums;  // (B, H, 3, C') of dnorm_weight, dnorm_bias, dconv_bias: the same for any number of threads
};

struct Filters {
  const void* weight;
  int64_t stride[4];  // of output channels, input channels, rows, columns
  int64_t channels, out_channels;
  float* transformed;
};

#define NEST_FAST_KERNEL "block_aggregate_cpu_kernel.h"
#include "cpu_for_each_isa.h"

struct Kernels {
  void (*transform_filters)(const Filters&, int64_t begin, int64_t end);
  void (*aggregate)(const Aggregate&, int64_t begin, int64_t end);
  void (*convolve)(const Aggregate&, int64_t begin, int64_t end);
  void (*norm_pool)(const Aggregate&, int64_t begin, int64_t end);
  void (*norm_pool_bwd)(const NormPoolBwd&, int64_t begin, int64_t end);
  int64_t per_unit, lanes;
};

#define NEST_FAST_KERNELS(isa, op)                                                                  \
  {isa::transform_filters<isa::op>, isa::aggregate<isa::op>,                isa::convolve<isa::op>, \
   isa::norm_pool<isa::op::Element>, isa::norm_pool_bwd<isa::op::Element>, isa::op::kPerUnit, isa::kLanes}
constexpr ByDtype<Kernels> kKernels[] = {NEST_FAST_BY_ISA(NEST_FAST_KERNELS)};

// --- checks ----------------------------------------------------------------------------------------------------------

struct Size2 {
  int64_t h, w;
};

Size2 size2(const char* name, IntHeaderOnlyArrayRef size) {
  STD_TORCH_CHECK(size.size() == 2 && size[0] > 0 && size[1] > 0, name, ": wanted two positive sizes");
  return {size[0], size[1]};
}

// A contiguous (C',) of floats.
const float* vector(const char* name, const Tensor& x, int64_t channels) {
  check_dtype(name, x, ScalarType::Float);
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == channels && x.is_contiguous(), name, ": wanted ", channels,
                  " contiguous floats");
  return static_cast<const float*>(x.const_data_ptr());
}

void check_dense(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1 || x.numel() == 0, name,
                  ": wanted stride 1 of the last dimension, got ", x.stride(3));
}

// Blocks (B, T, N, C) on a grid.
Image blocks(const char* name, const Tensor& x, Size2 grid, Size2 block) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == grid.h * grid.w && x.size(2) == block.h * block.w, name,
                  ": wanted (B, T, N, C) with T = ", grid.h * grid.w, " and N = ", block.h * block.w);
  check_dense(name, x);
  Image image{const_cast<void*>(x.const_data_ptr()), x.stride(0)};
  for (int64_t h = 0; h < grid.h * block.h; ++h)
    image.rows.push_back(h / block.h * grid.w * x.stride(1) + h % block.h * block.w * x.stride(2));
  for (int64_t w = 0; w < grid.w * block.w; ++w)
    image.columns.push_back(w / block.w * x.stride(1) + w % block.w * x.stride(2));
  return image;
}

// An image (B, H, W, C).
Image image(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, name, ": wanted 4 dimensions (B, H, W, C), got ", x.dim());
  check_dense(name, x);
  Image image{const_cast<void*>(x.const_data_ptr()), x.stride(0)};
  for (int64_t h = 0; h < x.size(1); ++h) image.rows.push_back(h * x.stride(1));
  for (int64_t w = 0; w < x.size(2); ++w) image.columns.push_back(w * x.stride(2));
  return image;
}

// The grid of blocks that half of height x width is cut into.
Size2 half_grid(int64_t height, int64_t width, Size2 block) {
  STD_TORCH_CHECK(height % 2 == 0 && width % 2 == 0 && height / 2 % block.h == 0 && width / 2 % block.w == 0,
                  "out_block_size: wanted (", block.h, ", ", block.w, ") to divide half of the image (", height, ", ",
                  width, ")");
  return {height / 2 / block.h, width / 2 / block.w};
}

// --- the operations --------------------------------------------------------------------------------------------------

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // out, y, mean, rstd, argmax

// What both forwards share: parameters, outputs, and those for the gradient, empty without `training`. `like` gives the
// dtype. Returned tensors keep what `p` points to; `zeros` stands for a bias that is None.
Forward prepare(Aggregate& p, const Tensor& like, int64_t B, const std::optional<Tensor>& conv_bias,
                const Tensor& norm_weight, const Tensor& norm_bias, const std::optional<Tensor>& pos_embed,
                Size2 out_block, double eps, bool same, bool training, std::vector<float>& zeros) {
  const int64_t H = p.height, W = p.width, channels = p.out_channels;
  const Size2 grid = half_grid(H, W, out_block);
  const int64_t T = grid.h * grid.w, N = out_block.h * out_block.w;
  zeros.resize(conv_bias ? 0 : channels);
  p.conv_bias = conv_bias ? vector("conv_bias", *conv_bias, channels) : zeros.data();
  p.norm_weight = vector("norm_weight", norm_weight, channels);
  p.norm_bias = vector("norm_bias", norm_bias, channels);
  p.eps = static_cast<float>(eps);
  p.before = same ? 0 : 1;
  if (pos_embed) {
    check_dtype("pos_embed", *pos_embed, like.scalar_type());
    STD_TORCH_CHECK(pos_embed->dim() == 4 && pos_embed->size(0) == 1 && pos_embed->size(3) == channels,
                    "pos_embed: wanted (1, T/4, N, C')");
    p.pos = blocks("pos_embed", *pos_embed, grid, out_block);
  }
  using torch::stable::new_empty;
  Tensor out = new_empty(like, {B, T, N, channels});
  Tensor mean = new_empty(like, {training ? B : 0, H, W}, ScalarType::Float);
  Tensor rstd = new_empty(like, {training ? B : 0, H, W}, ScalarType::Float);
  Tensor argmax = new_empty(like, {training ? B : 0, T, N, channels}, ScalarType::Byte);
  p.out = blocks("out", out, grid, out_block);
  p.mean = static_cast<float*>(mean.mutable_data_ptr());
  p.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  if (training) p.argmax = blocks("argmax", argmax, grid, out_block);
  return {out, out, mean, rstd, argmax};
}

// The filters of the convolution for Winograd's algorithm, which p.filters then is. Transformed anew in every call: a
// remembered copy would not see a weight that is changed through its data.
Tensor transform_filters(const Kernels& isa, Aggregate& p, const Tensor& like, const void* weight,
                         const int64_t (&stride)[4]) {
  const int64_t pairs = (p.out_channels + 2 * isa.lanes - 1) / (2 * isa.lanes), width = isa.per_unit * isa.lanes;
  const int64_t units = (p.channels + width - 1) / width * isa.lanes;
  Tensor transformed = torch::stable::new_empty(like, {pairs, 16, units, 2 * isa.lanes}, ScalarType::Float);
  const Filters filters{weight,     {stride[0], stride[1], stride[2], stride[3]},
                        p.channels, p.out_channels,
                        static_cast<float*>(transformed.mutable_data_ptr())};
  p.filters = filters.transformed;
  torch::stable::parallel_for(0, pairs, 1,
                              [&](int64_t begin, int64_t end) { isa.transform_filters(filters, begin, end); });
  return transformed;
}

// x (B, T, N, C), blocks on a grid; an image (B, H, W, C) is one block. Returns out (B, T', N', C') in blocks of
// out_block_size, and for the gradient, empty without `training`: the convolution's output y (B, H, W, C') without its
// bias, mean and rstd (B, H, W) of its pixels with it, and argmax, shaped as out, each maximum's place in its window.
Forward block_aggregate_cpp_fwd(Tensor x, Tensor conv_weight, std::optional<Tensor> conv_bias, Tensor norm_weight,
                                Tensor norm_bias, std::optional<Tensor> pos_embed, IntHeaderOnlyArrayRef grid_size,
                                IntHeaderOnlyArrayRef block_size, IntHeaderOnlyArrayRef out_block_size, double eps,
                                bool same, bool training) {
  const Kernels& isa = kernels_for(kKernels, "x", x.scalar_type());
  const Size2 grid = size2("grid_size", grid_size), block = size2("block_size", block_size);
  Aggregate p{};
  p.x = blocks("x", x, grid, block);
  p.height = grid.h * block.h, p.width = grid.w * block.w;
  p.channels = x.size(3), p.out_channels = conv_weight.size(0);
  check_dtype("conv_weight", conv_weight, x.scalar_type());
  STD_TORCH_CHECK(conv_weight.dim() == 4 && conv_weight.size(1) == p.channels && conv_weight.size(2) == 3 &&
                      conv_weight.size(3) == 3,
                  "conv_weight: wanted (C', ", p.channels, ", 3, 3)");
  const int64_t B = x.size(0);
  std::vector<float> zeros;
  auto [out, _, mean, rstd, argmax] =
      prepare(p, x, B, conv_bias, norm_weight, norm_bias, pos_embed, size2("out_block_size", out_block_size), eps, same,
              training, zeros);
  Tensor y = torch::stable::new_empty(x, {training ? B : 0, p.height, p.width, p.out_channels});
  p.y = image("y", y);
  if (out.numel() == 0) return {out, y, mean, rstd, argmax};

  const int64_t strides[] = {conv_weight.stride(0), conv_weight.stride(1), conv_weight.stride(2),
                             conv_weight.stride(3)};
  const Tensor filters = transform_filters(isa, p, conv_weight, conv_weight.const_data_ptr(), strides);
  torch::stable::parallel_for(0, B * p.height / 2, 1,
                              [&](int64_t begin, int64_t end) { isa.aggregate(p, begin, end); });
  return {out, y, mean, rstd, argmax};
}

// The same from the convolution's output y (B, H, W, C') without its bias on; y is not returned.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_pool_cpp_fwd(Tensor y, std::optional<Tensor> conv_bias,
                                                             Tensor norm_weight, Tensor norm_bias,
                                                             std::optional<Tensor> pos_embed,
                                                             IntHeaderOnlyArrayRef out_block_size, double eps,
                                                             bool same, bool training) {
  const Kernels& isa = kernels_for(kKernels, "y", y.scalar_type());
  Aggregate p{};
  p.y = image("y", y);
  p.height = y.size(1), p.width = y.size(2), p.out_channels = y.size(3);
  std::vector<float> zeros;
  auto [out, _, mean, rstd, argmax] =
      prepare(p, y, y.size(0), conv_bias, norm_weight, norm_bias, pos_embed, size2("out_block_size", out_block_size),
              eps, same, training, zeros);
  if (out.numel() > 0)
    torch::stable::parallel_for(0, y.size(0) * p.height / 2, 1,
                                [&](int64_t begin, int64_t end) { isa.norm_pool(p, begin, end); });
  return {out, mean, rstd, argmax};
}

// dout in blocks as out was returned; the rest as the forward took and gave it. Returns dy (B, H, W, C') in y's dtype,
// and (3, C') floats: gradients of norm_weight, norm_bias and conv_bias.
std::tuple<Tensor, Tensor> norm_pool_cpp_bwd(Tensor dout, Tensor y, std::optional<Tensor> conv_bias, Tensor norm_weight,
                                             Tensor mean, Tensor rstd, Tensor argmax,
                                             IntHeaderOnlyArrayRef out_block_size, bool same) {
  const Kernels& isa = kernels_for(kKernels, "y", y.scalar_type());
  check_dtype("dout", dout, y.scalar_type());
  NormPoolBwd p{};
  p.y = image("y", y);
  const int64_t B = y.size(0);
  p.height = y.size(1), p.width = y.size(2), p.out_channels = y.size(3);
  p.before = same ? 0 : 1;
  const Size2 block = size2("out_block_size", out_block_size);
  const Size2 grid = half_grid(p.height, p.width, block);
  p.dout = blocks("dout", dout, grid, block);
  p.argmax = blocks("argmax", argmax, grid, block);
  std::vector<float> zeros(conv_bias ? 0 : p.out_channels);
  p.conv_bias = conv_bias ? vector("conv_bias", *conv_bias, p.out_channels) : zeros.data();
  p.norm_weight = vector("norm_weight", norm_weight, p.out_channels);
  check_dtype("mean", mean, ScalarType::Float);
  check_dtype("rstd", rstd, ScalarType::Float);
  check_dtype("argmax", argmax, ScalarType::Byte);
  STD_TORCH_CHECK(mean.numel() == B * p.height * p.width && rstd.numel() == mean.numel() && mean.is_contiguous() &&
                      rstd.is_contiguous(),
                  "mean, rstd: wanted contiguous (B, H, W)");
  STD_TORCH_CHECK(dout.size(0) == B && dout.size(3) == p.out_channels && argmax.size(0) == B &&
                      argmax.size(3) == p.out_channels,
                  "dout, argmax: wanted the batch and channels of y");
  p.mean = static_cast<const float*>(mean.const_data_ptr());
  p.rstd = static_cast<const float*>(rstd.const_data_ptr());

  Tensor dy = torch::stable::new_empty(y, {B, p.height, p.width, p.out_channels});
  p.dy = image("dy", dy);
  Tensor dparams = torch::stable::new_empty(y, {3, p.out_channels}, ScalarType::Float);
  const int64_t rows = dy.numel() > 0 ? B * p.height : 0, sums = dparams.numel();
  Tensor partial = torch::stable::new_empty(y, {rows, 3, p.out_channels}, ScalarType::Float);
  p.partial_sums = static_cast<float*>(partial.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { isa.norm_pool_bwd(p, begin, end); });
  std::vector<double> totals(sums);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < sums; ++i) totals[i] += p.partial_sums[row * sums + i];
  std::copy(totals.begin(), totals.end(), static_cast<float*>(dparams.mutable_data_ptr()));
  return {dy, dparams};
}

// The gradient of the convolution's input, in blocks on a grid, from that of its output dy (B, H, W, C'): itself a
// convolution, with the weight's channels exchanged and its filters turned by half a circle.
Tensor block_aggregate_cpp_dx(Tensor dy, Tensor conv_weight, IntHeaderOnlyArrayRef grid_size,
                              IntHeaderOnlyArrayRef block_size) {
  const Kernels& isa = kernels_for(kKernels, "dy", dy.scalar_type());
  const Size2 grid = size2("grid_size", grid_size), block = size2("block_size", block_size);
  Aggregate p{};
  p.x = image("dy", dy);
  p.height = dy.size(1), p.width = dy.size(2), p.channels = dy.size(3);
  STD_TORCH_CHECK(p.height == grid.h * block.h && p.width == grid.w * block.w && p.height % 2 == 0 && p.width % 2 == 0,
                  "dy: wanted an even height and width as grid_size and block_size say");
  check_dtype("conv_weight", conv_weight, dy.scalar_type());
  STD_TORCH_CHECK(conv_weight.dim() == 4 && conv_weight.size(0) == p.channels && conv_weight.size(2) == 3 &&
                      conv_weight.size(3) == 3,
                  "conv_weight: wanted (", p.channels, ", C, 3, 3)");
  p.out_channels = conv_weight.size(1);
  Tensor dx = torch::stable::new_empty(dy, {dy.size(0), grid.h * grid.w, block.h * block.w, p.out_channels});
  p.out = blocks("dx", dx, grid, block);
  if (dx.numel() == 0) return dx;
  const int64_t rows = conv_weight.stride(2), columns = conv_weight.stride(3);
  const char* last = static_cast<const char*>(conv_weight.const_data_ptr()) +
                     2 * (rows + columns) * static_cast<int64_t>(conv_weight.element_size());
  const Tensor filters =
      transform_filters(isa, p, dy, last, {conv_weight.stride(1), conv_weight.stride(0), -rows, -columns});
  torch::stable::parallel_for(0, dy.size(0) * p.height / 2, 1,
                              [&](int64_t begin, int64_t end) { isa.convolve(p, begin, end); });
  return dx;
}

}  // namespace
}  // namespace nest_fast

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CPU, m) {
  m.impl("block_aggregate_cpp_dx", TORCH_BOX(&nest_fast::block_aggregate_cpp_dx));
  m.impl("block_aggregate_cpp_fwd", TORCH_BOX(&nest_fast::block_aggregate_cpp_fwd));
  m.impl("norm_pool_cpp_fwd", TORCH_BOX(&nest_fast::norm_pool_cpp_fwd));
  m.impl("norm_pool_cpp_bwd", TORCH_BOX(&nest_fast::norm_pool_cpp_bwd));
}
