// What the CPU and the CUDA registration of blockify and its kin share: from tensors to an index map.
// The including file defines `fill`, the one function that differs.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "blockify.h"
#include "checks.h"

namespace nest_fast {
namespace {

// out = in gathered by `map`, + pos if there is one. `out` is contiguous and not empty.
void fill(IndexMap map, const Tensor& in, const std::optional<Tensor>& pos, const Tensor& out);

void check_pos(const std::optional<Tensor>& pos, const Tensor& x, int64_t T, int64_t N, int64_t C) {
  if (!pos) return;
  STD_TORCH_CHECK(
      pos->dim() == 4 && pos->size(0) == 1 && pos->size(1) == T && pos->size(2) == N && pos->size(3) == C &&
          pos->scalar_type() == x.scalar_type() && pos->device() == x.device() && pos->is_contiguous(),
      "pos_embed: expected a contiguous (1, T, N, C) tensor of x's dtype and device");
}

Tensor blockify(const Tensor& x, IntHeaderOnlyArrayRef block_size, const std::optional<Tensor>& pos) {
  const Size2 block = size2("block_size", block_size);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) % block.h == 0 && x.size(2) % block.w == 0,
                  "x: expected (B, H, W, C) that block_size divides");
  const Size2 grid = {x.size(1) / block.h, x.size(2) / block.w};
  const int64_t B = x.size(0), T = grid.h * grid.w, N = block.h * block.w, C = x.size(3);
  check_pos(pos, x, T, N, C);
  Tensor out = torch::stable::new_empty(x, {B, T, N, C});
  if (out.numel() > 0) fill(blockify_map(B, C, grid, block, x.strides().data(), pos.has_value()), x, pos, out);
  return out;
}

Tensor unblockify(const Tensor& x, IntHeaderOnlyArrayRef grid_size, IntHeaderOnlyArrayRef block_size,
                  const std::optional<Tensor>& pos) {
  const Size2 grid = size2("grid_size", grid_size, 0), block = size2("block_size", block_size);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == grid.h * grid.w && x.size(2) == block.h * block.w,
                  "x: expected (B, T, N, C) with T and N as grid_size and block_size say");
  const int64_t B = x.size(0), C = x.size(3);
  check_pos(pos, x, x.size(1), x.size(2), C);
  Tensor out = torch::stable::new_empty(x, {B, grid.h * block.h, grid.w * block.w, C});
  if (out.numel() > 0) fill(unblockify_map(B, C, grid, block, x.strides().data(), pos.has_value()), x, pos, out);
  return out;
}

Tensor patchify(const Tensor& x, IntHeaderOnlyArrayRef patch_size, IntHeaderOnlyArrayRef block_size) {
  const Size2 patch = size2("patch_size", patch_size), block = size2("block_size", block_size);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(2) % (block.h * patch.h) == 0 && x.size(3) % (block.w * patch.w) == 0,
                  "x: expected (B, C, H, W) that patch_size * block_size divides");
  const Size2 grid = {x.size(2) / (block.h * patch.h), x.size(3) / (block.w * patch.w)};
  const int64_t B = x.size(0), C = x.size(1);
  Tensor out = torch::stable::new_empty(x, {B, grid.h * grid.w, block.h * block.w, C * patch.h * patch.w});
  if (out.numel() > 0) fill(patchify_map(B, C, grid, block, patch, x.strides().data()), x, std::nullopt, out);
  return out;
}

Tensor unpatchify(const Tensor& x, IntHeaderOnlyArrayRef patch_size, IntHeaderOnlyArrayRef grid_size,
                  IntHeaderOnlyArrayRef block_size) {
  const Size2 patch = size2("patch_size", patch_size);
  const Size2 grid = size2("grid_size", grid_size, 0), block = size2("block_size", block_size);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == grid.h * grid.w && x.size(2) == block.h * block.w &&
                      x.size(3) % (patch.h * patch.w) == 0,
                  "x: expected (B, T, N, C * ph * pw) with T and N as grid_size and block_size say");
  const int64_t B = x.size(0), C = x.size(3) / (patch.h * patch.w);
  Tensor out = torch::stable::new_empty(x, {B, C, grid.h * block.h * patch.h, grid.w * block.w * patch.w});
  if (out.numel() > 0) fill(unpatchify_map(B, C, grid, block, patch, x.strides().data()), x, std::nullopt, out);
  return out;
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("blockify", TORCH_BOX(&blockify));
  m.impl("unblockify", TORCH_BOX(&unblockify));
  m.impl("patchify", TORCH_BOX(&patchify));
  m.impl("unpatchify", TORCH_BOX(&unpatchify));
}

}  // namespace
}  // namespace nest_fast
