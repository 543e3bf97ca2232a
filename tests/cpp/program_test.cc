// Programs of steps below XLA and Python, for the sanitizers: the same results for any number of threads and images at a time, and no
// memory for what a program only claims.
#include "network.h"

#include <cstdio>
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

int main() {
  std::string error;
  const std::vector<float> want = Run(Network(1), 7, 1, &error);
  if (!error.empty() || want.size() != 7 * (120 + 3 + 120 + 240 + 120 + 200 + 120 + 36 + 120 + 60)) return std::printf("%s\n", error.c_str()), 1;
  for (const int64_t chunk : {1, 2, 16}) {
    for (const int64_t threads : {1, 3, 16}) {
      if (Run(Network(chunk), 7, threads, &error) != want || !error.empty()) return std::printf("differs: %s\n", error.c_str()), 1;
    }
  }
  Code wide{{kProgramVersion, 1, 1, 1, 1, 1, 1, 1, 1, 0}, {}, {0}};  // 2^30 channels, of which one has a weight
  wide.Step(Op::kConv, {1, 1, 1 << 30}, {0}, {0}, {1, 1, 1, 1 << 30, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0}, {}, 1);
  wide.words.push_back(1);
  if (Program::Make(wide.words.data(), static_cast<int64_t>(wide.words.size()), nullptr, 0, wide.gaps.data(), 1, nullptr, nullptr, &error) == nullptr) {
    return std::printf("%s\n", error.c_str()), 1;
  }
  std::puts("ok");
  return 0;
}
