// Compiles the header NEST_FAST_KERNEL once for every set of vector instructions, in a namespace of its own.
// No include guard: for each operation's file to include, inside its anonymous namespace.

#ifdef NEST_FAST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "cpu_vector_avx2.h"
#include "cpu_matrix.h"
#include NEST_FAST_KERNEL
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
namespace avx512 {
#include "cpu_vector_avx512.h"
#include "cpu_matrix.h"
#include NEST_FAST_KERNEL
}  // namespace avx512
#pragma GCC target("avx512bf16")
namespace avx512_bf16 {
#include "cpu_vector_avx512.h"
#include "cpu_matrix.h"
#include "cpu_vector_avx512_bf16.h"
#include NEST_FAST_KERNEL
}  // namespace avx512_bf16
#pragma GCC pop_options

// The table for kernels_for, of what KERNELS(isa, how to multiply) gives.
#define NEST_FAST_BY_ISA(KERNELS)                                                                              \
  {KERNELS(avx2, Floats<float>), KERNELS(avx2, Floats<Half>), KERNELS(avx2, Floats<BFloat16>)},                \
      {KERNELS(avx512, Floats<float>), KERNELS(avx512, Floats<Half>), KERNELS(avx512, Floats<BFloat16>)}, {    \
    KERNELS(avx512, Floats<float>), KERNELS(avx512, Floats<Half>), KERNELS(avx512_bf16, PairsOfBFloat16)       \
  }
#else
#define NEST_FAST_BY_ISA(KERNELS) \
  {}
#endif
