// Tests of the int8 kernel below XLA and Python: every instruction set and register tile between guard pages against exact integers.
// The first argument is an instruction set or "all", the others are tests; exits with 1 after the first failure.
#include "sparse_conv.h"

#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <tuple>

#include "edges.h"
#include "guarded.h"

using namespace sparseflax;

namespace {

std::string wanted_isa = "all";

// A convolution whose shape counts words: four uint8 channels of x, four int8 weights of a kept tap.
struct Int8Problem {
  Problem pattern;  // its dense weights say which words are kept
  std::vector<uint8_t> x, residual, y_bytes;
  std::vector<int32_t> words, sums;
  std::vector<float> weight, bias, y;
  Scales scales;
};

// The nearest of 16 significant bits, ties to even.
float Of16(float value) {
  int exponent;
  const double fraction = std::frexp(static_cast<double>(value), &exponent);
  return static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(fraction, 16)), exponent - 16));
}

// Half of all bytes are extremes: what could saturate does.
template <typename Random>
int32_t Byte(Random& random, int32_t low, int32_t high) {
  const uint64_t r = random();
  return r % 4 == 0 ? low : r % 4 == 1 ? high : low + static_cast<int32_t>(r / 4 % static_cast<uint64_t>(high - low + 1));
}

// The sums in int64, the rest as Scales and Rescale say.
void Solve(Int8Problem& p) {
  const Shape& s = p.pattern.shape;
  const Scales& q = p.scales;
  std::vector<int32_t> dense(p.pattern.dense.size());  // words where they stand in the dense kernel
  size_t next = 0;
  for (int64_t row = 0; row < s.groups * s.blocks() * s.ocg(); ++row) {
    const int64_t k = row % s.ocg(), b = row / s.ocg() % s.blocks(), g = row / s.ocg() / s.blocks();
    for (int64_t t = 0; t < s.taps(); ++t) {
      const int64_t c = b * s.block + t / (s.kh * s.kw), rs = t % (s.kh * s.kw);
      const size_t at = static_cast<size_t>((rs * s.icg + c) * s.oc + g * s.ocg() + k);
      if (c < s.icg && p.pattern.dense[at] != 0) dense[at] = p.words[next++];
    }
  }
  p.y.clear();
  p.y_bytes.clear();
  for (int64_t i = 0; i < s.n * s.oh * s.ow * s.oc; ++i) {
    const int64_t k = i % s.oc, ox = i / s.oc % s.ow, oy = i / s.oc / s.ow % s.oh, image = i / s.oc / s.ow / s.oh;
    int64_t sum = 0;
    for (int64_t r = 0; r < s.kh; ++r) {
      for (int64_t w = 0; w < s.kw; ++w) {
        const int64_t iy = oy * s.sh + r * s.dh - s.top, ix = ox * s.sw + w * s.dw - s.left;
        if (iy < 0 || iy >= s.ih || ix < 0 || ix >= s.iw) continue;
        for (int64_t c = 0; c < s.icg; ++c) {
          const int32_t word = dense[static_cast<size_t>(((r * s.kw + w) * s.icg + c) * s.oc + k)];
          for (int64_t byte = 0; byte < 4 && word != 0; ++byte) {
            const size_t at = static_cast<size_t>(4 * (((image * s.ih + iy) * s.iw + ix) * s.ic() + k / s.ocg() * s.icg + c) + byte);
            sum += (p.x[at] - q.zero_in) * static_cast<int8_t>(word >> (8 * byte));
          }
        }
      }
    }
    const float weight = p.weight[static_cast<size_t>(k)], unit = weight * q.in, offset = p.bias[static_cast<size_t>(k)] / unit;
    float y = static_cast<float>(static_cast<int32_t>(sum)) + offset;
    if (q.rounds) {
      const float inner = weight * q.inner, step = y * inner;
      y = std::nearbyint(step > q.inner_low ? std::min(step, q.inner_high) : q.inner_low);
    }
    if (!p.residual.empty()) {
      const float other = static_cast<float>(p.residual[static_cast<size_t>(i)] - q.zero_residual);
      y += other * (q.rounds ? q.residual : Of16(q.residual / unit));
      if (q.rounds) y += other * q.ratio_rest;
    }
    const float scale = q.rounds ? q.out : weight * q.out;
    y *= scale;
    p.y.push_back(std::isnan(y) ? y : std::min(std::max(y, q.low), q.high));
    const float clamped = y > q.low ? std::min(y, q.high) : q.low;
    p.y_bytes.push_back(q.to_float ? uint8_t{0} : static_cast<uint8_t>(static_cast<int32_t>(std::nearbyint(clamped)) + q.zero));
  }
}

