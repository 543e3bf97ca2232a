// The handler called with what nobody should call it with, as a hostile program could: convolutions of random shapes, of which
// some attributes, sizes, types and operands are changed. Each has to be refused with a message or computed; one that nothing was
// changed of has to be right. Memory is told by the sanitizers, which see every buffer at its exact size.
//
//   handler_fuzz SEED FIRST SECONDS CASES     cases from number FIRST on; "at N" on stderr says which one runs when one fails
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "runtime.h"

namespace {

class Draw {
 public:
  Draw(uint64_t seed, uint64_t number) : random_(seed * 0x9E3779B97F4A7C15u + number) {}
  int64_t Below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  int64_t Between(int64_t low, int64_t high) { return low + Below(high - low + 1); }
  bool OneIn(int64_t n) { return Below(n) == 0; }
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

Problem AnyProblem(Draw& draw, uint64_t seed) {
  for (;;) {
    const int64_t groups = draw.OneIn(4) ? draw.Between(2, 4) : 1, icg = draw.Between(1, 20);
    const int64_t kh = draw.Between(1, 4), kw = draw.Between(1, 4), dh = draw.Between(1, 2), dw = draw.Between(1, 2);
    const Shape s = MakeShape(draw.Between(1, 3), draw.Between(1, 12), draw.Between(1, 12), icg, groups, groups * draw.Between(1, 12),
                              kh, kw, draw.Between(1, icg), draw.Between(1, 3), draw.Between(1, 3), dh, dw, draw.Between(0, 3),
                              draw.Between(0, 3), draw.Between(0, 3), draw.Between(0, 3));
    if (s.ih + s.top + s.bottom < (kh - 1) * dh + 1 || s.iw + s.left + s.right < (kw - 1) * dw + 1) continue;
    return MakeProblem(s, static_cast<double>(draw.Between(0, 10)) / 10, static_cast<int>(draw.Below(3)), draw.OneIn(2), seed);
  }
}

// A buffer of exactly the size that its dimensions say.
struct Memory {
  Operand operand;
  std::vector<float> data;
};

constexpr int64_t kMost = 1 << 20;  // elements of a buffer; what XLA hands over exists

int64_t Count(const std::vector<int64_t>& dims) {
  int64_t count = 1;
  for (const int64_t dim : dims) {
    if (dim < 0 || (dim > 0 && count > kMost / dim)) return kMost + 1;
    count *= dim;
  }
  return count;
}

void Change(Draw& draw, std::vector<int64_t>& numbers) {
  if (numbers.empty() || draw.OneIn(12)) {
    if (draw.OneIn(2) && !numbers.empty()) numbers.pop_back();
    else numbers.push_back(draw.Other(1));
    return;
  }
  int64_t& number = numbers[static_cast<size_t>(draw.Below(static_cast<int64_t>(numbers.size())))];
  number = draw.Other(number);
}

void Change(Draw& draw, std::vector<uint8_t>& gaps) {
  for (int64_t times = draw.Between(1, 3); times > 0; --times) {
    const auto at = gaps.begin() + draw.Below(static_cast<int64_t>(gaps.size()) + 1);
    if (at == gaps.end() || draw.OneIn(3)) gaps.insert(at, static_cast<size_t>(draw.Between(1, 300)), static_cast<uint8_t>(draw.Below(256)));
    else if (draw.OneIn(2)) gaps.erase(at, at + draw.Below(gaps.end() - at + 1));
    else *at = static_cast<uint8_t>(draw.Below(256));
  }
}

void Change(Draw& draw, Attributes& a) {
  switch (draw.Below(5)) {
    case 0: return Change(draw, a.layout);
    case 1: return Change(draw, a.window);
    case 2: return Change(draw, a.epilogue);
    case 3: return Change(draw, a.gaps);
    default: a.kernel = draw.OneIn(2) ? "portable" : "no such";
  }
}

void Change(Draw& draw, std::vector<Memory>& operands) {
  if (draw.OneIn(8)) {
    if (operands.size() > 2 && draw.OneIn(2)) operands.pop_back();
    else operands.push_back(operands[static_cast<size_t>(draw.Below(static_cast<int64_t>(operands.size())))]);
    return;
  }
  Operand& operand = operands[static_cast<size_t>(draw.Below(static_cast<int64_t>(operands.size())))].operand;
  if (draw.OneIn(8)) {
    const XLA_FFI_DataType types[] = {XLA_FFI_DataType_S32, XLA_FFI_DataType_F16, XLA_FFI_DataType_U8, XLA_FFI_DataType_PRED};
    operand.type = types[draw.Below(4)];  // of at most 4 bytes, so that the buffer is large enough
  } else {
    const std::vector<int64_t> before = operand.dims;
    Change(draw, operand.dims);
    if (Count(operand.dims) > kMost) operand.dims = before;
  }
}

// "computed", "right", or the message with which it was refused, without numbers.
std::string Case(uint64_t seed, uint64_t number, Pool& pool) {
  Draw draw(seed, number);
  const Problem p = AnyProblem(draw, seed + number);
  const Shape& s = p.shape;
  Attributes attributes = AttributesOf(p);
  std::vector<Memory> memory = {{{{s.n, s.oh, s.ow, s.oc}, nullptr}, {}}, {{{s.n, s.ih, s.iw, s.ic()}, nullptr}, p.x},
                                {{{static_cast<int64_t>(p.values.size())}, nullptr}, p.values}, {{{s.oc}, nullptr}, p.bias}};
  if (!p.residual.empty()) memory.push_back({{{s.n, s.oh, s.ow, s.oc}, nullptr}, p.residual});
  const int64_t changes = draw.Between(0, 3);
  for (int64_t i = 0; i < changes; ++i) {
    if (draw.OneIn(2)) Change(draw, attributes);
    else Change(draw, memory);
  }
  for (Memory& each : memory) {
    each.data.resize(static_cast<size_t>(Count(each.operand.dims)), draw.OneIn(8) ? NAN : 1.0f);
    each.data.shrink_to_fit();
    each.operand.data = each.data.data();
  }
  XLA_FFI_ExecutionContext site = {&pool};
  std::string message = Instantiate(&site, attributes);
  if (message.empty()) {
    std::vector<Operand> operands;
    for (size_t i = 1; i < memory.size(); ++i) operands.push_back(memory[i].operand);
    message = Execute(&site, operands, memory[0].operand);
    if (message.empty() && changes > 0) return "computed";
  }
  if (changes == 0) {
    if (!message.empty()) Fail(Describe(s) + ": " + message);
    for (size_t i = 0; i < p.y.size(); ++i) {
      if (!(std::abs(static_cast<double>(memory[0].data[i]) - p.y[i]) <= p.bound[i])) Fail(Describe(s) + ": y[" + std::to_string(i) + "] is wrong");
    }
    return "right";
  }
  for (char& c : message) c = c >= '0' && c <= '9' ? '#' : c;
  while (message.find("##") != std::string::npos) message.erase(message.find("##"), 1);
  for (char& c : message) c = c == '"' ? '\'' : c;
  return message.substr(0, message.find('\n'));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) Fail("usage: handler_fuzz SEED FIRST SECONDS CASES");
  const uint64_t seed = std::strtoull(argv[1], nullptr, 10), first = std::strtoull(argv[2], nullptr, 10);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[3]));
  const uint64_t most = std::strtoull(argv[4], nullptr, 10);
  Register();
  Pool pool(2);
  std::map<std::string, uint64_t> outcomes;
  for (uint64_t number = first; number - first < most && std::chrono::steady_clock::now() < end; ++number) {
    std::fprintf(stderr, "at %" PRIu64 "\n", number);
    ++outcomes[Case(seed, number, pool)];
  }
  for (const auto& [outcome, count] : outcomes) {
    std::printf("{\"outcome\": \"%s\", \"count\": %" PRIu64 "}\n", outcome.c_str(), count);
  }
  return 0;
}
