// Random cases for the fuzzers: a case is a function of a seed and its number.
#pragma once

#include <chrono>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <vector>

class Draw {
 public:
  Draw(uint64_t seed, uint64_t number) : random_(seed * 0x9E3779B97F4A7C15u + number) {}
  int64_t Below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  int64_t Between(int64_t low, int64_t high) { return low + Below(high - low + 1); }
  bool OneIn(int64_t n) { return Below(n) == 0; }
  template <typename T>
  T& Of(std::vector<T>& items) { return items[static_cast<size_t>(Below(static_cast<int64_t>(items.size())))]; }
  // What another number might become.
  int64_t Other(int64_t value) {
    const int64_t edges[] = {0, 1, -1, 2, 255, 65535, 65536, int64_t{1} << 31, (int64_t{1} << 31) - 1, int64_t{1} << 32,
                             int64_t{1} << 40, INT64_MAX, INT64_MIN, INT64_MAX - 1};
    switch (Below(4)) {
      case 0: return edges[Below(std::size(edges))];
      case 1: return static_cast<int64_t>(static_cast<uint64_t>(value) + static_cast<uint64_t>(Between(-2, 2)));
      case 2: return Between(0, 40);
      default: return static_cast<int64_t>(random_());
    }
  }

 private:
  std::mt19937_64 random_;
};

inline void Change(Draw& draw, std::vector<int64_t>& numbers) {
  if (numbers.empty() || draw.OneIn(12)) {
    if (draw.OneIn(2) && !numbers.empty()) numbers.pop_back();
    else numbers.push_back(draw.Other(1));
    return;
  }
  int64_t& number = draw.Of(numbers);
  number = draw.Other(number);
}

inline void Change(Draw& draw, std::vector<uint8_t>& gaps) {
  for (int64_t times = draw.Between(1, 3); times > 0; --times) {
    const auto at = gaps.begin() + draw.Below(static_cast<int64_t>(gaps.size()) + 1);
    if (at == gaps.end() || draw.OneIn(3)) gaps.insert(at, static_cast<size_t>(draw.Between(1, 300)), static_cast<uint8_t>(draw.Below(256)));
    else if (draw.OneIn(2)) gaps.erase(at, at + draw.Below(gaps.end() - at + 1));
    else *at = static_cast<uint8_t>(draw.Below(256));
  }
}

// A message without numbers and what JSON would escape.
inline std::string Kind(std::string message) {
  for (char& c : message) c = c >= '0' && c <= '9' ? '#' : c == '"' ? '\'' : c;
  while (message.find("##") != std::string::npos) message.erase(message.find("##"), 1);
  return message.substr(0, message.find('\n'));
}

// The main function of a fuzzer, PROGRAM SEED FIRST SECONDS CASES: f(seed, number) of numbers from FIRST on, each of which says what
// came of it. "at N" on stderr says which one runs when one fails; a JSON line for each outcome at the end.
template <typename F>
int Fuzz(int argc, char** argv, const F& f) {
  if (argc < 5) return std::fprintf(stderr, "usage: %s SEED FIRST SECONDS CASES\n", argv[0]), 2;
  const uint64_t seed = std::strtoull(argv[1], nullptr, 10), first = std::strtoull(argv[2], nullptr, 10);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[3]));
  const uint64_t most = std::strtoull(argv[4], nullptr, 10);
  std::map<std::string, uint64_t> outcomes;
  for (uint64_t number = first; number - first < most && std::chrono::steady_clock::now() < end; ++number) {
    std::fprintf(stderr, "at %" PRIu64 "\n", number);
    ++outcomes[f(seed, number)];
  }
  for (const auto& [outcome, count] : outcomes) {
    std::printf("{\"outcome\": \"%s\", \"count\": %" PRIu64 "}\n", outcome.c_str(), count);
  }
  return 0;
}
