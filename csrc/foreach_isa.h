// Compiles NEST_FAST_KERNELS, an operation's -inl.h, once for every set of vector instructions; isa/target.h says how
// an -inl.h is written. NEST_FAST_WITH_BASELINE: first for what every processor has. No include guard: for one
// operation's file to include, outside of any namespace.

#ifdef NEST_FAST_WITH_BASELINE
#undef NEST_FAST_ISA
#define NEST_FAST_ISA baseline
#include NEST_FAST_KERNELS
#define NEST_FAST_TOGGLE
#endif

#ifdef NEST_FAST_X86
#undef NEST_FAST_ISA
#define NEST_FAST_ISA avx2
#include NEST_FAST_KERNELS
#ifdef NEST_FAST_TOGGLE
#undef NEST_FAST_TOGGLE
#else
#define NEST_FAST_TOGGLE
#endif

#undef NEST_FAST_ISA
#define NEST_FAST_ISA avx512
#include NEST_FAST_KERNELS
#ifdef NEST_FAST_TOGGLE
#undef NEST_FAST_TOGGLE
#else
#define NEST_FAST_TOGGLE
#endif

#undef NEST_FAST_ISA
#define NEST_FAST_ISA avx512_bf16
#include NEST_FAST_KERNELS

// The table for kernels_for, of the -inl.h's variable template KERNELS, by how to multiply.
#define NEST_FAST_BY_ISA(KERNELS)                                                                                 \
  {avx2::KERNELS<avx2::Floats<float>>, avx2::KERNELS<avx2::Floats<Half>>, avx2::KERNELS<avx2::Floats<BFloat16>>}, \
      {avx512::KERNELS<avx512::Floats<float>>, avx512::KERNELS<avx512::Floats<Half>>,                             \
       avx512::KERNELS<avx512::Floats<BFloat16>>},                                                                \
  {                                                                                                               \
    avx512::KERNELS<avx512::Floats<float>>, avx512::KERNELS<avx512::Floats<Half>>,                                \
        avx512_bf16::KERNELS<avx512_bf16::VnniPairs>                                                              \
  }
#else
#define NEST_FAST_BY_ISA(KERNELS)
#endif
