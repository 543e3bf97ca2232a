// One convolution with random data, packed as sparseflax/packing.py documents, and what its output has to be.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "sparse_conv.h"

using sparseflax::Shape;

struct Problem {
  Shape shape;
  int activation;
  std::vector<float> x, dense, values, bias, residual;  // dense (kh, kw, icg, oc)
  std::vector<uint8_t> gaps;
  std::vector<double> y, bound;  // the exact output, and how far float32 may be from it
};

// A shape whose output size follows from the rest.
inline Shape MakeShape(int64_t n, int64_t ih, int64_t iw, int64_t icg, int64_t groups, int64_t oc, int64_t kh, int64_t kw,
                       int64_t block, int64_t sh = 1, int64_t sw = 1, int64_t dh = 1, int64_t dw = 1, int64_t top = 0,
                       int64_t bottom = 0, int64_t left = 0, int64_t right = 0) {
  Shape s{};
  s.n = n, s.ih = ih, s.iw = iw, s.icg = icg, s.groups = groups, s.oc = oc, s.kh = kh, s.kw = kw, s.block = block;
  s.sh = sh, s.sw = sw, s.dh = dh, s.dw = dw, s.top = top, s.bottom = bottom, s.left = left, s.right = right;
  s.oh = (ih + top + bottom - (kh - 1) * dh - 1) / sh + 1;
  s.ow = (iw + left + right - (kw - 1) * dw - 1) / sw + 1;
  return s;
}

inline std::string Describe(const Shape& s) {
  auto pair = [](int64_t a, int64_t b) { return std::to_string(a) + "x" + std::to_string(b); };
  return "n" + std::to_string(s.n) + " " + pair(s.ih, s.iw) + "x" + std::to_string(s.icg) + " g" + std::to_string(s.groups) +
         " -> " + std::to_string(s.oc) + " k" + pair(s.kh, s.kw) + " s" + pair(s.sh, s.sw) + " d" + pair(s.dh, s.dw);
}

// The weight of group g, block b, output channel k (of the group) and tap t stands at ((g * blocks + b) * ocg + k) * taps + t.
inline void Encode(Problem& p) {
  const Shape& s = p.shape;
  int64_t skipped = 0;
  for (int64_t row = 0; row < s.groups * s.blocks() * s.ocg(); ++row) {
    const int64_t k = row % s.ocg(), b = row / s.ocg() % s.blocks(), g = row / s.ocg() / s.blocks();
    for (int64_t t = 0; t < s.taps(); ++t) {
      const int64_t c = b * s.block + t / (s.kh * s.kw), rs = t % (s.kh * s.kw);
      const float w = c < s.icg ? p.dense[static_cast<size_t>((rs * s.icg + c) * s.oc + g * s.ocg() + k)] : 0;
      if (w == 0) {
        ++skipped;
        continue;
      }
      for (; skipped >= 255; skipped -= 255) p.gaps.push_back(255);
      p.gaps.push_back(static_cast<uint8_t>(skipped));
      p.values.push_back(w);
      skipped = 0;
    }
  }
}

// In double, over all weights: a pruned one counts as 0, and 0 * inf is nan. A float32 sum of m products, whatever its
// order, is off by at most m u / (1 - m u) times the sum of their absolute values, u = 2^-24 (Higham, Accuracy and
// Stability of Numerical Algorithms, section 3.1); zeros add no error, bias and residual are two more terms.
inline void Solve(Problem& p) {
  const Shape& s = p.shape;
  p.y.clear();
  p.bound.clear();
  for (int64_t i = 0; i < s.n * s.oh * s.ow * s.oc; ++i) {
    const int64_t k = i % s.oc, ox = i / s.oc % s.ow, oy = i / s.oc / s.ow % s.oh, image = i / s.oc / s.ow / s.oh;
    const int64_t g = k / s.ocg();
    double sum = p.bias[static_cast<size_t>(k)], magnitude = std::abs(sum), terms = 2;
    for (int64_t r = 0; r < s.kh; ++r) {
      for (int64_t q = 0; q < s.kw; ++q) {
        const int64_t iy = oy * s.sh + r * s.dh - s.top, ix = ox * s.sw + q * s.dw - s.left;
        if (iy < 0 || iy >= s.ih || ix < 0 || ix >= s.iw) continue;
        const float* x = &p.x[static_cast<size_t>(((image * s.ih + iy) * s.iw + ix) * s.ic() + g * s.icg)];
        const float* w = &p.dense[static_cast<size_t>((r * s.kw + q) * s.icg * s.oc + k)];
        for (int64_t c = 0; c < s.icg; ++c) {
          const double product = static_cast<double>(x[c]) * static_cast<double>(w[c * s.oc]);
          sum += product;
          magnitude += std::abs(product);
          terms += w[c * s.oc] != 0;
        }
      }
    }
    if (!p.residual.empty()) {
      sum += p.residual[static_cast<size_t>(i)];
      magnitude += std::abs(p.residual[static_cast<size_t>(i)]);
    }
    if (p.activation >= 1 && sum < 0) sum = 0;
    if (p.activation == 2 && sum > 6) sum = 6;
    const double u = std::ldexp(terms, -24);
    p.y.push_back(sum);
    p.bound.push_back(u / (1 - u) * magnitude);
  }
}

inline Problem MakeProblem(const Shape& s, double density, int activation, bool with_residual, uint64_t seed) {
  std::mt19937_64 random(seed);
  auto uniform = [&] { return static_cast<double>(random() >> 11) / static_cast<double>(uint64_t{1} << 53); };
  auto fill = [&](std::vector<float>& v, int64_t size) {
    for (int64_t i = 0; i < size; ++i) v.push_back(static_cast<float>(8 * uniform() - 4));
  };
  Problem p{s, activation, {}, {}, {}, {}, {}, {}, {}, {}};
  // The weights come first: the same seed gives the same ones for any image.
  fill(p.dense, s.kh * s.kw * s.icg * s.oc);
  for (float& w : p.dense) {
    if (uniform() >= density) w = 0;
  }
  fill(p.bias, s.oc);
  fill(p.x, s.n * s.ih * s.iw * s.ic());
  if (with_residual) fill(p.residual, s.n * s.oh * s.ow * s.oc);
  Encode(p);
  Solve(p);
  return p;
}
