// Network programs that nobody should trust, as a hostile file could hold them: random ones, of which some words, numbers, gaps,
// sizes, types and operands are changed. Each has to be refused with a message or computed; one that nothing was changed of has to be
// computed. Memory is told by the sanitizers, which see every buffer at its exact size.
//
//   program_fuzz SEED FIRST SECONDS CASES
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "draw.h"
#include "network.h"
#include "runtime.h"

using namespace sparseflax;

namespace {

constexpr double kMostWork = 1 << 21;  // multiplications, and elements of all values: more is decoded and laid out, but not run

struct Size {
  int64_t h, w, c;
  bool bytes;
  std::vector<int64_t> list() const { return {h, w, c}; }
  bool operator==(const Size& o) const { return h == o.h && w == o.w && c == o.c && bytes == o.bytes; }
};

// A program of random steps that fit each other.
class Grown {
 public:
  explicit Grown(Draw& draw) : draw_(draw) {
    const int64_t inputs = draw.Between(1, 2), steps = draw.Between(1, 12);
    code.words = {kProgramVersion, inputs, steps, 0, 0, draw.Between(1, 4)};
    for (int64_t i = 0; i < inputs; ++i) {
      values_.push_back({draw.Between(1, 7), draw.Between(1, 7), 4 * draw.Between(1, 5), draw.OneIn(3)});
      if (!values_.back().bytes && draw.OneIn(2)) values_.back().c = draw.Between(1, 19);
      code.words.insert(code.words.end(), {values_.back().h, values_.back().w, values_.back().c, values_.back().bytes});
    }
    reshaped_.assign(values_.size(), true);  // inputs are no outputs either
    while (values_.size() < static_cast<size_t>(inputs + steps)) Step();
    std::vector<int64_t> outputs;
    for (size_t v = 0; v < values_.size(); ++v) {
      if (!reshaped_[v] && (v + 1 == values_.size() || draw.OneIn(4))) outputs.push_back(static_cast<int64_t>(v));
    }
    if (outputs.empty()) {  // all are reshaped ones: one more that is not
      const int64_t last = static_cast<int64_t>(values_.size()) - 1;
      Window(last);
      ++code.words[2];
      outputs.push_back(last + 1);
    }
    code.words[3] = static_cast<int64_t>(outputs.size());
    code.words[4] = operands_;
    code.words.insert(code.words.end(), outputs.begin(), outputs.end());
  }
  Code code;

 private:
  void Add(Op op, Size y, std::vector<int64_t> args, int64_t operands, std::vector<int64_t> params, std::vector<float> numbers = {},
           int64_t gaps = 0) {
    std::vector<int64_t> shared;
    for (int64_t i = 0; i < operands; ++i) shared.push_back(operands_++);
    code.Step(op, y.list(), args, shared, params, numbers, gaps);
    values_.push_back(y);
    reshaped_.push_back(op == Op::kReshape);
  }

  void Window(int64_t v) {
    const Size& x = values_[static_cast<size_t>(v)];
    const int64_t from = draw_.Below(x.c);
    const bool part = draw_.OneIn(2);  // a range of channels, which may stay where it is
    const Size y = part ? Size{x.h, x.w, draw_.Between(1, x.c - from), x.bytes}
                        : Size{draw_.Between(1, 9), draw_.Between(1, 9), draw_.Between(1, 19), x.bytes};
    const int64_t row = part ? 0 : draw_.Between(-3, 3), column = part ? 0 : draw_.Between(-3, 3);
    Add(Op::kWindow, y, {v}, 0, {row, column, part ? from : draw_.Between(-3, 3)}, {static_cast<float>(draw_.Below(256))});
  }

