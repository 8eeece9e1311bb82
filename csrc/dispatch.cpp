// Which vector instructions the CPU part uses.

#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace nest_fast {
namespace {

constexpr const char* kNames[] = {"avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
#ifdef NEST_FAST_X86
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return kNone;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
#else
  return kNone;
#endif
}

std::string cpp_isa() {
  const Isa isa = current_isa();
  return isa == kNone ? "" : kNames[isa];
}

// "baseline" is what every processor has: blockify and its kin alone have kernels for it.
void cpp_set_isa(std::string name) {
  if (name == "baseline") return current_isa().store(kNone);
  for (int isa = best_isa(); isa > kNone; --isa)
    if (name == kNames[isa]) return current_isa().store(static_cast<Isa>(isa));
  STD_TORCH_CHECK(false, "isa: expected one that this processor has, got \"", name, "\"");
}

}  // namespace

std::atomic<Isa>& current_isa() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace nest_fast

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CompositeExplicitAutograd, m) {
  m.impl("cpp_isa", TORCH_BOX(&nest_fast::cpp_isa));
  m.impl("cpp_set_isa", TORCH_BOX(&nest_fast::cpp_set_isa));
}
