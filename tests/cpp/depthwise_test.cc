// The depthwise convolution of every instruction set that runs here, of float32 and of bytes, to either, against plain sums of integers,
// which are exact; in any two parts of its rows, between guard pages.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "guarded.h"
#include "sparse_conv.h"

using namespace sparseflax;

namespace {

struct Case {
  int64_t n, ih, iw, c, oh, ow, kh, kw, sh, sw, top, left, dh, dw, more;  // `more`: channels of the pixels beside those of the image
};

// Channels that fill two vectors of an instruction set, one, and parts; three taps side by side one and two apart, and whatever else;
// windows that lie inside, over each edge, and outside.
const float kNumbers[] = {2, 1, -5, 9};
const Function kDoubled = {Unary::kClamp, kNumbers};

const Case kCases[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0},    {2, 5, 9, 3, 5, 9, 3, 3, 1, 1, 1, 1, 1, 1, 0},   {1, 6, 13, 32, 6, 13, 3, 3, 1, 1, 1, 1, 1, 1, 0},
    {1, 7, 17, 8, 4, 9, 3, 3, 2, 2, 1, 1, 1, 1, 3},   {2, 6, 12, 45, 3, 6, 3, 3, 2, 2, 0, 0, 1, 1, 0},  {1, 9, 15, 20, 3, 5, 3, 3, 3, 3, 1, 1, 1, 1, 0},
    {1, 8, 9, 19, 8, 9, 3, 3, 1, 1, 2, 2, 2, 2, 5},   {3, 2, 6, 33, 4, 8, 2, 5, 1, 1, 2, 3, 1, 1, 0},  {1, 4, 11, 64, 4, 11, 5, 3, 1, 1, 2, 1, 1, 1, 0},
    {1, 3, 3, 17, 7, 7, 3, 3, 1, 1, 3, 3, 1, 1, 0},   {1, 4, 5, 31, 4, 5, 1, 3, 1, 1, 0, 1, 1, 1, 1},  {1, 3, 20, 16, 2, 10, 3, 3, 1, 2, 0, 0, 1, 1, 0},
};

template <typename T>
std::vector<T> Integers(size_t size, std::mt19937& draw) {
  std::vector<T> values(size);
  for (T& value : values) value = std::is_same<T, uint8_t>::value ? static_cast<T>(draw() % 256) : static_cast<T>(static_cast<int>(draw() % 7) - 3);
  return values;
}

const char* NameOf(float) { return "float32"; }
const char* NameOf(uint8_t) { return "bytes"; }

template <typename X, typename Y>
bool Check(const Isa& isa, const Case& c, Flush flush, std::mt19937& draw, void (*loop)(const Depthwise<X, Y>&, int64_t, int64_t)) {
  constexpr bool kFrom = std::is_same<X, uint8_t>::value, kTo = std::is_same<Y, uint8_t>::value;
  const int64_t x_pixel = c.c + c.more, y_pixel = c.c + 2 * c.more, rows = c.n * c.oh;
  // An image that is a part of a wider one ends with its last pixel's own channels.
  const auto size = [&](int64_t pixels, int64_t pixel) { return static_cast<size_t>((pixels - 1) * pixel + c.c); };
  const GuardedArray<X> x(Integers<X>(size(c.n * c.ih * c.iw, x_pixel), draw), flush);
  const Guarded kernel(Integers<float>(static_cast<size_t>(c.kh * c.kw * c.c), draw), flush), bias(Integers<float>(static_cast<size_t>(c.c), draw), flush);
  GuardedArray<Y> y(size(rows * c.ow, y_pixel), flush);
  std::fill_n(y.data(), y.size(), Y{99});
  const int32_t zeros[] = {0, 100, 255};
  // By powers of two, so that sums stay exact; quotients by any number are as IEEE has them.
  const Quantization from = {kFrom ? 0.25f : 1.0f, kFrom ? zeros[draw() % 3] : 0}, to = {draw() % 2 == 0 ? 0.5f : 1.3f, zeros[draw() % 3]};
  const bool biased = draw() % 2 == 0, follows = !kTo && draw() % 2 == 0;
  const int activation = static_cast<int>(draw() % 3);
  const Depthwise<X, Y> d{{x.data(), c.ih, c.iw, c.c, x_pixel}, {y.data(), c.oh, c.ow, c.c, y_pixel}, {c.kh, c.kw, c.sh, c.sw, c.top, c.left, c.dh, c.dw},
                          kernel.data(), biased ? bias.data() : nullptr, activation, from, to, follows ? &kDoubled : nullptr};
  const int64_t half = static_cast<int64_t>(draw() % static_cast<unsigned>(rows + 1));
  loop(d, half, rows);
  loop(d, 0, half);
  for (int64_t pixel = 0; pixel < rows * c.ow; ++pixel) {
    const int64_t j = pixel % c.ow, i = pixel / c.ow % c.oh, image = pixel / c.ow / c.oh;
    for (int64_t k = 0; k < y_pixel && pixel * y_pixel + k < static_cast<int64_t>(y.size()); ++k) {
      float want = 99;
      if (k < c.c) {
        float sum = biased ? bias.data()[k] : 0;
        for (int64_t r = 0; r < c.kh; ++r) {
          for (int64_t s = 0; s < c.kw; ++s) {
            const int64_t at = i * c.sh + r * c.dh - c.top, beside = j * c.sw + s * c.dw - c.left;
            if (at < 0 || at >= c.ih || beside < 0 || beside >= c.iw) continue;
            const X value = x.data()[((image * c.ih + at) * c.iw + beside) * x_pixel + k];
            sum += (static_cast<float>(value) - static_cast<float>(from.zero)) * from.scale * kernel.data()[(r * c.kw + s) * c.c + k];
          }
        }
        if (activation >= 1) sum = std::max(sum, 0.0f);
        if (activation == 2) sum = std::min(sum, 6.0f);
        if (follows) sum = std::clamp(2 * sum + 1, -5.0f, 9.0f);
        const float zero = static_cast<float>(to.zero);
        want = kTo ? std::nearbyint(std::clamp(sum / to.scale, -zero, 255 - zero)) + zero : sum;
      }
      if (static_cast<float>(y.data()[pixel * y_pixel + k]) != want) {
        std::printf("%s, %s to %s, case %td, pixel %ld, channel %ld: %g, wanted %g\n", isa.name.data(), NameOf(X()), NameOf(Y()), &c - kCases,
                    static_cast<long>(pixel), static_cast<long>(k), static_cast<double>(y.data()[pixel * y_pixel + k]), static_cast<double>(want));
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
    const Steps& steps = *isa->steps;
    for (int round = 0; round < 8; ++round) {
      const Flush flush = round % 2 == 0 ? Flush::kFront : Flush::kBack;
      for (const Case& c : kCases) {
        if (!Check(*isa, c, flush, draw, steps.depthwise) || !Check(*isa, c, flush, draw, steps.depthwise_to_bytes) ||
            !Check(*isa, c, flush, draw, steps.depthwise_from_bytes) || !Check(*isa, c, flush, draw, steps.depthwise_of_bytes)) {
          return 1;
        }
      }
    }
    std::printf("ok %s\n", isa->name.data());
  }
  return 0;
}
