// The handler called with what nobody should call it with, as a hostile program could: convolutions of random shapes, of which
// some attributes, sizes, types and operands are changed. Each has to be refused with a message or computed; one that nothing was
// changed of has to be right. Memory is told by the sanitizers, which see every buffer at its exact size.
//
//   handler_fuzz SEED FIRST SECONDS CASES
#include <cmath>
#include <string>
#include <vector>

#include "draw.h"
#include "runtime.h"

namespace {

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
    message = Execute(&site, sparseflax::ConvExecute, operands, {memory[0].operand});
    if (message.empty() && changes > 0) return "computed";
  }
  if (changes == 0) {
    if (!message.empty()) Fail(Describe(s) + ": " + message);
    for (size_t i = 0; i < p.y.size(); ++i) {
      if (!(std::abs(static_cast<double>(memory[0].data[i]) - p.y[i]) <= p.bound[i])) Fail(Describe(s) + ": y[" + std::to_string(i) + "] is wrong");
    }
    return "right";
  }
  return Kind(message);
}

}  // namespace

int main(int argc, char** argv) {
  Register();
  Pool pool(2);
  return Fuzz(argc, argv, [&](uint64_t seed, uint64_t number) { return Case(seed, number, pool); });
}
