// Tests of the kernel below XLA and Python: every instruction set and register tile between guard pages, non-finite
// inputs, damaged patterns, concurrent runs. The first argument is an instruction set or "all", the others are tests;
// exits with 1 after the first failure.
#include "sparse_conv.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <set>
#include <stdexcept>
#include <thread>
#include <tuple>

#include "edges.h"
#include "guarded.h"
#include "pool.h"
#include "pool_executor.h"
#include "problem.h"

using namespace sparseflax;

namespace {

std::string wanted_isa = "all";

std::vector<const Isa*> TestedIsas() { return ::TestedIsas(wanted_isa, Element::kFloat32); }

std::unique_ptr<Conv> MakeConv(const Problem& p, const Isa* isa) {
  std::string error;
  auto conv = Conv::Make(p.shape, p.gaps.data(), static_cast<int64_t>(p.gaps.size()), isa, &error);
  if (conv == nullptr) Fail(Describe(p.shape) + ": " + error);
  if (conv->nnz() != static_cast<int64_t>(p.values.size())) Fail(Describe(p.shape) + ": wrong number of kept weights");
  return conv;
}

// A function done to a result, exact but for its sum.
const float kNumbers[] = {2, 1, -5, 9};
const Function kFunction = {Unary::kClamp, kNumbers};

void Compare(const Problem& p, const float* y, const std::string& what, bool follows = false) {
  for (size_t i = 0; i < p.y.size(); ++i) {
    const double sum = 2 * p.y[i] + 1, rounded = std::isfinite(sum) ? 2 * p.bound[i] + std::ldexp(std::abs(sum) + 2 * p.bound[i], -24) : 0;
    const double got = y[i], want = follows ? std::clamp(sum, -5.0, 9.0) : p.y[i], bound = follows ? rounded : p.bound[i];
    const bool same = std::isfinite(want) ? std::abs(got - want) <= bound
                      : std::isnan(want)  ? std::isnan(got)
                                          : got == want;
    if (!same) {
      Fail(what + ": y[" + std::to_string(i) + "] is " + std::to_string(got) + ", wanted " + std::to_string(want) +
           " within " + std::to_string(bound));
    }
  }
}

std::string RunConv(const Problem& p, Conv& conv, const Buffers& buffers, Executor& executor, const Schedule* forced) {
  const Shape& s = p.shape;
  return conv.Run(s.n, s.ih, s.iw, s.oh, s.ow, buffers, p.activation, executor, forced);
}

// The buffers of a problem, each flush with a guard page.
struct Memory {
  Guarded x, values, bias, residual, y;
  Memory(const Problem& p, Flush flush)
      : x(p.x, flush), values(p.values, flush), bias(p.bias, flush), residual(p.residual, flush), y(p.y.size(), flush) {}
  Buffers buffers() const {
    return {x.data(), values.data(), bias.data(), residual.size() > 0 ? residual.data() : nullptr, y.data()};
  }
};

void CheckRun(const Problem& p, Conv& conv, const Isa& isa, const Memory& memory, const Schedule* forced) {
  const std::string what = Describe(p.shape, isa, forced);
  for (size_t i = 0; i < p.y.size(); ++i) memory.y.data()[i] = std::isnan(p.y[i]) ? 0 : std::numeric_limits<float>::quiet_NaN();
  Backwards executor;
  static int turn = 0;
  const bool follows = ++turn % 3 == 0;
  Buffers buffers = memory.buffers();
  buffers.then = follows ? &kFunction : nullptr;
  const std::string error = RunConv(p, conv, buffers, executor, forced);
  if (!error.empty()) Fail(what + ": " + error);
  Compare(p, memory.y.data(), what, follows);
}

// Every register tile and every arrangement of lanes that some edge shape admits, at densities 0, 0.1, 0.5 and 1.
void TestTiles() {
  const double densities[] = {0.1, 1, 0.5, 0};
  for (const Isa* isa : TestedIsas()) {
    std::set<const Kernel*> tiles;
    int64_t runs = 0;
    uint64_t seed = 1;
    for (const Shape& shape : EdgeShapes()) {
      for (double density : densities) {
        ++seed;
        const Problem p = MakeProblem(shape, density, static_cast<int>(seed % 3), seed % 2 == 0, seed);
        const auto conv = MakeConv(p, isa);
        const Memory front(p, Flush::kFront), back(p, Flush::kBack);
        CheckRun(p, *conv, *isa, front, nullptr);
        CheckRun(p, *conv, *isa, back, nullptr);
        // A few of the candidates: each tile and each arrangement of lanes once for this problem.
        std::vector<Schedule> candidates = Candidates(shape, conv->nnz(), *isa, Cpu());
        std::shuffle(candidates.begin(), candidates.end(), std::mt19937_64(seed));
        std::set<std::tuple<int64_t, int64_t, int64_t, int64_t>> lanes;
        std::set<const Kernel*> here;
        for (Schedule& c : candidates) {
          if (!(lanes.insert({c.bn, c.by, c.bx, c.wrap}).second | here.insert(c.kernel).second)) continue;
          if (runs % 2 == 0) c.cycles = 1e9;  // worth threads
          CheckRun(p, *conv, *isa, ++runs % 2 == 0 ? front : back, &c);
        }
        tiles.insert(here.begin(), here.end());
      }
    }
    for (int i = 0; i < isa->kernel_count; ++i) {
      const Kernel& kernel = isa->kernels[i];
      if (kernel.visit != nullptr && tiles.count(&kernel) == 0) {
        Fail(std::string(isa->name) + ": no edge shape admits the tile " + std::to_string(kernel.y) + "x" + std::to_string(kernel.x));
      }
    }
    std::printf("%s: %zu tiles, %lld runs\n", std::string(isa->name).c_str(), tiles.size(), static_cast<long long>(runs));
  }
}

// Batches of 1x1 convolutions, which are flattened into one row when the tile is chosen freely.
void TestFlattened() {
  for (const Isa* isa : TestedIsas()) {
    for (int64_t n : {1, 3, 16}) {
      const Problem p = MakeProblem(MakeShape(n, 5, 7, 21, 1, 19, 1, 1, 16), 0.2, 1, true, static_cast<uint64_t>(n));
      const auto conv = MakeConv(p, isa);
      CheckRun(p, *conv, *isa, Memory(p, Flush::kFront), nullptr);
      CheckRun(p, *conv, *isa, Memory(p, Flush::kBack), nullptr);
    }
  }
}

// nan and inf reach every output whose window sees them, through pruned weights too, and no other.
void TestNonFinite() {
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity()};
  for (const Isa* isa : TestedIsas()) {
    size_t turn = 0;
    for (const Shape& shape : EdgeShapes()) {
      ++turn;  // pairs every density with every activation, over the shapes
      for (double density : {0.0, 0.1, 1.0}) {
        Problem p = MakeProblem(shape, density, static_cast<int>(++turn % 3), true, turn);
        for (size_t i = 0; i < 3; ++i) p.x[p.x.size() * (2 * i + 1) / 6] = bad[(i + turn) % 3];
        Solve(p);
        CheckRun(p, *MakeConv(p, isa), *isa, Memory(p, Flush::kBack), nullptr);
      }
    }
  }
}