Int8Problem MakeInt8Problem(const Shape& shape, double density, bool residual, bool to_float, uint64_t seed) {
  std::mt19937_64 random(seed);
  Int8Problem p{};
  p.pattern.shape = shape;
  for (int64_t i = 0; i < shape.kh * shape.kw * shape.icg * shape.oc; ++i) {
    p.pattern.dense.push_back(static_cast<double>(random() >> 11) < density * static_cast<double>(uint64_t{1} << 53) ? 1.f : 0.f);
  }
  Encode(p.pattern);
  p.scales.zero_in = Byte(random, 0, 255);
  p.scales.zero = to_float ? 0 : Byte(random, 0, 255);
  p.scales.zero_residual = Byte(random, 0, 255);
  p.scales.to_float = to_float;
  const bool relu = random() % 2 == 0;
  p.scales.low = to_float ? (relu ? 0 : -std::numeric_limits<float>::infinity()) : static_cast<float>(relu ? 0 : -p.scales.zero);
  p.scales.high = to_float ? (relu ? 6 : std::numeric_limits<float>::infinity()) : static_cast<float>(255 - p.scales.zero);
  for (int64_t i = 0; i < 4 * shape.n * shape.ih * shape.iw * shape.ic(); ++i) p.x.push_back(static_cast<uint8_t>(Byte(random, 0, 255)));
  for (int64_t i = 0; residual && i < shape.n * shape.oh * shape.ow * shape.oc; ++i) {
    p.residual.push_back(static_cast<uint8_t>(Byte(random, 0, 255)));
  }
  p.sums.resize(static_cast<size_t>(shape.oc));
  size_t next = 0;
  for (int64_t row = 0; row < shape.groups * shape.blocks() * shape.ocg(); ++row) {
    const int64_t k = row / shape.ocg() / shape.blocks() * shape.ocg() + row % shape.ocg(), b = row / shape.ocg() % shape.blocks();
    for (int64_t t = 0; t < shape.taps(); ++t) {
      const int64_t c = b * shape.block + t / (shape.kh * shape.kw), rs = t % (shape.kh * shape.kw);
      if (c >= shape.icg || p.pattern.dense[static_cast<size_t>((rs * shape.icg + c) * shape.oc + k)] == 0) continue;
      uint32_t word = 0;
      for (int byte = 0; byte < 4; ++byte) {
        const int32_t w = Byte(random, -127, 127);
        word |= static_cast<uint32_t>(w & 255) << (8 * byte);
        p.sums[static_cast<size_t>(k)] += w;
      }
      p.words.push_back(static_cast<int32_t>(word));
      ++next;
    }
  }
  const double kept = std::sqrt(static_cast<double>(4 * next) / static_cast<double>(shape.oc) + 1);
  const auto uniform = [&] { return static_cast<double>(random() >> 11) / static_cast<double>(uint64_t{1} << 53); };
  Scales& q = p.scales;
  q.in = static_cast<float>(0.01 + uniform());
  const double step = 255 * 127 * kept / 100;  // a hundredth of the largest sums
  q.out = static_cast<float>(1 / step);        // outputs fill the range, and leave it
  q.residual = static_cast<float>((0.5 + uniform()) * step * q.in);
  for (int64_t k = 0; k < shape.oc; ++k) {
    p.weight.push_back(static_cast<float>(1 + uniform()));
    p.bias.push_back(static_cast<float>((uniform() - 0.5) * 127 * 255 * kept) * p.weight.back() * q.in);
  }
  if (residual && random() % 2 == 0) {
    q.rounds = true;
    q.inner = q.out;
    q.out = 0.5f + static_cast<float>(random() % 1000) / 1000;
    q.residual = std::ldexp(static_cast<float>(32768 + random() % 32768), -16);  // 16 bits
    q.inner_low = -static_cast<float>(Byte(random, 0, 255));
    q.inner_high = 255 + q.inner_low;
    q.ratio_rest = std::ldexp(static_cast<float>(32768 + random() % 32768), -32);
  }
  if (shape.oc > 3) p.bias[3] = std::numeric_limits<float>::quiet_NaN();
  Solve(p);
  return p;
}

