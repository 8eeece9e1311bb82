// The set of vector instructions that an -inl.h is compiled for: NEST_FAST_ISA, one of the names below. foreach_isa.h
// compiles an operation's -inl.h for one after another and turns NEST_FAST_TOGGLE every time, so that what is defined
// says whether a header has been included for this one already. By itself, as an editor shows it, a header is for AVX2.
//
// An -inl.h includes what it uses, then has its code between NEST_FAST_BEGIN_ISA and NEST_FAST_END_ISA: a namespace of
// the set's name, within an anonymous one, whose functions may use the set's instructions.

#ifndef NEST_FAST_ISA
#define NEST_FAST_ISA avx2
#endif

#ifndef NEST_FAST_TARGET_H_
#define NEST_FAST_TARGET_H_

#define NEST_FAST_CONCAT_(a, b) a##b
#define NEST_FAST_CONCAT(a, b) NEST_FAST_CONCAT_(a, b)

// To compare with: #if NEST_FAST_LEVEL >= NEST_FAST_LEVEL_avx512
#define NEST_FAST_LEVEL NEST_FAST_CONCAT(NEST_FAST_LEVEL_, NEST_FAST_ISA)
#define NEST_FAST_LEVEL_baseline 0
#define NEST_FAST_LEVEL_avx2 1
#define NEST_FAST_LEVEL_avx512 2
#define NEST_FAST_LEVEL_avx512_bf16 3

#define NEST_FAST_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define NEST_FAST_PUSH(features) \
  NEST_FAST_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define NEST_FAST_POP NEST_FAST_PRAGMA(clang attribute pop)
#else
#define NEST_FAST_PUSH(features) NEST_FAST_PRAGMA(GCC push_options) NEST_FAST_PRAGMA(GCC target(features))
#define NEST_FAST_POP NEST_FAST_PRAGMA(GCC pop_options)
#endif

#define NEST_FAST_PUSH_baseline
#define NEST_FAST_PUSH_avx2 NEST_FAST_PUSH("avx2,fma,f16c")
#define NEST_FAST_PUSH_avx512 NEST_FAST_PUSH("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#define NEST_FAST_PUSH_avx512_bf16 NEST_FAST_PUSH("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")
#define NEST_FAST_POP_baseline
#define NEST_FAST_POP_avx2 NEST_FAST_POP
#define NEST_FAST_POP_avx512 NEST_FAST_POP
#define NEST_FAST_POP_avx512_bf16 NEST_FAST_POP

#define NEST_FAST_BEGIN_ISA                        \
  NEST_FAST_CONCAT(NEST_FAST_PUSH_, NEST_FAST_ISA) \
  namespace nest_fast {                            \
  namespace {                                      \
  namespace NEST_FAST_ISA {
#define NEST_FAST_END_ISA \
  }                       \
  }                       \
  }                       \
  NEST_FAST_CONCAT(NEST_FAST_POP_, NEST_FAST_ISA)

#endif  // NEST_FAST_TARGET_H_
