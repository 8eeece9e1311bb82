// Block-local attention on the CPU and its backward: registration, checks, and the choice of the vector instructions.
// block_attention-inl.h and block_attention_backward-inl.h have the computation.

#include "block_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "added_scores.h"
#include "checks.h"
#include "dispatch.h"
#include "threads.h"
#include "windows.h"

#define NEST_FAST_KERNELS "block_attention_backward-inl.h"
#include "foreach_isa.h"

namespace nest_fast {
namespace {

constexpr ByDtype<BlockAttentionKernels> kKernels[] = {NEST_FAST_BY_ISA(kBlockAttention)};

// any_dim: of the last dimension.
void check_operand(const char* name, const Tensor& x, const Tensor& q, bool any_dim) {
  STD_TORCH_CHECK(x.dim() == 5, name, ": expected 5 dimensions (B, T, N, heads, head_dim), got ", x.dim());
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, ": expected dtype ", toString(q.scalar_type()),
                  " as q has, got ", toString(x.scalar_type()));
  for (int i : {0, 1, 2, 4})
    STD_TORCH_CHECK(x.size(i) == q.size(i) || (i == 4 && any_dim), name, ": expected size ", q.size(i),
                    " of dimension ", i, " as q has, got ", x.size(i));
  STD_TORCH_CHECK(x.size(3) == q.size(3) || x.size(3) == 1, name, ": expected ", q.size(3), " heads or 1, got ",
                  x.size(3));
  STD_TORCH_CHECK(x.stride(4) == 1 || x.size(4) == 1, name, ": expected stride 1 of the last dimension, got ",
                  x.stride(4));
}

template <class Void>
Operand<Void> operand(Void* data, const Tensor& x) {
  const int64_t head_stride = x.size(3) == 1 ? 0 : x.stride(3);
  return {data, x.stride(0), x.stride(1), x.stride(2), head_stride};
}

Input input(const char* name, const Tensor& x, const Tensor& q, bool any_dim = false) {
  check_operand(name, x, q, any_dim);
  return operand(x.const_data_ptr(), x);
}

// The same of a tensor that has as many heads as q.
Input whole_input(const char* name, const Tensor& x, const Tensor& q, bool any_dim = false) {
  const Input result = input(name, x, q, any_dim);
  STD_TORCH_CHECK(x.size(3) == q.size(3), name, ": expected ", q.size(3), " heads as q has, got ", x.size(3));
  return result;
}

Output output(const Tensor& x) { return operand(x.mutable_data_ptr(), x); }

Tensor new_like(const Tensor& x, int64_t dim) {
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3), dim});
}
Tensor new_like(const Tensor& x) { return new_like(x, x.size(4)); }

void check_head_dim(const Tensor& q) { STD_TORCH_CHECK(q.size(4) > 0, "q: expected a head_dim of at least 1, got 0"); }

ScoreTables tables_of(const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, const Windows& windows,
                      const AttentionInputs& p, bool transposed) {
  return ScoreTables(bias, mask, std::nullopt, windows, p.blocks, p.heads, p.tokens, transposed);
}

// A row (1, heads, dim) for padding of x; null where there is none.
Input pad_of(const char* name, const std::optional<Tensor>& pad, const Tensor& x) {
  if (!pad) return {};
  check_dtype(name, *pad, x.scalar_type());
  STD_TORCH_CHECK(pad->dim() == 3 && pad->size(0) == 1 && pad->size(1) == x.size(3) && pad->size(2) == x.size(4) &&
                      pad->is_contiguous(),
                  name, ": expected (1, ", x.size(3), ", ", x.size(4), "), contiguous");
  return {pad->const_data_ptr(), 0, 0, 0, x.size(3) == 1 ? 0 : x.size(4)};
}

// row_scores (B, T, N, heads, rows) and column_scores (B, T, N, heads, columns) of rows * columns = N keys.
RelativePositions positions_of(const Tensor& row_scores, const Tensor& column_scores, const Tensor& q, int64_t tokens) {
  const int64_t rows = row_scores.size(4), columns = column_scores.size(4);
  const RelativePositions positions{whole_input("rel_h", row_scores, q, true),
                                    whole_input("rel_w", column_scores, q, true), rows, columns};
  STD_TORCH_CHECK(rows * columns == tokens, "rel_w: expected ", tokens, " keys in ", rows, " rows, got ", columns,
                  " in each");
  return positions;
}

