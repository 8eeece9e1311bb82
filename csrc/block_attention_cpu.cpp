// Forward of block-local attention on the CPU: registration, checks, and the choice of the vector instructions.
// block_attention_cpu_kernel.h has the computation.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>

// Each kernel is compiled for its own target inside this one file, in GCC's way.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11 && !defined(__clang__)
#define NEST_FAST_X86 1
#include <immintrin.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// A (batch, blocks, tokens, heads, dim) tensor whose last dimension is dense; strides in elements.
struct Operand {
  void* data;
  int64_t batch_stride, block_stride, token_stride, head_stride;

  template <class T>
  T* at(int64_t batch, int64_t block, int64_t head) const {
    return static_cast<T*>(data) + batch * batch_stride + block * block_stride + head * head_stride;
  }
};

struct BlockAttention {
  Operand q, k, v, out;
  float* lse;  // (batch, blocks, heads, tokens), contiguous
  int64_t blocks, tokens, heads, dim;
  float scale;
};

#ifdef NEST_FAST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "block_attention_cpu_avx2.h"
#include "block_attention_cpu_kernel.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
namespace avx512 {
#include "block_attention_cpu_avx512.h"
#include "block_attention_cpu_kernel.h"
}  // namespace avx512
#pragma GCC target("avx512bf16")
namespace avx512_bf16 {
#include "block_attention_cpu_avx512.h"
#include "block_attention_cpu_avx512_bf16.h"
#include "block_attention_cpu_kernel.h"
}  // namespace avx512_bf16
#pragma GCC pop_options
#endif

// How one kind of processor computes: per dtype, a function for strips [begin, end) of query rows.
struct Target {
  using Attend = void (*)(const BlockAttention&, int64_t begin, int64_t end);
  const char* isa;
  bool supported;
  int64_t (*strips_per_head)(int64_t tokens);
  Attend fp32, fp16, bf16;
};

// The best first; the last, without kernels, is for a processor that has none of the others.
const Target* targets() {
#ifdef NEST_FAST_X86
  static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  static const Target all[] = {
#ifdef NEST_FAST_X86
      {"avx512_bf16", has_bf16, avx512::strips_per_head, avx512::attend<avx512::Floats<float>>,
       avx512::attend<avx512::Floats<Half>>, avx512_bf16::attend<avx512_bf16::PairsOfBFloat16>},
      {"avx512", has_avx512, avx512::strips_per_head, avx512::attend<avx512::Floats<float>>,
       avx512::attend<avx512::Floats<Half>>, avx512::attend<avx512::Floats<BFloat16>>},
      {"avx2", has_avx2, avx2::strips_per_head, avx2::attend<avx2::Floats<float>>, avx2::attend<avx2::Floats<Half>>,
       avx2::attend<avx2::Floats<BFloat16>>},
#endif
      {"", true, nullptr, nullptr, nullptr, nullptr},
  };
  return all;
}

const Target* best_target() {
  const Target* target = targets();
  while (!target->supported) ++target;
  return target;
}

std::atomic<const Target*>& current_target() {
  static std::atomic<const Target*> target{best_target()};
  return target;
}

std::string block_attention_cpp_isa() { return current_target().load()->isa; }

void block_attention_cpp_set_isa(std::string isa) {
  for (const Target* target = targets();; ++target) {
    if (target->supported && isa == target->isa) return current_target().store(target);
    STD_TORCH_CHECK(target->isa[0], "isa: wanted one that this processor has, got \"", isa, "\"");
  }
}

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

// q (B, T, N, heads, head_dim), k and v the same or with one head; fp32, fp16 or bf16. Returns out like q, contiguous,
// and lse (B, T, heads, N), the natural logarithm of the sum of exp(scale * q @ k^T), fp32.
std::tuple<Tensor, Tensor> block_attention_cpp_fwd(Tensor q, Tensor k, Tensor v, double scale) {
  BlockAttention p{};
  p.q = operand("q", q, q), p.k = operand("k", k, q), p.v = operand("v", v, q);
  p.blocks = q.size(1), p.tokens = q.size(2), p.heads = q.size(3), p.dim = q.size(4);
  p.scale = static_cast<float>(scale);

  const Target* target = current_target().load();
  STD_TORCH_CHECK(target->isa[0], "block_attention: wanted a processor with AVX2 or AVX-512 and a build by GCC 11 or "
                                  "later, got another");
  const ScalarType dtype = q.scalar_type();
  const Target::Attend attend = dtype == ScalarType::Float      ? target->fp32
                                : dtype == ScalarType::Half     ? target->fp16
                                : dtype == ScalarType::BFloat16 ? target->bf16
                                                                : nullptr;
  STD_TORCH_CHECK(attend, "q: wanted dtype Float, Half or BFloat16, got ", toString(dtype));
  STD_TORCH_CHECK(p.dim > 0, "q: wanted a head_dim of at least 1, got 0");

  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3), q.size(4)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(3), q.size(2)}, ScalarType::Float);
  p.out = operand("out", out, q);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  const int64_t heads = q.size(0) * q.size(1) * q.size(3);
  if (heads > 0 && p.tokens > 0)
    torch::stable::parallel_for(0, heads * target->strips_per_head(p.tokens), 1,
                                [&](int64_t begin, int64_t end) { attend(p, begin, end); });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CPU, m) { m.impl("block_attention_cpp_fwd", TORCH_BOX(&block_attention_cpp_fwd)); }

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CompositeExplicitAutograd, m) {
  m.impl("block_attention_cpp_isa", TORCH_BOX(&block_attention_cpp_isa));
  m.impl("block_attention_cpp_set_isa", TORCH_BOX(&block_attention_cpp_set_isa));
}
