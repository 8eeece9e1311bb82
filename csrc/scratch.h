// Memory of one thread for floats, in pieces that are aligned as the widest vectors are.

#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <tuple>
#include <type_traits>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace nest_fast {

// Floats between the pieces, which to the AddressSanitizer are one memory unless it is told.
#ifdef __SANITIZE_ADDRESS__
inline constexpr int64_t kScratchGap = 16;
inline void forbid(const float* begin, const float* end) {
  __asan_poison_memory_region(begin, (end - begin) * sizeof(float));
}
#else
inline constexpr int64_t kScratchGap = 0;
inline void forbid(const float*, const float*) {}
#endif

class Scratch {
 public:
  // A pointer that is set, beside the size of what it then points at.
  struct Piece {
    float** data;
    int64_t floats;
  };

  Scratch() = default;
  // For a class, the pointers being its members: Scratch memory_{{&a_, 64}, {&b_, 128}}.
  Scratch(std::initializer_list<Piece> pieces) : Scratch(pieces.begin(), pieces.size()) {}

  // Not inlined: once a task, and the sums would be compiled to vector code everywhere.
  [[gnu::noinline]] Scratch(const Piece* pieces, size_t count) {
    int64_t floats = kAlign;
    for (size_t i = 0; i < count; ++i) floats += taken_by(pieces[i]);
    memory_.reset(new float[floats]);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get()), align = kAlign * sizeof(float);
    float* next = reinterpret_cast<float*>((address + align - 1) / align * align);
    for (size_t i = 0; i < count; next += taken_by(pieces[i]), ++i) {
      *pieces[i].data = next;
      forbid(next + pieces[i].floats, next + taken_by(pieces[i]));
    }
  }

 private:
  static constexpr int64_t kAlign = 16;
  static int64_t taken_by(const Piece& piece) {
    return (piece.floats + kAlign - 1) / kAlign * kAlign + kScratchGap;
  }

  std::unique_ptr<float[]> memory_;
};

template <size_t COUNT>
class ScratchPieces {
 public:
  explicit ScratchPieces(const int64_t (&floats)[COUNT]) {
    Scratch::Piece pieces[COUNT];
    for (size_t i = 0; i < COUNT; ++i) pieces[i] = {&data_[i], floats[i]};
    memory_ = Scratch(pieces, COUNT);
  }

  template <size_t I>
  float* get() const {
    return data_[I];
  }

 private:
  float* data_[COUNT];
  Scratch memory_;
};

// For a function: const auto [a, b] = scratch(64, 128).
template <class... Sizes>
ScratchPieces<sizeof...(Sizes)> scratch(Sizes... floats) {
  return ScratchPieces<sizeof...(Sizes)>({static_cast<int64_t>(floats)...});
}

}  // namespace nest_fast

template <size_t COUNT>
struct std::tuple_size<nest_fast::ScratchPieces<COUNT>> : std::integral_constant<size_t, COUNT> {};
template <size_t I, size_t COUNT>
struct std::tuple_element<I, nest_fast::ScratchPieces<COUNT>> {
  using type = float* const;
};
