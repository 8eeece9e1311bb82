// The processor's limits: products whose operands never leave the registers, and memory that is read and written.

#if defined(NEST_FAST_PEAK_INL_H_) == defined(NEST_FAST_TOGGLE)
#ifdef NEST_FAST_PEAK_INL_H_
#undef NEST_FAST_PEAK_INL_H_
#else
#define NEST_FAST_PEAK_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "isa/vector-inl.h"
#include "peak.h"

NEST_FAST_BEGIN_ISA

// As many sums as the micro-kernel has, in registers: more than are on their way through the units.
constexpr int kSums = 2 * kMR;

template <class Op>
float multiply_registers(int64_t steps, float value) {
  Vec parts[Op::kVnni], sums[kSums];
  for (Vec& part : parts) part = broadcast(value);
  const Vec x = Op::from_floats(parts);
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sums[i] = broadcast(value * i);  // not alike, or one would be computed
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sums[i] = Op::dot(x, x, sums[i]);
  Vec total = zero();
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) total = add(total, sums[i]);
  return sum(total);
}

inline float move_memory(const Traffic& p) {
  constexpr int count = kTrafficFloats / kLanes;
  Vec sums[count];
  for (Vec& one : sums) one = zero();
  const int64_t both = std::min(p.read, p.written);
  for (int64_t i = 0; i < both; i += kTrafficFloats)
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j) store(p.to + i + j * kLanes, load(p.from + i + j * kLanes));
  for (int64_t i = both; i < p.read; i += kTrafficFloats)
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j) sums[j] = add(sums[j], load(p.from + i + j * kLanes));
  for (int64_t i = both; i < p.written; i += kTrafficFloats)
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j) store(p.to + i + j * kLanes, zero());
  Vec total = zero();
  for (const Vec& one : sums) total = add(total, one);
  return sum(total);
}

template <class Op>
constexpr PeakKernels kPeak = {2 * kLanes * Op::kVnni * kSums, multiply_registers<Op>, move_memory};

NEST_FAST_END_ISA

#endif  // per-target include guard