std::unique_ptr<Conv> MakeConv(const Int8Problem& p, const Isa* isa) {
  std::string error;
  auto conv = Conv::Make(p.pattern.shape, p.pattern.gaps.data(), static_cast<int64_t>(p.pattern.gaps.size()), isa, &error, Element::kInt8);
  if (conv == nullptr) Fail(Describe(p.pattern.shape) + ": " + error);
  return conv;
}

// The buffers of a problem, each flush with a guard page.
struct Memory {
  GuardedArray<uint8_t> x, residual, y_bytes;
  GuardedArray<int32_t> words, sums;
  Guarded weight, bias, y;
  Memory(const Int8Problem& p, Flush flush)
      : x(p.x, flush), residual(p.residual, flush), y_bytes(p.y.size(), flush), words(p.words, flush), sums(p.sums, flush),
        weight(p.weight, flush), bias(p.bias, flush), y(p.y.size(), flush) {}
};

void CheckRun(const Int8Problem& p, Conv& conv, const Isa& isa, const Memory& memory, const Schedule* forced) {
  const Shape& s = p.pattern.shape;
  const std::string what = Describe(s, isa, forced);
  Scales scales = p.scales;
  scales.weight = memory.weight.data();
  scales.bias = memory.bias.data();
  for (size_t i = 0; i < p.y.size(); ++i) {  // not what is wanted
    memory.y.data()[i] = std::isnan(p.y[i]) ? 0 : std::numeric_limits<float>::quiet_NaN();
    memory.y_bytes.data()[i] = static_cast<uint8_t>(p.y_bytes[i] + 1);
  }
  void* const y = p.scales.to_float ? static_cast<void*>(memory.y.data()) : memory.y_bytes.data();
  const Buffers buffers = {memory.x.data(), memory.words.data(), memory.sums.data(), p.residual.empty() ? nullptr : memory.residual.data(),
                           y, &scales};
  Backwards executor;
  const std::string error = conv.Run(s.n, s.ih, s.iw, s.oh, s.ow, buffers, 0, executor, forced);
  if (!error.empty()) Fail(what + ": " + error);
  for (size_t i = 0; i < p.y.size(); ++i) {
    const float got = memory.y.data()[i], want = p.y[i];
    const bool same = p.scales.to_float ? (std::isnan(want) ? std::isnan(got) : got == want) : memory.y_bytes.data()[i] == p.y_bytes[i];
    if (!same) {
      Fail(what + ": y[" + std::to_string(i) + "] is " + std::to_string(p.scales.to_float ? got : memory.y_bytes.data()[i]) + ", wanted " +
           std::to_string(p.scales.to_float ? want : p.y_bytes[i]));
    }
  }
}