  void Conv(int64_t v, bool int8) {
    const Size x = values_[static_cast<size_t>(v)];
    const int64_t channels = int8 ? x.c / 4 : x.c, groups = channels % 2 == 0 && draw_.OneIn(3) ? 2 : 1;
    if (int8 && x.c % 4 != 0) return Window(v);
    const int64_t icg = channels / groups, oc = groups * draw_.Between(1, 8);
    const int64_t kh = draw_.Between(1, 3), kw = draw_.Between(1, 3), sh = draw_.Between(1, 2), sw = draw_.Between(1, 2);
    const int64_t dh = draw_.Between(1, 2), dw = draw_.Between(1, 2), top = draw_.Between(0, 2), bottom = draw_.Between(0, 2);
    const int64_t left = draw_.Between(0, 2), right = draw_.Between(0, 2), block = draw_.OneIn(3) ? 1 : icg;
    const int64_t high = x.h + top + bottom - (kh - 1) * dh - 1, wide = x.w + left + right - (kw - 1) * dw - 1;
    if (high < 0 || wide < 0) return Window(v);
    const bool floats = !int8 || draw_.OneIn(3);
    const Size y = {high / sh + 1, wide / sw + 1, oc, !floats};
    const int64_t sparsest = draw_.OneIn(2) ? 1 : 20;
    int64_t gaps = 0, gap = draw_.Below(sparsest);
    for (int64_t at = gap; at < kh * kw * icg * oc; at += 1 + gap) {
      code.gaps.push_back(static_cast<uint8_t>(gap));
      ++gaps;
      gap = draw_.Below(sparsest);
    }
    std::vector<int64_t> args = {v}, params = {kh, kw, icg, oc, groups, block, sh, sw, top, bottom, left, right, dh, dw};
    const Size alike = {y.h, y.w, y.c, int8};
    const auto residual = std::find(values_.begin(), values_.end(), alike);
    if (residual != values_.end()) args.push_back(residual - values_.begin());
    const bool more = args.size() == 2;
    if (int8) {
      const int64_t zero = draw_.Below(256);
      const bool inner = more && draw_.OneIn(2);
      params.insert(params.end(), {draw_.Below(256), zero, draw_.Below(256), floats, more, inner});
      std::vector<float> numbers = {static_cast<float>(-zero), static_cast<float>(255 - zero), 0.5f, 0.25f, 0.125f};
      if (inner) numbers.insert(numbers.end(), {-100, 155, 0.01f, 0.5f});
      return Add(Op::kConvInt8, y, args, 4, params, numbers, gaps);
    }
    const bool bias = draw_.OneIn(2);
    params.insert(params.end(), {draw_.Below(3), bias, more});
    Add(Op::kConv, y, args, 1 + bias, params, {}, gaps);
  }

  void Dense(int64_t v, int64_t kh, int64_t kw, int64_t s, int64_t d, bool bias) {
    const Size x = values_[static_cast<size_t>(v)];
    const int64_t groups = x.c % 2 == 0 && draw_.OneIn(3) ? 2 : 1, high = x.h - (kh - 1) * d - 1, wide = x.w - (kw - 1) * d - 1;
    if (high < 0 || wide < 0) return Window(v);
    Add(Op::kDense, {high / s + 1, wide / s + 1, groups * draw_.Between(1, 24), false}, {v}, 1 + bias,
        {kh, kw, s, s, 0, 0, d, d, groups, draw_.Below(3), bias});
  }

