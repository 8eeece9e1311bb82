// The choice of the vector instructions.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <atomic>

#include "elements.h"

// foreach_isa.h compiles kernels for other targets than the file's, in GCC's way.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11 && !defined(__clang__)
#define NEST_FAST_X86 1
#endif

namespace nest_fast {

// Sets of vector instructions, the best last.
enum Isa : int { kNone = -1, kAvx2, kAvx512, kAvx512Bf16 };

// The one in use: the best of this processor, unless a test chose another.
std::atomic<Isa>& current_isa();

// An operation's functions for one set of instructions, by dtype.
template <class Kernels>
struct ByDtype {
  Kernels fp32, fp16, bf16;
};

// The functions for the set of instructions in use; `by_isa` is as long as there are sets. `name` is the tensor's that
// has the dtype.
template <class Kernels>
const Kernels& kernels_for(const ByDtype<Kernels>* by_isa, const char* name, torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  const Isa isa = current_isa();
  STD_TORCH_CHECK(isa != kNone, name,
                  ": expected a processor with AVX2 or AVX-512 and a build by GCC 11 or later, got ", "another");
  switch (dtype) {
    case ScalarType::Float: return by_isa[isa].fp32;
    case ScalarType::Half: return by_isa[isa].fp16;
    case ScalarType::BFloat16: return by_isa[isa].bf16;
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype Float, Half or BFloat16, got ",
                      torch::headeronly::toString(dtype));
  }
}

}  // namespace nest_fast
