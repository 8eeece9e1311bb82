// What the operations of the CPU part share: element types, and the choice of the vector instructions.

#pragma once

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
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// cpu_for_each_isa.h compiles kernels for other targets than the file's, in GCC's way.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11 && !defined(__clang__)
#define NEST_FAST_X86 1
#include <immintrin.h>
#endif

namespace nest_fast {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Sets of vector instructions, the best last.
enum Isa : int { kNone = -1, kAvx2, kAvx512, kAvx512Bf16 };

// The one in use: the best of this processor, unless a test chose another.
std::atomic<Isa>& current_isa();

inline void check_dtype(const char* name, const Tensor& x, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": wanted dtype ", toString(dtype), ", got ",
                  toString(x.scalar_type()));
}

// An operation's functions for one set of instructions, by dtype.
template <class Kernels>
struct ByDtype {
  Kernels fp32, fp16, bf16;
};

// The functions for the set of instructions in use; `by_isa` is as long as there are sets. `name` is the tensor's that
// has the dtype.
template <class Kernels>
const Kernels& kernels_for(const ByDtype<Kernels>* by_isa, const char* name, ScalarType dtype) {
  const Isa isa = current_isa();
  STD_TORCH_CHECK(isa != kNone, name, ": wanted a processor with AVX2 or AVX-512 and a build by GCC 11 or later, got ",
                  "another");
  switch (dtype) {
    case ScalarType::Float: return by_isa[isa].fp32;
    case ScalarType::Half: return by_isa[isa].fp16;
    case ScalarType::BFloat16: return by_isa[isa].bf16;
    default: STD_TORCH_CHECK(false, name, ": wanted dtype Float, Half or BFloat16, got ", toString(dtype));
  }
}

}  // namespace nest_fast