  void Step() {
    const int64_t v = draw_.Below(static_cast<int64_t>(values_.size()));
    const Size x = values_[static_cast<size_t>(v)];
    if (draw_.OneIn(8)) return Window(v);
    if (draw_.OneIn(8)) return Add(Op::kReshape, draw_.OneIn(2) ? Size{1, 1, x.h * x.w * x.c, x.bytes} : Size{x.w, x.h, x.c, x.bytes}, {v}, 0, {});
    if (draw_.OneIn(8) && x.h * x.w * x.c < 1 << 12) {
      const int64_t fh = draw_.Between(1, 3), fw = draw_.Between(1, 3);
      const bool blocks = x.c % (fh * fw) == 0 && draw_.OneIn(2);
      return Add(Op::kUpsample, {fh * x.h, fw * x.w, blocks ? x.c / (fh * fw) : x.c, x.bytes}, {v}, 0, {fh, fw});
    }
    if (draw_.OneIn(12)) {
      int64_t groups = draw_.Between(1, x.c);
      while (x.c % groups != 0) --groups;
      return Add(Op::kShuffle, x, {v}, 0, {groups});
    }
    if (draw_.OneIn(4)) {
      std::vector<int64_t> args;
      Size y = {x.h, x.w, 0, x.bytes};
      for (size_t other = 0; other < values_.size(); ++other) {
        const Size& o = values_[other];
        if (o.h != x.h || o.w != x.w || o.bytes != x.bytes || draw_.OneIn(3) || y.c + o.c > 64) continue;
        args.push_back(static_cast<int64_t>(other));
        y.c += o.c;
      }
      if (!args.empty()) return Add(Op::kConcat, y, args, 0, {});
    }
    if (draw_.OneIn(6)) {
      const int64_t kh = draw_.Between(1, 3), kw = draw_.Between(1, 3), s = draw_.Between(1, 2), d = draw_.Between(1, 2);
      const bool bias = draw_.OneIn(2), bytes = draw_.OneIn(2);
      std::vector<float> numbers;
      for (int64_t i = 0; i < x.bytes + bytes; ++i) numbers.insert(numbers.end(), {0.5f, static_cast<float>(draw_.Below(256))});
      return Add(Op::kDepthwise, {draw_.Between(1, 7), draw_.Between(1, 7), x.c, bytes}, {v}, 1 + bias,
                 {kh, kw, s, s, draw_.Between(0, 3), draw_.Between(0, 3), d, d, draw_.Below(3), bias, x.bytes, bytes}, numbers);
    }
    if (draw_.OneIn(6) || (!x.bytes && draw_.OneIn(6))) {
      const int64_t kh = draw_.Between(1, 3), kw = draw_.Between(1, 3), s = draw_.Between(1, 2), d = draw_.Between(1, 2);
      const Size y = {draw_.Between(1, 7), draw_.Between(1, 7), x.c, x.bytes};
      if (x.bytes || draw_.OneIn(2)) return Add(Op::kPool, y, {v}, 0, {x.bytes || draw_.OneIn(2), kh, kw, s, s, draw_.Between(0, 3), draw_.Between(0, 3), d, d});
      return Dense(v, kh, kw, s, d, draw_.OneIn(2));
    }
    if (x.bytes) {
      if (draw_.OneIn(2)) return Conv(v, true);
      return Add(Op::kDequantize, {x.h, x.w, x.c, false}, {v}, 0, {}, {0.5f, static_cast<float>(draw_.Below(256))});
    }
    switch (draw_.Below(7)) {
      case 0: return Add(Op::kQuantize, {x.h, x.w, x.c, true}, {v}, 0, {}, {2.0f, static_cast<float>(draw_.Below(256))});
      case 1: {
        const int64_t op = draw_.Below(static_cast<int64_t>(Unary::kGelu) + 1);
        std::vector<float> numbers = {draw_.OneIn(2) ? 0.25f : 0.75f, 6.0f, -1.0f, 9.0f, 2.0f, 0.5f, -3.0f, 1.0f};
        numbers.resize(NumbersOf(static_cast<Unary>(op)));
        return Add(Op::kMap, x, {v}, 0, {op}, numbers);
      }
      case 2: return Add(Op::kChannelSum, x, {v}, 0, {draw_.Between(1, 9), draw_.Below(5)});
      case 3: {
        const int64_t op = draw_.Below(static_cast<int64_t>(Binary::kLeaky) + 1), swapped = draw_.Below(2);
        if (x.c == 1 && draw_.OneIn(2)) return Add(Op::kCombine, {x.h, x.w, draw_.Between(1, 40), false}, {v}, 1, {op, 2, swapped});
        const auto other = std::find(values_.begin() + draw_.Below(v + 1), values_.end(), x);
        if (draw_.OneIn(2)) return Add(Op::kCombine, x, {v, other - values_.begin()}, 0, {op, 0, swapped});
        const Size pixel = {1, 1, x.c, false}, channel = {x.h, x.w, 1, false};
        const auto number = std::find(values_.begin(), values_.end(), channel);
        if (number != values_.end() && draw_.OneIn(2)) return Add(Op::kCombine, x, {v, number - values_.begin()}, 0, {op, 5, swapped});
        const auto image = std::find(values_.begin(), values_.end(), pixel);
        if (image != values_.end()) return Add(Op::kCombine, x, {v, image - values_.begin()}, 0, {op, 3, swapped});
        return draw_.OneIn(3) ? Add(Op::kCombine, x, {v}, 0, {op, 1, swapped}, {2.0f})
                              : Add(Op::kCombine, x, {v}, 1, {op, draw_.OneIn(2) ? 2 : 4, swapped});
      }
      case 4: return Add(Op::kReduce, {x.h, x.w, 1, false}, {v}, 0, {draw_.Below(2)});
      default: return Conv(v, false);
    }
  }