// Every register tile and every arrangement of lanes that some edge shape admits.
void TestTiles() {
  const std::vector<const Isa*> isas = TestedIsas(wanted_isa, Element::kInt8);
  std::vector<std::set<const Kernel*>> tiles(isas.size());
  uint64_t seed = 1;
  for (const Shape& shape : EdgeShapes()) {
    for (double density : {0.1, 1.0, 0.5, 0.0}) {
      ++seed;
      const Int8Problem p = MakeInt8Problem(shape, density, seed % 2 == 0, seed % 3 == 0, seed);
      const Memory front(p, Flush::kFront), back(p, Flush::kBack);
      for (size_t i = 0; i < isas.size(); ++i) {
        const auto conv = MakeConv(p, isas[i]);
        CheckRun(p, *conv, *isas[i], front, nullptr);
        std::vector<Schedule> candidates = Candidates(shape, conv->nnz(), *isas[i], Cpu());
        std::shuffle(candidates.begin(), candidates.end(), std::mt19937_64(seed));
        std::set<std::tuple<int64_t, int64_t, int64_t, int64_t>> lanes;
        std::set<const Kernel*> here;
        for (Schedule& c : candidates) {
          if (!(lanes.insert({c.bn, c.by, c.bx, c.wrap}).second | here.insert(c.kernel).second)) continue;
          if (here.size() % 2 == 0) c.cycles = 1e9;  // worth threads
          CheckRun(p, *conv, *isas[i], here.size() % 3 == 0 ? front : back, &c);
        }
        tiles[i].insert(here.begin(), here.end());
      }
    }
  }
  for (size_t i = 0; i < isas.size(); ++i) {
    for (int k = 0; k < isas[i]->kernel_count; ++k) {
      const Kernel& kernel = isas[i]->kernels[k];
      if (kernel.visit != nullptr && tiles[i].count(&kernel) == 0) {
        Fail(std::string(isas[i]->name) + ": no edge shape admits the tile " + std::to_string(kernel.y) + "x" + std::to_string(kernel.x));
      }
    }
    std::printf("%s: %zu tiles\n", std::string(isas[i]->name).c_str(), tiles[i].size());
  }
}

// Nearly all words, which the dense loop runs: panels of several widths, with words missing and without, and too few.
void TestNearlyAll() {
  std::vector<Shape> shapes = EdgeShapes();
  for (int64_t oc : {2, 32, 70, 150}) {
    shapes.push_back(MakeShape(1, 4, 5, 9, 2, oc, 1, 1, 8));
    shapes.push_back(MakeShape(2, 7, 6, 5, 1, oc, 3, 3, 4, 1, 1, 1, 1, 1, 1, 1, 1));
    shapes.push_back(MakeShape(1, 1, 1, 75, 1, oc, 1, 1, 32));  // few pixels: several blocks, groups, a window that leaves the image
    shapes.push_back(MakeShape(3, 1, 2, 11, 2, oc, 3, 2, 8, 1, 1, 1, 1, 1, 1, 1, 0));
  }
  uint64_t seed = 100;
  for (const Shape& shape : shapes) {
    for (double density : {1.0, 0.99, 0.97}) {
      ++seed;
      const Int8Problem p = MakeInt8Problem(shape, density, seed % 2 == 0, seed % 3 == 0, seed);
      for (const Isa* isa : TestedIsas(wanted_isa, Element::kInt8)) {
        for (Flush flush : {Flush::kFront, Flush::kBack}) CheckRun(p, *MakeConv(p, isa), *isa, Memory(p, flush), nullptr);
      }
    }
  }
}

// Batches of 1x1 convolutions, which are flattened into one row when the tile is chosen freely.
void TestFlattened() {
  for (int64_t n : {1, 3, 16}) {
    const Int8Problem p = MakeInt8Problem(MakeShape(n, 5, 7, 21, 1, 19, 1, 1, 16), 0.2, true, n == 3, static_cast<uint64_t>(n));
    for (const Isa* isa : TestedIsas(wanted_isa, Element::kInt8)) {
      CheckRun(p, *MakeConv(p, isa), *isa, Memory(p, Flush::kFront), nullptr);
      CheckRun(p, *MakeConv(p, isa), *isa, Memory(p, Flush::kBack), nullptr);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::pair<std::string, void (*)()> tests[] = {{"tiles", TestTiles}, {"nearly_all", TestNearlyAll}, {"flattened", TestFlattened}};
  if (argc < 3) Fail("usage: int8_test all|ISA TEST...");
  wanted_isa = argv[1];
  if (TestedIsas(wanted_isa, Element::kInt8).empty()) Fail("no such instruction set here: " + wanted_isa);
  for (int i = 2; i < argc; ++i) {
    const auto* test = std::find_if(std::begin(tests), std::end(tests), [&](const auto& t) { return t.first == argv[i]; });
    if (test == std::end(tests)) Fail(std::string("unknown test ") + argv[i]);
    test->second();
    std::printf("ok %s\n", argv[i]);
  }
  return 0;
}