// q (B, T, N, heads, head_dim), k and v the same or with one head, v with any head_dim, which out has, too; fp32, fp16
// or bf16. Added to the scores, fp32, are bias (heads, N, N) and mask (groups, N, N), or with neither of them rel_h and
// rel_w, both or none, by the row and the column of a key. With windows all but bias and mask are images (B, 1, H * W,
// heads, ...), the blocks are its windows, and pad_k and pad_v (1, their heads, dim) are padding's. Returns out like q,
// contiguous, and lse, fp32: (B, T, heads, N), the natural logarithm of the sum of exp(scale * q @ k^T), or with
// anything added as AddedScores has it (B, T, heads, N, 2).
std::tuple<Tensor, Tensor> block_attention_cpp_fwd(Tensor q, Tensor k, Tensor v, std::optional<Tensor> rel_h,
                                                   std::optional<Tensor> rel_w, std::optional<Tensor> bias,
                                                   std::optional<Tensor> mask, std::optional<Tensor> pad_k,
                                                   std::optional<Tensor> pad_v, double scale,
                                                   IntHeaderOnlyArrayRef windows) {
  BlockAttention p{};
  p.q = input("q", q, q), p.k = input("k", k, q), p.v = input("v", v, q, true);
  p.blocks = q.size(1), p.tokens = q.size(2), p.heads = q.size(3), p.dim = q.size(4), p.v_dim = v.size(4);
  p.scale = static_cast<float>(scale);
  const Windows cut(windows);
  const std::vector<int64_t> rows = cut.rows(1);
  if (cut.any()) {
    STD_TORCH_CHECK(q.size(1) == 1, "q: expected one block, an image, beside windows, got ", q.size(1));
    STD_TORCH_CHECK(q.size(2) == cut.image.h * cut.image.w, "windows: expected an image of ", q.size(2),
                    " tokens as q has, got ", cut.image.h * cut.image.w);
    p.blocks = cut.count(), p.tokens = cut.tokens();
    p.gathered = {rows.data(), pad_of("pad_k", pad_k, k), pad_of("pad_v", pad_v, v)};
  }

  const BlockAttentionKernels& isa = kernels_for(kKernels, "q", q.scalar_type());
  check_head_dim(q);
  const ScoreTables tables = tables_of(bias, mask, cut, p, false);
  p.added = tables.added;
  STD_TORCH_CHECK(rel_h.has_value() == rel_w.has_value(), "rel_w: expected as rel_h, None or not");
  STD_TORCH_CHECK(!(rel_h && p.added.any()), "rel_h: expected None beside a bias or mask");
  if (rel_h) p.positions = positions_of(*rel_h, *rel_w, q, p.tokens);

  Tensor out = new_like(q, p.v_dim);
  std::vector<int64_t> lse_size{q.size(0), p.blocks, p.heads, p.tokens};
  if (p.adds()) lse_size.push_back(2);
  Tensor lse = torch::stable::new_empty(q, lse_size, ScalarType::Float);
  p.out = output(out);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  const int64_t heads = q.size(0) * p.blocks * p.heads;
  if (heads > 0 && p.tokens > 0 && p.v_dim > 0)
    parallel_for(heads * isa.row_blocks_per_head(p.tokens),
                 [&](int64_t begin, int64_t end) { isa.attend(p, begin, end); });
  return {out, lse};
}

// The gradients dq, dk and dv, contiguous, of block_attention_cpp_fwd's out, and that of bias, fp32, if it is wanted;
// dout like out, out and lse from it.
std::tuple<Tensor, Tensor, Tensor, Tensor> block_attention_cpp_bwd(Tensor dout, Tensor q, Tensor k, Tensor v,
                                                                   Tensor out, Tensor lse, std::optional<Tensor> bias,
                                                                   std::optional<Tensor> mask, double scale,
                                                                   bool need_dbias) {
  BlockAttentionBackward p{};
  p.q = input("q", q, q), p.k = input("k", k, q), p.v = input("v", v, q);
  p.out = whole_input("out", out, q), p.dout = whole_input("dout", dout, q);
  p.blocks = q.size(1), p.tokens = q.size(2), p.heads = q.size(3), p.dim = q.size(4);
  p.scale = static_cast<float>(scale);
  const BlockAttentionKernels& isa = kernels_for(kKernels, "q", q.scalar_type());
  check_head_dim(q);
  STD_TORCH_CHECK(bias || !need_dbias, "need_dbias: expected a bias for its gradient");
  const ScoreTables tables = tables_of(bias, mask, Windows{IntHeaderOnlyArrayRef()}, p, true);
  p.added = tables.added;
  p.all_blocks = q.size(0) * q.size(1);
  p.lse = lse_of(lse, p.all_blocks * p.heads * p.tokens * (p.added.any() ? 2 : 1));

  Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  p.dq = output(dq), p.dk = output(dk), p.dv = output(dv);
  const bool any = p.all_blocks * p.heads > 0 && p.tokens > 0;
  // The heads that share a gradient are one task.
  p.task_heads = std::max<int64_t>(k.size(3) < p.heads || v.size(3) < p.heads ? p.heads : 1, 1);
  p.task_blocks = 1;
  const BiasGradient dbias(p, q, need_dbias && any);
  if (any) parallel_for(p.tasks(), [&](int64_t begin, int64_t end) { isa.attend_backward(p, begin, end); });
  Tensor db = dbias.sum(q);
  if (need_dbias && !any) {
    db = torch::stable::new_empty(*bias, {p.heads, p.tokens, p.tokens});
    torch::stable::zero_(db);
  }
  return {dq, dk, dv, db};
}

}  // namespace
}  // namespace nest_fast

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CPU, m) {
  m.impl("block_attention_cpp_fwd", TORCH_BOX(&nest_fast::block_attention_cpp_fwd));
  m.impl("block_attention_cpp_bwd", TORCH_BOX(&nest_fast::block_attention_cpp_bwd));
}
