// What a transformer layer's forward and backward on the CPU share: what they compute on, and its checks.

#pragma once

#include "block_attention_cpu.h"

namespace nest_fast {

// A product with a weight, whose rows are dense, of which `in` features are summed; and the weight as the product takes
// it. bias may be null.
struct Linear {
  int64_t in, out;
  const void *weight, *bias;
  int64_t weight_stride;
  float* packed;
};

enum Activation { kGelu, kGeluTanh };

inline Activation activation_of(const std::string& name) {
  if (name == "gelu") return kGelu;
  STD_TORCH_CHECK(name == "gelu_tanh", "activation: wanted \"gelu\" or \"gelu_tanh\", got \"", name, "\"");
  return kGeluTanh;
}

// How attention inside blocks is cut out of packed rows: q of every head, then k, then v of `heads` or of one.
struct Heads {
  int64_t tokens, heads, kv_heads, dim;  // of a block; of a head

  Heads(int64_t rows, int64_t features, int64_t tokens, int64_t heads, int64_t kv_heads)
      : tokens(tokens), heads(heads), kv_heads(kv_heads) {
    STD_TORCH_CHECK(tokens > 0 && rows % tokens == 0, "tokens: wanted a divisor of ", rows, " rows, got ", tokens);
    STD_TORCH_CHECK(heads > 0 && features % heads == 0, "heads: wanted a divisor of ", features, " features, got ",
                    heads);
    STD_TORCH_CHECK(kv_heads == heads || kv_heads == 1, "kv_heads: wanted ", heads, " or 1, got ", kv_heads);
    dim = features / heads;
  }

  int64_t packed_features() const { return (heads + 2 * kv_heads) * dim; }

  // `count` heads from number `head` on in blocks of dense rows, one block behind the other.
  Operand at(void* rows, int64_t features, int64_t head, int64_t count, int64_t element_size) const {
    void* first = static_cast<char*>(rows) + head * dim * element_size;
    return {first, 0, tokens * features, features, count == 1 ? 0 : dim};
  }

  // Sets what is packed in `rows`.
  void unpack(void* rows, int64_t element_size, Operand& q, Operand& k, Operand& v) const {
    q = at(rows, packed_features(), 0, heads, element_size);
    k = at(rows, packed_features(), heads, kv_heads, element_size);
    v = at(rows, packed_features(), heads + kv_heads, kv_heads, element_size);
  }

  // Attention inside the blocks of a packed qkv.
  BlockAttention attention(void* qkv, void* out, int64_t element_size, float scale, float* lse) const {
    BlockAttention p{};
    unpack(qkv, element_size, p.q, p.k, p.v);
    p.out = at(out, heads * dim, 0, heads, element_size);
    p.blocks = std::numeric_limits<int64_t>::max();  // of one image: all
    p.tokens = tokens, p.heads = heads, p.dim = dim, p.scale = scale, p.lse = lse;
    return p;
  }
};

inline constexpr int64_t kCache = 1 << 20;  // bytes of a core's second-level cache, or less

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
  Heads heads;
  int64_t x_stride;
  float scale, branch_scale;
  const void* x;
  void* out;
  void *qkv_out, *attended;  // what the gradient needs, or null
  float* lse;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Work>
void parallel_for(int64_t count, Work work) {
  torch::stable::parallel_for(0, count, 1, work);
}

// Rows (count, features) that are dense, and how far apart they lie.
inline const void* rows_of(const char* name, const Tensor& x, ScalarType dtype, int64_t features, int64_t& stride) {
  check_dtype(name, x, dtype);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == features, name, ": wanted 2 dimensions, the last ", features);
  STD_TORCH_CHECK(features > 0, name, ": wanted at least 1 feature, got 0");
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

// How weights are laid out for the products.
struct WeightPacking {
  int64_t pair;  // columns of a panel
  int64_t (*floats)(int64_t in, int64_t out);
  void (*pack)(const Linear&, int64_t begin, int64_t end);  // panels
};

// A Linear and the memory of its packed weight. Packed anew in every call, which costs as much as reading it once: a
// remembered copy would not see a weight that is changed through its data.
struct PackedLinear {
  Linear linear{};
  Tensor packed;

  // x @ weight^T + bias, for a weight (out, in), as `packing` takes it.
  PackedLinear(const char* name, const WeightPacking& packing, const Tensor& weight, const std::optional<Tensor>& bias,
               ScalarType dtype, int64_t in) {
    check_rank(name, weight);
    linear.in = in, linear.out = weight.size(0);
    linear.weight = rows_of(name, weight, dtype, in, linear.weight_stride);
    linear.bias = bias ? vector_of<void>("bias", *bias, dtype, linear.out) : nullptr;
    pack(packing, weight);
  }

  // x @ weight, for a weight (in, out), as `packing` takes it.
  static PackedLinear transposed(const char* name, const WeightPacking& packing, const Tensor& weight,
                                 ScalarType dtype, int64_t in, int64_t out) {
    check_rank(name, weight);
    STD_TORCH_CHECK(weight.size(0) == in, name, ": wanted ", in, " rows, got ", weight.size(0));
    PackedLinear p;
    p.linear.in = in, p.linear.out = out;
    p.linear.weight = rows_of(name, weight, dtype, out, p.linear.weight_stride);
    p.pack(packing, weight);
    return p;
  }

 private:
  PackedLinear() = default;

  static void check_rank(const char* name, const Tensor& weight) {
    STD_TORCH_CHECK(weight.dim() == 2, name, ": wanted 2 dimensions (out, in), got ", weight.dim());
  }

  void pack(const WeightPacking& packing, const Tensor& weight) {
    packed = torch::stable::new_empty(weight, {packing.floats(linear.in, linear.out)}, ScalarType::Float);
    linear.packed = static_cast<float*>(packed.mutable_data_ptr());
    parallel_for(ceil_div(linear.out, packing.pair),
                 [&](int64_t begin, int64_t end) { packing.pack(linear, begin, end); });
  }
};

}  // namespace nest_fast