// Damaged gap codes and sizes are refused, or by chance still point inside: never an access outside.
void TestDamaged() {
  const Shape shape = MakeShape(2, 6, 7, 10, 2, 6, 3, 3, 4, 1, 1, 1, 1, 1, 1, 1, 1);
  const Problem p = MakeProblem(shape, 0.3, 0, false, 3);
  std::mt19937_64 random(11);
  int64_t refused = 0;
  Backwards executor;
  for (const Isa* isa : TestedIsas()) {
    for (int i = 0; i < 200; ++i) {
      Problem damaged = p;
      for (uint64_t edits = 1 + random() % 3; edits > 0; --edits) {
        damaged.gaps[random() % p.gaps.size()] = static_cast<uint8_t>(random() % 4 == 0 ? 255 : random() % 40);
      }
      if (i % 10 == 0) damaged.gaps.insert(damaged.gaps.end(), random() % 300, static_cast<uint8_t>(random()));
      std::string error;
      const auto conv = Conv::Make(shape, damaged.gaps.data(), static_cast<int64_t>(damaged.gaps.size()), isa, &error);
      if ((conv == nullptr) == error.empty()) Fail("a refusal without a reason, or the reverse");
      if (conv == nullptr) {
        ++refused;
        continue;
      }
      damaged.values.assign(static_cast<size_t>(conv->nnz()), 1.f);
      const Memory memory(damaged, Flush::kBack);
      error = RunConv(damaged, *conv, memory.buffers(), executor, nullptr);
      if (!error.empty()) Fail("damaged but decodable: " + error);
    }
  }
  if (refused == 0) Fail("no damaged pattern was refused");

  // Channels 0 to 4 in one block of five, or in blocks of three with a place for a sixth.
  const Shape one = MakeShape(1, 3, 3, 5, 1, 2, 1, 1, 5), two = MakeShape(1, 3, 3, 5, 1, 2, 1, 1, 3);
  const std::tuple<Shape, std::vector<uint8_t>, bool> edges[] = {
      {one, {9}, true},   {one, {10}, false},    {one, {8, 0}, true}, {one, {8, 0, 0}, false}, {one, {255}, true},
      {one, {255, 0}, false}, {two, {10}, true}, {two, {11}, false},  {two, {6, 0}, true},     {two, {7, 0}, false}};
  for (const auto& [at, gaps, valid] : edges) {
    std::string error;
    const auto conv = Conv::Make(at, gaps.data(), static_cast<int64_t>(gaps.size()), Isas()[0], &error);
    if ((conv != nullptr) != valid) Fail("the pattern at an edge of its kernel was judged wrongly: " + error);
  }
}

