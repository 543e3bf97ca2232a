// Programs of steps below XLA and Python, for the sanitizers: the same results for any number of threads and images at a time, and
// thousands of edited programs, each of which is refused or runs on buffers of the sizes that it asked for.
//   program_test CASES
#include "program.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

using namespace sparseflax;

namespace {

struct Threads final : Executor {
  int64_t count;
  explicit Threads(int64_t n) : count(n) {}
  int64_t threads() const override { return count; }
  void For(int64_t n, const std::function<void(int64_t)>& f) override {
    std::atomic<int64_t> next{0};
    std::vector<std::thread> running;
    for (int64_t t = 0; t < count; ++t) {
      running.emplace_back([&] {
        for (int64_t i; (i = next++) < n;) f(i);
      });
    }
    for (std::thread& each : running) each.join();
  }
};

struct Code {
  std::vector<int64_t> words;
  std::vector<float> numbers;
  std::vector<uint8_t> gaps;
  void Step(Op op, std::vector<int64_t> size, std::vector<int64_t> args, std::vector<int64_t> shared, std::vector<int64_t> params,
            std::vector<float> own = {}, int64_t gap_count = 0) {
    words.push_back(static_cast<int64_t>(op));
    words.insert(words.end(), size.begin(), size.end());
    for (const auto& list : {args, shared, params}) {
      words.push_back(static_cast<int64_t>(list.size()));
      words.insert(words.end(), list.begin(), list.end());
    }
    const int64_t end = static_cast<int64_t>(gaps.size());
    words.insert(words.end(), {static_cast<int64_t>(numbers.size()), static_cast<int64_t>(own.size()), end - gap_count, end});
    numbers.insert(numbers.end(), own.begin(), own.end());
  }
};

// Two convolutions, a depthwise one and a pool into a concatenation; a range of its channels, element by element; a reshape; one layer
// that meets each weight once; in eight bits two convolutions, a maximum and a concatenation; and blocks of pixels.
Code Network(int64_t chunk) {
  Code c;
  c.words = {3, 1, 22, 4, 10, chunk, 6, 5, 4, 0};
  const auto full = [&](int64_t taps) { c.gaps.insert(c.gaps.end(), static_cast<size_t>(taps), 0); return taps; };
  int64_t kept = full(3 * 3 * 4 * 4);
  c.Step(Op::kConv, {6, 5, 4}, {0}, {0, 1}, {3, 3, 4, 4, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0}, {}, kept);                   // 1
  c.Step(Op::kConv, {6, 5, 4}, {1, 0}, {0, 1}, {3, 3, 4, 4, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1}, {}, kept);                // 2
  c.Step(Op::kDepthwise, {6, 5, 4}, {2}, {2, 1}, {3, 3, 1, 1, 1, 1, 1, 1, 2, 1});                                             // 3
  c.Step(Op::kPool, {6, 5, 4}, {2}, {}, {1, 3, 3, 1, 1, 1, 1, 1, 1});                                                         // 4
  c.Step(Op::kConcat, {6, 5, 12}, {3, 4, 2}, {}, {});                                                                         // 5
  c.Step(Op::kWindow, {6, 5, 4}, {5}, {}, {0, 0, 6}, {0});                                                                    // 6
  c.Step(Op::kCombine, {6, 5, 4}, {6, 1}, {}, {0, 0, 0});                                                                     // 7
  c.Step(Op::kMap, {6, 5, 4}, {7}, {}, {2}, {0, 0});                                                                          // 8
  c.Step(Op::kCombine, {6, 5, 4}, {8}, {1}, {2, 2, 0});                                                                       // 9
  c.Step(Op::kChannelSum, {6, 5, 12}, {5}, {}, {5, 2});                                                                       // 10
  c.Step(Op::kReshape, {1, 1, 360}, {10}, {}, {});                                                                            // 11
  kept = full(360 * 3);
  c.Step(Op::kConv, {1, 1, 3}, {11}, {3, 4}, {1, 1, 360, 3, 1, 360, 1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0}, {}, kept);              // 12
  c.Step(Op::kQuantize, {6, 5, 4}, {1}, {}, {}, {2, 3});                                                                      // 13
  kept = full(3 * 3 * 4);
  c.Step(Op::kConvInt8, {6, 5, 4}, {13}, {5, 6, 1, 1}, {3, 3, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 5, 0, 0, 0}, {-5, 200}, kept);  // 14
  c.Step(Op::kPool, {6, 5, 4}, {14}, {}, {1, 3, 3, 1, 1, 1, 1, 1, 1});                                                        // 15
  c.Step(Op::kConcat, {6, 5, 8}, {14, 15}, {}, {});                                                                           // 16
  c.Step(Op::kWindow, {6, 5, 4}, {16}, {}, {0, 0, 4}, {3});                                                                   // 17
  c.Step(Op::kConvInt8, {6, 5, 4}, {17, 14}, {7, 8, 1, 1, 1}, {3, 3, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 0, 5, 1, 1}, {-5, 200}, full(3 * 3 * 4));  // 18
  c.Step(Op::kDequantize, {6, 5, 8}, {16}, {}, {}, {2, 3});                                                                   // 19
  c.Step(Op::kUpsample, {12, 10, 1}, {1}, {}, {2, 2});                                                                        // 20
  c.Step(Op::kUpsample, {12, 20, 1}, {20}, {}, {1, 2});                                                                       // 21
  c.Step(Op::kCombine, {12, 20, 1}, {21}, {9}, {2, 4, 1});                                                                    // 22
  c.words.insert(c.words.end(), {9, 12, 18, 22});
  return c;
}

std::vector<float> Random(int64_t size, std::mt19937& draw) {
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = static_cast<float>(static_cast<int>(draw() % 5) - 2);
  return values;
}

// The outputs, one after the other; empty and `error` if the program does not run.
std::vector<float> Run(const Code& code, int64_t n, int64_t threads, std::string* error) {
  const auto program = Program::Make(code.words.data(), static_cast<int64_t>(code.words.size()), code.numbers.data(),
                                     static_cast<int64_t>(code.numbers.size()), code.gaps.data(), static_cast<int64_t>(code.gaps.size()),
                                     nullptr, nullptr, error);
  if (program == nullptr) return {};
  std::mt19937 draw(1);
  std::vector<std::vector<float>> memory;  // of whatever type, as small integers of it
  std::vector<const void*> inputs, shared;
  std::vector<void*> outputs;
  double all = 0;
  for (const auto* sizes : {&program->inputs, &program->shared, &program->outputs}) {
    for (const Sized& each : *sizes) all += static_cast<double>(each.size) * static_cast<double>(n);
  }
  if (all > 1e6) {
    *error = "too large for this test";
    return {};
  }
  const auto made = [&](const Sized& each, int64_t count) -> const void* {
    std::vector<float>& values = memory.emplace_back(Random(each.size * count, draw));
    if (each.type == Type::kFloat32) return values.data();
    // Words of four small int8, or bytes: the first quarter of the memory would do for these.
    for (float& value : values) {
      const uint32_t word = static_cast<uint32_t>(static_cast<int>(value) + 2) * 0x01010101u;
      std::memcpy(&value, &word, 4);
    }
    return values.data();
  };
  for (const Sized& each : program->inputs) inputs.push_back(made(each, n));
  for (const Sized& each : program->shared) shared.push_back(made(each, 1));
  const size_t first = memory.size();
  for (const Sized& each : program->outputs) {
    const int64_t bytes = each.size * n * (each.type == Type::kUint8 ? 1 : 4);
    outputs.push_back(memory.emplace_back(static_cast<size_t>((bytes + 3) / 4), 99.0f).data());
  }
  Threads executor(threads);
  *error = program->Run(n, inputs, shared, outputs, executor);
  std::vector<float> found;
  for (size_t i = first; i < memory.size(); ++i) found.insert(found.end(), memory[i].begin(), memory[i].end());
  return found;
}

}  // namespace

