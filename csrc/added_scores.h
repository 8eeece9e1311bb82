// What is added to an attention's scores, as its kernels read it, and the gradient of a bias.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "block_attention.h"
#include "checks.h"
#include "sizes.h"
#include "threads.h"
#include "windows.h"

namespace nest_fast {

inline constexpr int64_t kTableLanes = 16;  // of the widest vectors
inline constexpr int64_t kBiasTasks = 64;   // at least so many, where there are so many blocks, sum a bias's gradient

inline int64_t columns_of(int64_t tokens) { return round_up(tokens, kTableLanes); }

// bias (heads, N, N) and mask (groups, N, N), fp32 and contiguous, as tables of whole vectors, for a backward
// transposed; and scales (heads,), which are read where they are. Without a mask, that of shifted windows.
class ScoreTables {
 public:
  AddedScores added{};

  ScoreTables(const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
              const std::optional<Tensor>& scales, const Windows& windows, int64_t blocks, int64_t heads,
              int64_t tokens, bool transposed) {
    added.tokens = tokens, added.columns = columns_of(tokens);
    if (scales) added.scales = vector_of<float>("scales", *scales, ScalarType::Float, heads);
    if (bias) {
      const float* scores = scores_of("bias", *bias, tokens);
      STD_TORCH_CHECK(bias->size(0) == heads, "bias: expected ", heads, " heads, got ", bias->size(0));
      added.bias = pad(*bias, scores, transposed, bias_);
    }
    if (mask) {
      const float* scores = scores_of("mask", *mask, tokens);
      added.groups = mask->size(0);
      STD_TORCH_CHECK(added.groups > 0 && blocks % added.groups == 0, "mask: expected a divisor of ", blocks,
                      " blocks, got ", added.groups, " groups");
      added.masks = pad(*mask, scores, transposed, masks_);
      const auto is_zero = [](float x) { return x == 0; };
      for (int64_t group = 0; group < added.groups; ++group) {
        const float* begin = scores + group * tokens * tokens;
        mask_of_.push_back(std::all_of(begin, begin + tokens * tokens, is_zero) ? -1 : static_cast<int32_t>(group));
      }
      added.mask_of = mask_of_.data();
    } else if (windows.shifted()) {
      windows.fill_masks(added.columns, window_masks_, mask_of_);
      added.masks = window_masks_.data(), added.mask_of = mask_of_.data(), added.groups = windows.count();
    }
  }

 private:
  static const float* scores_of(const char* name, const Tensor& x, int64_t tokens) {
    check_dtype(name, x, ScalarType::Float);
    STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == tokens && x.size(2) == tokens && x.is_contiguous(), name,
                    ": expected 3 dimensions, the last two ", tokens, ", contiguous");
    return static_cast<const float*>(x.const_data_ptr());
  }

  float* pad(const Tensor& x, const float* from, bool transposed, Tensor& memory) const {
    const int64_t tokens = added.tokens, columns = added.columns;
    const int64_t down = transposed ? 1 : tokens, right = transposed ? tokens : 1;  // what is next in x
    memory = torch::stable::new_empty(x, {x.size(0), tokens, columns});
    float* to = static_cast<float*>(memory.mutable_data_ptr());
    parallel_for(x.size(0) * tokens, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const float* source = from + row / tokens * tokens * tokens + row % tokens * down;
        float* out = to + row * columns;
        for (int64_t c = 0; c < columns; ++c) out[c] = c < tokens ? source[c * right] : 0;
      }
    });
    return to;
  }

  Tensor bias_, masks_;
  std::vector<float> window_masks_;
  std::vector<int32_t> mask_of_;
};

// The gradient of a bias: sums over some blocks each, how many does not hang on the threads, and then their sum.
class BiasGradient {
 public:
  // Sets the tasks of the backward, and where it sums if the gradient is wanted.
  BiasGradient(BlockAttentionBackward& p, const Tensor& like, bool wanted) : p_(p), wanted_(wanted) {
    if (!wanted) return;
    const int64_t slices = ceil_div(kBiasTasks, p.heads);
    p.task_blocks = std::max<int64_t>(ceil_div(p.all_blocks, slices), 1);
    sums_ = torch::stable::new_empty(like, {slices_of(), p.heads, p.tokens, p.added.columns}, ScalarType::Float);
    p.dbias = static_cast<float*>(sums_.mutable_data_ptr());
  }

  // (heads, N, N), fp32; nothing where it is not wanted.
  Tensor sum(const Tensor& like) const {
    if (!wanted_) return torch::stable::new_empty(like, {0}, ScalarType::Float);
    const int64_t heads = p_.heads, tokens = p_.tokens, columns = p_.added.columns;
    Tensor out = torch::stable::new_empty(like, {heads, tokens, tokens}, ScalarType::Float);
    float* to = static_cast<float*>(out.mutable_data_ptr());
    parallel_for(heads * tokens, [&](int64_t begin, int64_t end) {  // keys of heads
      std::vector<float> row(columns);
      for (int64_t key = begin; key < end; ++key) {
        std::fill(row.begin(), row.end(), 0.f);
        for (int64_t slice = 0; slice < slices_of(); ++slice) {
          const float* from = p_.dbias + (slice * heads * tokens + key) * columns;
          for (int64_t c = 0; c < columns; ++c) row[c] += from[c];
        }
        for (int64_t c = 0; c < tokens; ++c) to[(key / tokens * tokens + c) * tokens + key % tokens] = row[c];
      }
    });
    return out;
  }

 private:
  int64_t slices_of() const { return ceil_div(p_.all_blocks, p_.task_blocks); }

  const BlockAttentionBackward& p_;
  const bool wanted_;
  Tensor sums_;
};

}  // namespace nest_fast