// Sizes that no convolution has, and images that do not fit the window.
void TestSizes() {
  const Shape shape = MakeShape(2, 6, 7, 10, 2, 6, 3, 3, 4, 1, 1, 1, 1, 1, 1, 1, 1);
  const Problem p = MakeProblem(shape, 0.3, 0, false, 3);
  std::string error;
  int64_t Shape::*const sizes[] = {&Shape::kh, &Shape::kw, &Shape::icg, &Shape::oc, &Shape::groups, &Shape::block,
                                   &Shape::sh, &Shape::sw, &Shape::dh,  &Shape::dw, &Shape::top,    &Shape::left};
  for (auto size : sizes) {
    for (int64_t value : {int64_t{-1}, std::numeric_limits<int64_t>::min()}) {
      Shape s = shape;
      s.*size = value;
      if (Conv::Make(s, p.gaps.data(), 1, Isas()[0], &error) != nullptr || error.empty()) Fail("a negative size was accepted");
    }
    Shape s = shape;
    s.*size = std::numeric_limits<int64_t>::max();
    if (size != &Shape::top && size != &Shape::left && s.Check().empty()) Fail("an absurd size was accepted");
  }
  Shape large = shape;
  large.icg = large.oc = large.groups = int64_t{1} << 31;
  large.block = 1;
  if (large.Check().empty()) Fail("a kernel of 2^93 weights was accepted");

  const Memory memory(p, Flush::kBack);
  Backwards executor;
  for (const Isa* isa : TestedIsas()) {
    const auto conv = MakeConv(p, isa);
    const Shape& s = shape;
    const int64_t wrong[][5] = {{s.n, 0, s.iw, s.oh, s.ow},        {s.n, s.ih, -1, s.oh, s.ow},  {s.n, s.ih, s.iw, s.oh + 1, s.ow},
                                {s.n, s.ih, s.iw, s.oh, s.ow - 1}, {s.n, 1 << 20, 1 << 20, 1 << 20, 1 << 20}};
    for (const auto& d : wrong) {
      if (conv->Run(d[0], d[1], d[2], d[3], d[4], memory.buffers(), 0, executor).empty()) Fail("wrong image sizes were accepted");
    }
  }
}

// One convolution run by four threads at once that share a pool; the first runs race for the plan.
void TestThreads() {
  const Shape shape = MakeShape(2, 24, 25, 40, 1, 67, 3, 3, 16, 1, 1, 1, 1, 1, 1, 1, 1);
  Shape smaller = shape;
  smaller.n = 1;
  const Problem problems[] = {MakeProblem(shape, 0.1, 1, true, 5), MakeProblem(smaller, 0.1, 1, true, 5)};
  Pool pool(3);
  for (const Isa* isa : TestedIsas()) {
    const auto conv = MakeConv(problems[0], isa);
    std::vector<std::thread> callers;
    for (size_t t = 0; t < 4; ++t) {
      callers.emplace_back([&, t] {
        const Problem& p = problems[t % 2];
        for (int repeat = 0; repeat < 3; ++repeat) {
          std::vector<float> y(p.y.size());
          PoolExecutor<Pool> executor(pool);
          const std::string error =
              RunConv(p, *conv, {p.x.data(), p.values.data(), p.bias.data(), p.residual.data(), y.data()}, executor, nullptr);
          if (!error.empty()) Fail(error);
          Compare(p, y.data(), "concurrent " + Describe(p.shape, *isa, nullptr));
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
  }
}

// Loops whose callers are the pool's own threads, more of them than threads, some while others sleep; an exception arrives
// where the loop was started.
void TestPool() {
  for (const int threads : {1, 2, 3}) {
    std::atomic<int> sum{0}, ended{0}, caught{0};
    {
      Pool pool(threads);
      const auto call = [&](int pause) {
        PoolExecutor<Pool> executor(pool);
        for (int repeat = 0; repeat < 20; ++repeat) {
          executor.For(5, [&](int64_t i) { sum += static_cast<int>(i); });
          std::this_thread::sleep_for(std::chrono::microseconds(pause));
        }
        try {
          executor.For(3, [](int64_t i) {
            if (i == 1) throw std::runtime_error("item 1");
          });
        } catch (const std::runtime_error&) {
          ++caught;
        }
        ++ended;
      };
      for (int task = 0; task < 64; ++task) pool.Schedule([&, task] { call(task % 8 ? 0 : 150); });
      call(10);
      while (ended != 65) std::this_thread::yield();
    }
    if (sum != 65 * 20 * 10 || caught != 65) Fail("a loop lost items or an exception");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::pair<std::string, void (*)()> tests[] = {
      {"tiles", TestTiles},     {"flattened", TestFlattened}, {"nonfinite", TestNonFinite},
      {"damaged", TestDamaged}, {"sizes", TestSizes},         {"threads", TestThreads},
      {"pool", TestPool}};
  if (argc < 3) Fail("usage: sparse_conv_test all|ISA TEST...");
  wanted_isa = argv[1];
  if (TestedIsas().empty()) Fail("no such instruction set here: " + wanted_isa);
  for (int i = 2; i < argc; ++i) {
    const auto* test = std::find_if(std::begin(tests), std::end(tests), [&](const auto& t) { return t.first == argv[i]; });
    if (test == std::end(tests)) Fail(std::string("unknown test ") + argv[i]);
    test->second();
    std::printf("ok %s\n", argv[i]);
  }
  return 0;
}