int main(int, char** arguments) {
  std::string error;
  const std::vector<float> want = Run(Network(1), 7, 1, &error);
  if (!error.empty() || want.size() != 7 * (120 + 3 + 120 + 240)) return std::printf("%s\n", error.c_str()), 1;
  for (const int64_t chunk : {1, 2, 16}) {
    for (const int64_t threads : {1, 3, 16}) {
      if (Run(Network(chunk), 7, threads, &error) != want || !error.empty()) return std::printf("differs: %s\n", error.c_str()), 1;
    }
  }
  std::mt19937 draw(0);
  int64_t ran = 0;
  const int64_t odd[] = {-1, 0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 17, 360, 1 << 20, int64_t{1} << 31, int64_t{1} << 62};
  for (int64_t i = std::atoll(arguments[1]); i > 0; --i) {
    Code code = Network(1 + static_cast<int64_t>(draw() % 3));
    for (int64_t edits = 1 + static_cast<int64_t>(draw() % 3); edits > 0; --edits) {
      code.words[draw() % code.words.size()] = odd[draw() % (sizeof odd / sizeof odd[0])];
    }
    if (draw() % 4 == 0) code.gaps[draw() % code.gaps.size()] = static_cast<uint8_t>(draw());
    Run(code, 1 + static_cast<int64_t>(draw() % 3), 1 + static_cast<int64_t>(draw() % 2), &error);
    ran += error.empty();
  }
  std::printf("ok %lld ran\n", static_cast<long long>(ran));
  return 0;
}