  Draw& draw_;
  std::vector<Size> values_;
  std::vector<bool> reshaped_;
  int64_t operands_ = 0;
};

// What a program that was accepted would do for one image, about.
double Work(const std::vector<int64_t>& words) {
  size_t at = 6;
  const auto next = [&] { return static_cast<double>(words[at++]); };
  const auto list = [&] {
    std::vector<double> items(static_cast<size_t>(words[at++]));
    for (double& item : items) item = next();
    return items;
  };
  double work = 0;
  std::vector<double> channels;  // of each value
  for (int64_t i = 0; i < words[1]; ++i, ++at) {
    const double pixels = next() * next();
    channels.push_back(next());
    work += pixels * channels.back();
  }
  for (int64_t i = 0; i < words[2]; ++i) {
    const Op op = static_cast<Op>(words[at++]);
    const double h = next(), w = next(), c = next();
    const std::vector<double> args = list();
    list();
    const std::vector<double> p = list();
    channels.push_back(c);
    at += 2;
    const double first = next(), gaps = next() - first;
    double times = 1;  // for each element
    if (op == Op::kPool) times = p[1] * p[2];
    if (op == Op::kDepthwise) times = p[0] * p[1];
    if (op == Op::kDense) times = channels[static_cast<size_t>(args[0])] * p[0] * p[1] / p[8];
    if (op == Op::kChannelSum) times = p[0] + 1;
    work += h * w * c * times;
    if (op != Op::kConv && op != Op::kConvInt8) continue;
    const double blocks = p[2] / p[5] + 1, phases = std::min(p[6], p[0] * p[12]) * p[0] + std::min(p[7], p[1] * p[13]) * p[1];
    work += h * w * gaps + blocks * (p[3] + p[4]) + p[0] * p[1] * p[5] + 100 * phases;
  }
  return work;
}

void Change(Draw& draw, Code& code) {
  switch (draw.Below(6)) {
    case 0:
      if (!code.gaps.empty()) return Change(draw, code.gaps);
      break;
    case 1:
      if (!code.numbers.empty()) draw.Of(code.numbers) = draw.OneIn(3) ? NAN : static_cast<float>(draw.Other(0));
      break;
    case 2:  // a word from elsewhere
      draw.Of(code.words) = draw.Of(code.words);
      break;
    case 3: {  // a size or a number that still may fit
      int64_t& word = draw.Of(code.words);
      if (word < INT64_MAX) ++word;
      break;
    }
    default: Change(draw, code.words);
  }
}

// A buffer of exactly the size that its dimensions say.
struct Memory {
  Operand operand;
  std::vector<char> data;
  void Fill(Draw& draw) {
    int64_t bytes = operand.type == XLA_FFI_DataType_U8 ? 1 : operand.type == XLA_FFI_DataType_F16 ? 2 : 4;
    for (const int64_t dim : operand.dims) bytes *= dim;
    data = std::vector<char>(static_cast<size_t>(bytes));
    const bool nan = draw.OneIn(8);
    for (size_t i = 0; i + 4 <= data.size() && operand.type == XLA_FFI_DataType_F32; i += 4) {
      const float value = nan && draw.OneIn(9) ? NAN : static_cast<float>(draw.Between(-2, 2));
      std::copy_n(reinterpret_cast<const char*>(&value), 4, &data[i]);
    }
    if (operand.type != XLA_FFI_DataType_F32) {
      for (char& each : data) each = static_cast<char>(draw.Between(-127, 127));
    }
    operand.data = data.data();
  }
};

// Where the shared operands lie, as pairs of an array and the first element there, and the arrays: some alone, others beside each other.
struct Shared {
  std::vector<int64_t> parts;
  std::vector<Sized> arrays;
  Shared(Draw& draw, const std::vector<Sized>& operands) {
    const int64_t alone = draw.Between(1, 4);
    size_t together[2] = {SIZE_MAX, SIZE_MAX};  // arrays of each type that operands share
    for (const Sized& each : operands) {
      size_t& array = together[each.type == Type::kInt32];
      if (draw.OneIn(alone)) {
        parts.insert(parts.end(), {static_cast<int64_t>(arrays.size()), -1});
        arrays.push_back(each);
        continue;
      }
      if (array == SIZE_MAX) array = arrays.size(), arrays.push_back({0, each.type});
      const int64_t first = arrays[array].size + draw.Between(0, 3);
      parts.insert(parts.end(), {static_cast<int64_t>(array), first});
      arrays[array].size = first + each.size;
    }
  }
};

// "computed", or the message with which it was refused, without numbers.
std::string Case(uint64_t seed, uint64_t number, Pool& pool) {
  Draw draw(seed, number);
  Code code = draw.OneIn(4) ? Network(draw.Between(1, 3)) : Grown(draw).code;
  const int64_t changes = draw.Between(0, 3);
  int64_t inside = draw.Between(0, changes);  // the others are of the call
  for (int64_t i = 0; i < inside; ++i) Change(draw, code);
  std::string kernel = draw.OneIn(8) ? "portable" : draw.OneIn(50) ? "no such" : "", int8;
  std::string error;
  const auto program = Program::Make(code.words.data(), static_cast<int64_t>(code.words.size()), code.numbers.data(),
                                     static_cast<int64_t>(code.numbers.size()), code.gaps.data(), static_cast<int64_t>(code.gaps.size()),
                                     nullptr, nullptr, &error);
  XLA_FFI_ExecutionContext site = {&pool};
  Shared shared(draw, program == nullptr ? std::vector<Sized>() : program->shared);
  const bool moved = changes > 0 && !shared.parts.empty() && draw.OneIn(4);
  if (moved) Change(draw, shared.parts);
  std::string message = Instantiate(&site, ProgramInstantiate, {Of("gaps", code.gaps), Of("int8", int8), Of("kernel", kernel),
                                                                Of("numbers", code.numbers), Of("parts", shared.parts), Of("words", code.words)});
  if (message.empty() == (program == nullptr) && kernel != "no such" && !(moved && program != nullptr)) {
    Fail("decoded twice, differently: " + error + message);
  }
  if (!message.empty()) {
    if (changes == 0 && kernel != "no such") Fail(message);
    return Kind(message);
  }
  const int64_t n = draw.Between(1, 5);
  if (Work(code.words) * static_cast<double>(n) > kMostWork) return "too large to be run here";
  const auto type = [](Type t) { return t == Type::kFloat32 ? XLA_FFI_DataType_F32 : t == Type::kUint8 ? XLA_FFI_DataType_U8 : XLA_FFI_DataType_S32; };
  std::vector<Memory> memory;
  for (const Sized& each : program->inputs) memory.push_back({{{n, each.size}, nullptr, type(each.type)}, {}});
  for (const Sized& each : shared.arrays) memory.push_back({{{each.size}, nullptr, type(each.type)}, {}});
  size_t results = memory.size();
  for (const Sized& each : program->outputs) memory.push_back({{{n, each.size}, nullptr, type(each.type)}, {}});
  for (; inside < changes; ++inside) {
    Operand& operand = draw.Of(memory).operand;
    switch (draw.Below(4)) {
      case 0: operand.dims[0] = draw.Between(0, 6); break;
      case 1: operand.dims.insert(operand.dims.begin(), draw.Between(0, 2)); break;
      case 2: operand.type = draw.OneIn(2) ? XLA_FFI_DataType_U8 : XLA_FFI_DataType_F16; break;
      default:
        if (results > 0 && draw.OneIn(2)) memory.erase(memory.begin()), --results;
        else memory.push_back(memory.back());
    }
    if (memory.empty()) break;
  }
  std::vector<Operand> operands;
  for (Memory& each : memory) {
    each.Fill(draw);
    operands.push_back(each.operand);
  }
  const auto split = operands.begin() + static_cast<int64_t>(results);
  message = Execute(&site, ProgramExecute, {operands.begin(), split}, {split, operands.end()});
  if (changes == 0 && !message.empty()) Fail(message);
  return message.empty() ? changes == 0 ? "computed" : "changed and computed" : Kind(message);
}

}  // namespace

int main(int argc, char** argv) {
  Register(ProgramInstantiate);
  Pool pool(2);
  return Fuzz(argc, argv, [&](uint64_t seed, uint64_t number) { return Case(seed, number, pool); });
}
