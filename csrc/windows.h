// Windows of an image of tokens, as nest_fast/reference.py defines them.

#pragma once

#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <vector>

#include "sizes.h"

namespace nest_fast {

struct Windows {
  Size2 image{0, 0}, window{0, 0}, shift{0, 0};
  bool pad_first = false, grid = false;

  // {H, W, window's h, w, shift down, right, pad_first, grid}; empty or zeros: there are none.
  explicit Windows(torch::headeronly::IntHeaderOnlyArrayRef list) {
    if (list.empty()) return;
    STD_TORCH_CHECK(list.size() == 8, "windows: expected 8 numbers or none, got ", list.size());
    if (list[0] == 0 && list[2] == 0) return;
    image = {list[0], list[1]}, window = {list[2], list[3]}, shift = {list[4], list[5]};
    pad_first = list[6] != 0, grid = list[7] != 0;
    STD_TORCH_CHECK(image.h > 0 && image.w > 0 && window.h > 0 && window.w > 0, "windows: expected positive sizes");
    STD_TORCH_CHECK(0 <= shift.h && shift.h < window.h && 0 <= shift.w && shift.w < window.w,
                    "windows: expected a shift less than the window");
    STD_TORCH_CHECK(!grid || (image.h % window.h == 0 && image.w % window.w == 0 && !shifted()),
                    "windows: expected a grid that divides the image, without a shift");
  }

  bool any() const { return window.h > 0; }
  bool shifted() const { return shift.h > 0 || shift.w > 0; }
  Size2 counts() const { return {ceil_div(image.h, window.h), ceil_div(image.w, window.w)}; }
  int64_t count() const { return any() ? counts().h * counts().w : 0; }
  int64_t tokens() const { return window.h * window.w; }

  // The row of each token of each window of so many images, (images, windows, tokens); -1 for padding.
  std::vector<int64_t> rows(int64_t images) const {
    std::vector<int64_t> rows;
    rows.reserve(images * count() * tokens());
    const auto place = [&](int64_t number, int64_t token, int64_t count, int64_t window, int64_t shift, int64_t size) {
      const int64_t at = grid ? token * count + number : number * window + token;
      const int64_t there = (at + shift) % (pad_first ? count * window : size);
      return (pad_first ? there : at) < size ? there : -1;
    };
    for (int64_t first = 0; first < images * image.h * image.w; first += image.h * image.w)
      for (int64_t down = 0; down < counts().h; ++down)
        for (int64_t right = 0; right < counts().w; ++right)
          for (int64_t i = 0; i < window.h; ++i) {
            const int64_t y = place(down, i, counts().h, window.h, shift.h, image.h);
            for (int64_t j = 0; j < window.w; ++j) {
              const int64_t x = place(right, j, counts().w, window.w, shift.w, image.w);
              rows.push_back(y < 0 || x < 0 ? -1 : first + y * image.w + x);
            }
          }
    return rows;
  }

  // Swin's masks, (3, tokens, columns): of windows at the lower edge, at the right one, and at both; and which of them
  // each window has.
  void fill_masks(int64_t columns, std::vector<float>& masks, std::vector<int32_t>& mask_of) const {
    masks.assign(3 * tokens() * columns, 0.f);
    const auto region = [&](int64_t token, int kind) {
      const bool below = token / window.w >= window.h - shift.h, beyond = token % window.w >= window.w - shift.w;
      return (kind & 1 && below ? 1 : 0) + (kind & 2 && beyond ? 2 : 0);
    };
    for (int kind = 1; kind <= 3; ++kind)
      for (int64_t i = 0; i < tokens(); ++i)
        for (int64_t j = 0; j < tokens(); ++j)
          if (region(i, kind) != region(j, kind)) masks[((kind - 1) * tokens() + i) * columns + j] = -100;
    for (int64_t number = 0; number < count(); ++number) {
      const bool below = shift.h > 0 && number / counts().w == counts().h - 1;
      const bool beyond = shift.w > 0 && number % counts().w == counts().w - 1;
      mask_of.push_back((below ? 1 : 0) + (beyond ? 2 : 0) - 1);
    }
  }
};

}  // namespace nest_fast
