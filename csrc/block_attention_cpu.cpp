// Block-local attention on the CPU and its backward: registration, checks, and the choice of the vector instructions.
// block_attention_cpu_kernel.h has the computation.

#include "block_attention_cpu.h"

namespace nest_fast {
namespace {

#define NEST_FAST_KERNEL "block_attention_cpu_kernel.h"
#include "cpu_for_each_isa.h"

struct Kernels {
  int64_t (*strips_per_head)(int64_t tokens);
  void (*attend)(const BlockAttention&, int64_t begin, int64_t end);  // strips [begin, end) of query rows
  void (*attend_backward)(const BlockAttentionBackward&, int64_t begin, int64_t end);  // heads [begin, end)
};

#define NEST_FAST_KERNELS(isa, op) {isa::strips_per_head, isa::attend<isa::op>, isa::attend_backward<isa::op>}
constexpr ByDtype<Kernels> kKernels[] = {NEST_FAST_BY_ISA(NEST_FAST_KERNELS)};

Operand operand(const char* name, const Tensor& x, const Tensor& q) {
  STD_TORCH_CHECK(x.dim() == 5, name, ": wanted 5 dimensions (B, T, N, heads, head_dim), got ", x.dim());
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, ": wanted dtype ", toString(q.scalar_type()),
                  " as q has, got ", toString(x.scalar_type()));
  for (int i : {0, 1, 2, 4})
    STD_TORCH_CHECK(x.size(i) == q.size(i), name, ": wanted size ", q.size(i), " of dimension ", i, " as q has, got ",
                    x.size(i));
  STD_TORCH_CHECK(x.size(3) == q.size(3) || x.size(3) == 1, name, ": wanted ", q.size(3), " heads or 1, got ",
                  x.size(3));
  STD_TORCH_CHECK(x.stride(4) == 1 || x.size(4) == 1, name, ": wanted stride 1 of the last dimension, got ",
                  x.stride(4));
  const int64_t head_stride = x.size(3) == 1 ? 0 : x.stride(3);
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2), head_stride};
}

// The same of a tensor that has as many heads as q.
Operand whole_operand(const char* name, const Tensor& x, const Tensor& q) {
  const Operand result = operand(name, x, q);
  STD_TORCH_CHECK(x.size(3) == q.size(3), name, ": wanted ", q.size(3), " heads as q has, got ", x.size(3));
  return result;
}

Tensor new_like(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)});
}

void check_head_dim(const Tensor& q) {
  STD_TORCH_CHECK(q.size(4) > 0, "q: wanted a head_dim of at least 1, got 0");
}

// q (B, T, N, heads, head_dim), k and v the same or with one head; fp32, fp16 or bf16. Returns out like q, contiguous,
// and lse (B, T, heads, N), the natural logarithm of the sum of exp(scale * q @ k^T), fp32.
std::tuple<Tensor, Tensor> block_attention_cpp_fwd(Tensor q, Tensor k, Tensor v, double scale) {
  BlockAttention p{};
  p.q = operand("q", q, q), p.k = operand("k", k, q), p.v = operand("v", v, q);
  p.blocks = q.size(1), p.tokens = q.size(2), p.heads = q.size(3), p.dim = q.size(4);
  p.scale = static_cast<float>(scale);

  const Kernels& kernels = kernels_for(kKernels, "q", q.scalar_type());
  check_head_dim(q);

  Tensor out = new_like(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(3), q.size(2)}, ScalarType::Float);
  p.out = operand("out", out, q);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  const int64_t heads = q.size(0) * q.size(1) * q.size(3);
  if (heads > 0 && p.tokens > 0)
    torch::stable::parallel_for(0, heads * kernels.strips_per_head(p.tokens), 1,
                                [&](int64_t begin, int64_t end) { kernels.attend(p, begin, end); });
  return {out, lse};
}

// The gradients dq, dk and dv, contiguous, of block_attention_cpp_fwd's out; dout like it, out and lse from it.
std::tuple<Tensor, Tensor, Tensor> block_attention_cpp_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
                                                           Tensor lse, double scale) {
  BlockAttentionBackward p{};
  p.q = operand("q", q, q), p.k = operand("k", k, q), p.v = operand("v", v, q);
  p.out = whole_operand("out", out, q), p.dout = whole_operand("dout", dout, q);
  p.blocks = q.size(1), p.tokens = q.size(2), p.heads = q.size(3), p.dim = q.size(4);
  p.scale = static_cast<float>(scale);
  const Kernels& kernels = kernels_for(kKernels, "q", q.scalar_type());
  check_head_dim(q);
  const int64_t blocks = q.size(0) * q.size(1);
  p.lse = lse_of(lse, blocks * p.heads * p.tokens);

  Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  p.dq = operand("dq", dq, q), p.dk = operand("dk", dk, q), p.dv = operand("dv", dv, q);
  // The heads that share a gradient are one task.
  const int64_t together = k.size(3) < p.heads || v.size(3) < p.heads ? p.heads : 1;
  if (blocks * p.heads > 0 && p.tokens > 0)
    torch::stable::parallel_for(0, blocks * p.heads / together, 1, [&](int64_t begin, int64_t end) {
      kernels.attend_backward(p, begin * together, end * together);
    });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace nest_fast

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CPU, m) {
  m.impl("block_attention_cpp_fwd", TORCH_BOX(&nest_fast::block_attention_cpp_fwd));
  m.impl("block_attention_cpp_bwd", TORCH_BOX(&nest_fast::block_attention_cpp_bwd));
}
