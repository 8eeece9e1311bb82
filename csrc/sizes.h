// Height and width, and rounding of sizes. No torch header.

#pragma once

#include <cstdint>

namespace nest_fast {

struct Size2 {
  int64_t h;
  int64_t w;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace nest_fast
