// What the processor can do at most: what peak-inl.h computes on.

#pragma once

#include <cstdint>

namespace nest_fast {

// Floats that are read, and floats that are written: as many as both have are copied.
struct Traffic {
  const float* from;
  float* to;
  int64_t read, written;
};

struct PeakKernels {
  int64_t flops;  // of a step
  float (*multiply)(int64_t steps, float value);
  float (*move)(const Traffic&);  // sizes are multiples of kTrafficFloats
};

constexpr int64_t kTrafficFloats = 64;

}  // namespace nest_fast
