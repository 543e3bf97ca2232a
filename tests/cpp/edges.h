// What the tests of both elements share: the edges of shapes, which instruction sets to run them with, and how.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "problem.h"
#include "sparse_conv.h"

using sparseflax::Element;
using sparseflax::Executor;
using sparseflax::Isa;
using sparseflax::Schedule;

inline std::vector<const Isa*> TestedIsas(const std::string& wanted, Element element) {
  std::vector<const Isa*> isas;
  for (const Isa* isa : sparseflax::Isas(element)) {
    if (wanted == "all" || wanted == isa->name) isas.push_back(isa);
  }
  return isas;
}

[[noreturn]] inline void Fail(const std::string& what) {
  std::fprintf(stderr, "FAILED %s\n", what.c_str());
  std::exit(1);
}

// Calls items last to first and claims to have three threads, so that work is split as it would be for them.
struct Backwards final : Executor {
  int64_t threads() const override { return 3; }
  void For(int64_t n, const std::function<void(int64_t)>& f) override {
    for (int64_t i = n; i-- > 0;) f(i);
  }
};

inline std::string Describe(const Shape& shape, const Isa& isa, const Schedule* forced) {
  std::string text = std::string(isa.name) + " " + Describe(shape);
  if (forced != nullptr) {
    text += " tile " + std::to_string(forced->kernel->y) + "x" + std::to_string(forced->kernel->x) + " lanes " +
            std::to_string(forced->bn) + "*" + std::to_string(forced->by) + "*" + std::to_string(forced->bx);
    if (forced->wrap < sparseflax::kNever) text += " wrapped at " + std::to_string(forced->wrap);
  }
  return text;
}

// The edges of tiles, lanes, blocks and windows. 1x1 kernels here have one row, which is how such a convolution runs.
inline std::vector<Shape> EdgeShapes() {
  return {
      MakeShape(9, 16, 17, 5, 1, 17, 3, 3, 4, 1, 1, 1, 1, 1, 1, 1, 1),    // every tile fits; last block of one channel
      MakeShape(1, 29, 37, 3, 2, 4, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1),     // one image: lanes are sub-images
      MakeShape(1, 1, 133, 19, 1, 10, 1, 1, 16),                          // 1x1
      MakeShape(3, 9, 11, 3, 2, 6, 5, 5, 2, 2, 2, 1, 1, 2, 1, 0, 3),      // stride, uneven padding, groups
      MakeShape(2, 3, 31, 17, 1, 5, 1, 7, 16, 1, 1, 1, 2, 0, 0, 6, 6),    // 1x7, dilated
      MakeShape(2, 31, 3, 16, 1, 5, 7, 1, 16, 3, 1, 2, 1, 6, 5, 0, 0),    // 7x1, stride beyond the dilation
      MakeShape(1, 39, 43, 3, 1, 16, 11, 11, 3, 4, 4, 1, 1, 2, 2, 2, 2),  // 11x11 stride 4
      MakeShape(17, 8, 8, 4, 1, 1, 3, 3, 4, 2, 1, 2, 2, 2, 2, 2, 2),      // one output channel, one image too many
      MakeShape(1, 1, 1, 33, 1, 33, 3, 3, 16, 1, 1, 1, 1, 1, 1, 1, 1),    // one pixel
      MakeShape(2, 2, 2, 3, 1, 3, 2, 3, 3, 1, 1, 1, 1, 5, 4, 6, 5),       // outputs that see padding only
      MakeShape(2, 7, 9, 1, 6, 12, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1),      // depthwise
      MakeShape(9, 6, 6, 130, 1, 2, 5, 5, 128, 1, 1, 1, 1, 2, 2, 2, 2),  // panels near and beyond 16-bit offsets
  };
}
