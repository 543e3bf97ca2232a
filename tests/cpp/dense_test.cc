// The dense convolution of every instruction set that runs here, against plain sums of integers, which are exact; in any two parts of its
// units, between guard pages.
#include <algorithm>
#include <cstdio>
#include <random>

#include "guarded.h"
#include "sparse_conv.h"

using namespace sparseflax;

namespace {

struct Case {
  int64_t n, oh, ow, ic, oc, kh, kw, sh, sw, dh, dw, groups, more;  // `more`: channels of the pixels beside those of the image
};

// Tiles of all sizes, panels of all widths and parts of vectors; taps side by side and not; sums of several blocks, cut at rows of the
// window, at its columns, and within them; single pixels, which read the
// kernel as it lies.
const float kNumbers[] = {2, 1, -5, 9};
const Function kDoubled = {Unary::kClamp, kNumbers};

const Case kCases[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0},   {1, 1, 2, 3, 5, 1, 1, 1, 1, 1, 1, 1, 0},    {2, 3, 3, 8, 16, 1, 1, 1, 1, 1, 1, 1, 3},
    {1, 5, 7, 5, 33, 1, 1, 2, 2, 1, 1, 1, 0},  {2, 4, 13, 3, 17, 3, 3, 1, 1, 1, 1, 1, 0},   {1, 3, 6, 4, 48, 2, 3, 2, 1, 1, 2, 1, 2},
    {1, 2, 11, 6, 70, 3, 2, 1, 2, 2, 1, 2, 0}, {2, 2, 5, 12, 12, 3, 3, 1, 1, 1, 1, 4, 4},   {1, 1, 4, 300, 9, 1, 1, 1, 1, 1, 1, 1, 0},
    {1, 2, 3, 90, 20, 5, 3, 1, 1, 1, 1, 1, 0}, {1, 2, 8, 90, 130, 2, 5, 1, 1, 1, 2, 1, 1},  {1, 1, 9, 520, 64, 2, 2, 1, 1, 1, 1, 1, 0},
    {3, 1, 1, 64, 40, 1, 1, 1, 1, 1, 1, 1, 0}, {1, 3, 10, 3, 64, 7, 7, 2, 2, 1, 1, 1, 0},  {1, 1, 1, 70, 2100, 1, 1, 1, 1, 1, 1, 1, 0},
    {1, 1, 1, 9, 37, 1, 1, 1, 1, 1, 1, 1, 5},
};

std::vector<float> Integers(size_t size, std::mt19937& draw) {
  std::vector<float> values(size);
  for (float& value : values) value = static_cast<float>(static_cast<int>(draw() % 7) - 3);
  return values;
}

bool Check(const Isa& isa, const Case& c, Flush flush, std::mt19937& draw) {
  const int64_t ih = (c.oh - 1) * c.sh + (c.kh - 1) * c.dh + 1, iw = (c.ow - 1) * c.sw + (c.kw - 1) * c.dw + 1;
  const int64_t x_pixel = c.ic + c.more, y_pixel = c.oc + c.more, icg = c.ic / c.groups, ocg = c.oc / c.groups, rows = c.n * c.oh;
  // An image that is a part of a wider one ends with its last pixel's own channels.
  const auto size = [](int64_t pixels, int64_t pixel, int64_t channels) { return static_cast<size_t>((pixels - 1) * pixel + channels); };
  const Guarded x(Integers(size(c.n * ih * iw, x_pixel, c.ic), draw), flush);
  const Guarded kernel(Integers(static_cast<size_t>(c.kh * c.kw * icg * c.oc), draw), flush), bias(Integers(static_cast<size_t>(c.oc), draw), flush);
  const int activation = static_cast<int>(draw() % 3);
  const bool biased = draw() % 2 == 0, follows = draw() % 2 == 0;
  GuardedArray<float> y(size(rows * c.ow, y_pixel, c.oc), flush);
  std::fill_n(y.data(), y.size(), 99.0f);
  const Dense d{{x.data(), ih, iw, c.ic, x_pixel}, {y.data(), c.oh, c.ow, c.oc, y_pixel}, {c.kh, c.kw, c.sh, c.sw, 0, 0, c.dh, c.dw}, c.groups,
                kernel.data(), biased ? bias.data() : nullptr, activation, follows ? &kDoubled : nullptr, rows};
  const int64_t units = rows * d.Panels(isa.steps->dense_width), half = static_cast<int64_t>(draw() % static_cast<unsigned>(units + 1));
  isa.steps->dense(d, half, units);
  isa.steps->dense(d, 0, half);
  for (int64_t pixel = 0; pixel < rows * c.ow; ++pixel) {
    const int64_t j = pixel % c.ow, row = pixel / c.ow, from = row / c.oh * ih + row % c.oh * c.sh;
    for (int64_t o = 0; o < y_pixel && pixel * y_pixel + o < static_cast<int64_t>(y.size()); ++o) {
      double want = 99;
      if (o < c.oc) {
        want = biased ? bias.data()[o] : 0;
        for (int64_t r = 0; r < c.kh; ++r) {
          for (int64_t s = 0; s < c.kw; ++s) {
            for (int64_t k = 0; k < icg; ++k) {
              want += static_cast<double>(x.data()[((from + r * c.dh) * iw + j * c.sw + s * c.dw) * x_pixel + o / ocg * icg + k]) *
                      kernel.data()[((r * c.kw + s) * icg + k) * c.oc + o];
            }
          }
        }
        if (activation >= 1) want = std::max(want, 0.0);
        if (activation == 2) want = std::min(want, 6.0);
        if (follows) want = std::clamp(2 * want + 1, -5.0, 9.0);
      }
      if (y.data()[pixel * y_pixel + o] != want) {
        std::printf("%s, case %td, pixel %ld, channel %ld: %g, wanted %g\n", isa.name.data(), &c - kCases, static_cast<long>(pixel),
                    static_cast<long>(o), static_cast<double>(y.data()[pixel * y_pixel + o]), want);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  std::mt19937 draw(1);
  for (const Isa* isa : Isas()) {
    for (int round = 0; round < 4; ++round) {
      for (const Case& c : kCases) {
        if (!Check(*isa, c, round % 2 == 0 ? Flush::kFront : Flush::kBack, draw)) return 1;
      }
    }
    std::printf("ok %s\n", isa->name.data());
  }
  return 0;
}
