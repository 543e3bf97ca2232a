// Decodes a program, and checks every step against what it reads: whatever is read or written later was checked here.
#include <algorithm>
#include <cmath>

#include "program.h"

namespace sparseflax {
namespace {

// Reads words in order; 0 and `ended` past the end.
struct Reader {
  const int64_t* at;
  const int64_t* end;
  bool ended = false;
  int64_t Next() {
    if (at == end) ended = true;
    return ended ? 0 : *at++;
  }
  std::vector<int64_t> List() {
    const int64_t count = Next();
    if (count < 0 || count > end - at) ended = true;
    std::vector<int64_t> list(ended ? 0 : static_cast<size_t>(count));
    for (int64_t& word : list) word = Next();
    return list;
  }
};

}  // namespace

std::string Program::Decode(const int64_t* words, int64_t count, const float* numbers, int64_t number_count, const uint8_t* gaps,
                            int64_t gap_count) {
  Reader in{words, words + count};
  const int64_t version = in.Next();
  if (version != kProgramVersion) return "a program of version " + std::to_string(version) + ", this build runs " + std::to_string(kProgramVersion);
  inputs_ = in.Next();
  const int64_t steps = in.Next(), results = in.Next(), operands = in.Next();
  chunk_ = in.Next();
  if (inputs_ < 1 || steps < 1 || results < 1 || operands < 0 || std::max({inputs_, steps, results, operands}) > count || chunk_ < 1) {
    return "malformed header";
  }
  shared.assign(static_cast<size_t>(operands), {-1, Type::kFloat32});
  const auto sized = [&](Value* value) {
    value->h = in.Next(), value->w = in.Next(), value->c = in.Next();
    return std::min({value->h, value->w, value->c}) >= 1 && value->h < kMost && value->w < kMost / value->h &&
           value->c < kMost / (value->h * value->w);
  };
  for (int64_t i = 0; i < inputs_; ++i) {
    values_.push_back({});
    if (!sized(&values_.back())) return "an input has no size, or too large a one";
    const int64_t bytes = in.Next();
    if (bytes != 0 && bytes != 1) return "malformed input";
    values_.back().type = bytes == 1 ? Type::kUint8 : Type::kFloat32;
    inputs.push_back({values_.back().size(), values_.back().type});
  }
  for (int64_t i = 0; i < steps; ++i) {
    const std::string where = "step " + std::to_string(i) + ": ";
    Step step{};
    const int64_t op = in.Next();
    if (op < 0 || op >= static_cast<int64_t>(Op::kEnd)) return where + "unknown";
    step.op = static_cast<Op>(op);
    Value y{};
    if (!sized(&y)) return where + "its result has no size, or too large a one";
    step.args = in.List();
    step.shared = in.List();
    step.params = in.List();
    const int64_t first = in.Next(), length = in.Next(), gap_begin = in.Next(), gap_end = in.Next();
    if (in.ended || first < 0 || length < 0 || length > number_count || first > number_count - length || gap_begin < 0 ||
        gap_end < gap_begin || gap_end > gap_count) {
      return where + "malformed";
    }
    step.numbers.assign(numbers + first, numbers + first + length);
    for (const int64_t arg : step.args) {
      if (arg < 0 || arg >= static_cast<int64_t>(values_.size())) return where + "reads a value that is not there yet";
    }
    for (const int64_t index : step.shared) {
      if (index < 0 || index >= operands) return where + "reads an operand that is not there";
    }
    if (step.op == Op::kConv || step.op == Op::kConvInt8) {
      const bool int8 = step.op == Op::kConvInt8;
      if (step.params.size() != (int8 ? 20 : 17)) return where + "malformed";
      const int64_t* p = step.params.data();
      Shape s{};
      s.kh = p[0], s.kw = p[1], s.icg = p[2], s.oc = p[3], s.groups = p[4], s.block = p[5];
      s.sh = p[6], s.sw = p[7], s.top = p[8], s.bottom = p[9], s.left = p[10], s.right = p[11], s.dh = p[12], s.dw = p[13];
      std::string error;
      step.conv = Conv::Make(s, gaps + gap_begin, gap_end - gap_begin, int8 ? int8_ : isa_, &error, int8 ? Element::kInt8 : Element::kFloat32);
      if (!error.empty()) return where + error;
    }
    const std::string error = CheckStep(step, &y);
    if (!error.empty()) return where + error;
    if (step.op == Op::kConv && step.params[15] == 0) unbiased_ = std::max(unbiased_, step.conv->shape().oc);
    steps_.push_back(std::move(step));
    values_.push_back(y);
  }
  for (int64_t i = 0; i < results; ++i) {
    const int64_t number = in.Next();
    if (number < inputs_ || number >= static_cast<int64_t>(values_.size()) || values_[static_cast<size_t>(number)].place == Place::kOutput ||
        steps_[static_cast<size_t>(number - inputs_)].op == Op::kReshape) {
      return "an output that no step of its own writes";
    }
    Value& value = values_[static_cast<size_t>(number)];
    value.place = Place::kOutput;
    value.offset = i;
    outputs.push_back({value.size(), value.type});
  }
  if (in.ended || in.at != in.end) return "its length does not fit";
  for (const Sized& each : shared) {
    if (each.size < 0) return "an operand that no step reads";
  }
  return "";
}

// What a step reads fits what it writes, of which it says the type, and its operands have one size.
std::string Program::CheckStep(const Step& step, Value* result) {
  const std::vector<int64_t>& p = step.params;
  std::vector<const Value*> x;
  for (const int64_t arg : step.args) x.push_back(&values_[static_cast<size_t>(arg)]);
  const bool moves = step.op == Op::kPool || step.op == Op::kWindow || step.op == Op::kConcat || step.op == Op::kReshape || step.op == Op::kUpsample ||
                     step.op == Op::kShuffle;
  const bool depthwise = step.op == Op::kDepthwise && p.size() == 12;
  const bool takes_bytes = step.op == Op::kConvInt8 || step.op == Op::kDequantize || (depthwise && p[10] == 1);
  for (const Value* each : x) {
    if (moves ? each->type != x[0]->type : (each->type == Type::kUint8) != takes_bytes) return "its images have the wrong type";
  }
  const bool bytes = moves ? !x.empty() && x[0]->type == Type::kUint8
                           : step.op == Op::kQuantize || (step.op == Op::kConvInt8 && p[17] == 0) || (depthwise && p[11] == 1);
  result->type = bytes ? Type::kUint8 : Type::kFloat32;
  const Value& y = *result;
  const auto counts = [&](size_t args, size_t operands, size_t params, size_t numbers) {
    return x.size() == args && step.shared.size() == operands && p.size() == params && step.numbers.size() == numbers;
  };
  const auto same = [](const Value& a, const Value& b) { return a.h == b.h && a.w == b.w && a.c == b.c; };
  const auto flag = [](int64_t v) { return v == 0 || v == 1; };
  const auto zero = [](float v) { return v >= 0 && v <= 255 && v == std::floor(v); };
  const auto stands = [&](size_t at) { return step.numbers[at] > 0 && zero(step.numbers[at + 1]); };  // scale and zero of bytes
  // (kh, kw, sh, sw, top, left, dh, dw) from `at` on
  const auto filter = [&](size_t at) {
    return std::min({p[at], p[at + 1], p[at + 2], p[at + 3], p[at + 6], p[at + 7]}) >= 1 && std::min(p[at + 4], p[at + 5]) >= 0 &&
           *std::max_element(p.begin() + static_cast<int64_t>(at), p.begin() + static_cast<int64_t>(at) + 8) < (1 << 20);
  };
  const auto operand = [&](size_t i, int64_t size, Type type = Type::kFloat32) {
    Sized& known = shared[static_cast<size_t>(step.shared[i])];
    const bool fits = known.size < 0 || (known.size == size && known.type == type);
    known = {size, type};
    return fits;
  };
  const std::string wrong = "its operands do not fit";
  switch (step.op) {
    case Op::kConv: {  // 6 of the layout, 8 of the window, activation, has bias, has residual
      if (p[14] < 0 || p[14] > 2 || !flag(p[15]) || !flag(p[16])) return "unknown epilogue";
      const Shape& s = step.conv->shape();
      if (!counts(1 + static_cast<size_t>(p[16]), 1 + static_cast<size_t>(p[15]), 17, 0) || x[0]->c != s.ic() || y.c != s.oc) return wrong;
      if (p[16] == 1 && !same(*x[1], y)) return wrong;
      const std::string error = step.conv->Fits(x[0]->h, x[0]->w, y.h, y.w);
      if (!error.empty()) return error;
      return operand(0, step.conv->nnz()) && (p[15] == 0 || operand(1, s.oc)) ? "" : wrong;
    }
    case Op::kConvInt8: {  // 6 of the layout, 8 of the window, zeros of x, y and the residual, to float, has residual, rounds; see Scales
      if (std::min({p[14], p[15], p[16]}) < 0 || std::max({p[14], p[15], p[16]}) > 255 || !flag(p[17]) || !flag(p[18]) || !flag(p[19]) || p[19] > p[18]) {
        return "unknown epilogue";
      }
      const Shape& s = step.conv->shape();
      const size_t residual = static_cast<size_t>(p[18]), inner = static_cast<size_t>(p[19]);
      if (!counts(1 + residual, 4, 20, 5 + 4 * inner) || x[0]->c != 4 * s.ic() || y.c != s.oc) return wrong;
      const float low = step.numbers[0], high = step.numbers[1];
      if (p[17] == 0 && !(static_cast<float>(-p[15]) <= low && low <= high && high <= static_cast<float>(255 - p[15]))) {
        return "its bounds do not fit uint8";
      }
      if (inner == 1 && !(-255 <= step.numbers[5] && step.numbers[5] <= step.numbers[6] && step.numbers[6] <= 255)) {
        return "its inner bounds do not fit uint8";
      }
      if (residual == 1 && !same(*x[1], y)) return wrong;
      const std::string error = step.conv->Fits(x[0]->h, x[0]->w, y.h, y.w);
      if (!error.empty()) return error;
      return operand(0, step.conv->nnz(), Type::kInt32) && operand(1, s.oc, Type::kInt32) && operand(2, s.oc) && operand(3, s.oc) ? "" : wrong;
    }
    case Op::kDepthwise: {  // filter, activation, has bias, reads bytes, writes bytes; scale and zero of either
      if (!depthwise || !filter(0) || p[8] < 0 || p[8] > 2 || !flag(p[9]) || !flag(p[10]) || !flag(p[11])) return "malformed";
      if (!counts(1, 1 + static_cast<size_t>(p[9]), 12, static_cast<size_t>(2 * (p[10] + p[11]))) || x[0]->c != y.c) return wrong;
      for (size_t i = 0; i < step.numbers.size(); i += 2) {
        if (!stands(i)) return "its bytes stand for nothing";
      }
      return operand(0, p[0] * p[1] * y.c) && (p[9] == 0 || operand(1, y.c)) ? "" : wrong;
    }
    case Op::kDense: {  // filter without padding, groups, activation, has bias
      if (p.size() != 11 || !filter(0) || p[4] != 0 || p[5] != 0 || p[8] < 1 || p[9] < 0 || p[9] > 2 || !flag(p[10])) return "malformed";
      if (!counts(1, 1 + static_cast<size_t>(p[10]), 11, 0) || x[0]->c % p[8] != 0 || y.c % p[8] != 0) return wrong;
      if ((y.h - 1) * p[2] + (p[0] - 1) * p[6] >= x[0]->h || (y.w - 1) * p[3] + (p[1] - 1) * p[7] >= x[0]->w) return "its windows reach beyond the image";
      return operand(0, p[0] * p[1] * (x[0]->c / p[8]) * y.c) && (p[10] == 0 || operand(1, y.c)) ? "" : wrong;
    }
    case Op::kPool:  // maximum, filter
      if (p.size() != 9 || !filter(1) || !flag(p[0]) || (bytes && p[0] == 0)) return "malformed";
      return counts(1, 0, 9, 0) && x[0]->c == y.c ? "" : wrong;
    case Op::kChannelSum:  // size, low
      if (p.size() != 2 || p[0] < 1 || p[0] > kMost || p[1] < 0 || p[1] > kMost) return "malformed";
      return counts(1, 0, 2, 0) && same(*x[0], y) ? "" : wrong;
    case Op::kReduce:  // maximum
      if (p.size() != 1 || !flag(p[0])) return "malformed";
      return counts(1, 0, 1, 0) && x[0]->h == y.h && x[0]->w == y.w && y.c == 1 ? "" : wrong;
    case Op::kCombine: {  // op, kind of the second operand, swapped
      if (p.size() != 3 || p[0] < 0 || p[0] > static_cast<int64_t>(Binary::kLeaky) || !flag(p[2])) return "malformed";
      const Other kind = static_cast<Other>(p[1]);
      const bool single = kind == Other::kChannel && !x.empty() && x[0]->c == 1 && x[0]->h == y.h && x[0]->w == y.w;
      if (x.empty() || !(same(*x[0], y) || single)) return wrong;
      switch (kind) {
        case Other::kSame: return counts(2, 0, 3, 0) && same(*x[1], y) ? "" : wrong;
        case Other::kNumber: return counts(1, 0, 3, 1) ? "" : wrong;
        case Other::kChannel: return counts(1, 1, 3, 0) && operand(0, y.c) ? "" : wrong;
        case Other::kScalar: return counts(1, 1, 3, 0) && operand(0, 1) ? "" : wrong;
        case Other::kPixel: return counts(2, 0, 3, 0) && x[1]->h == y.h && x[1]->w == y.w && x[1]->c == 1 ? "" : wrong;
        case Other::kImage: return counts(2, 0, 3, 0) && x[1]->h == 1 && x[1]->w == 1 && x[1]->c == y.c ? "" : wrong;
      }
      return "malformed";
    }
    case Op::kMap:  // op
      if (p.size() != 1 || p[0] < 0 || p[0] > static_cast<int64_t>(Unary::kGelu)) return "malformed";
      return counts(1, 0, 1, NumbersOf(static_cast<Unary>(p[0]))) && same(*x[0], y) ? "" : wrong;
    case Op::kWindow:  // y[i,j,c] = x[i + p0, j + p1, c + p2], or a number outside
      if (p.size() != 3 || std::min({p[0], p[1], p[2]}) < -kMost || std::max({p[0], p[1], p[2]}) > kMost) return "malformed";
      return counts(1, 0, 3, 1) && (!bytes || zero(step.numbers[0])) ? "" : wrong;
    case Op::kConcat: {
      int64_t channels = 0;
      for (const Value* each : x) {
        if (each->h != y.h || each->w != y.w) return wrong;
        channels += each->c;
      }
      return counts(x.size(), 0, 0, 0) && channels == y.c ? "" : wrong;
    }
    case Op::kReshape: return counts(1, 0, 0, 0) && x[0]->size() == y.size() ? "" : wrong;
    case Op::kUpsample: {  // fh, fw
      if (p.size() != 2 || std::min(p[0], p[1]) < 1 || std::max(p[0], p[1]) > y.h * y.w) return "malformed";
      const bool sizes = counts(1, 0, 2, 0) && x[0]->h * p[0] == y.h && x[0]->w * p[1] == y.w;
      return sizes && (x[0]->c == y.c || x[0]->c == p[0] * p[1] * y.c) ? "" : wrong;
    }
    case Op::kShuffle:  // groups
      if (p.size() != 1 || p[0] < 1 || y.c % p[0] != 0) return "malformed";
      return counts(1, 0, 1, 0) && same(*x[0], y) ? "" : wrong;
    case Op::kQuantize:  // scale, zero
    case Op::kDequantize:  // scale, zero
      return counts(1, 0, 0, 2) && same(*x[0], y) && stands(0) ? "" : wrong;
    case Op::kEnd: break;
  }
  return "unknown";
}

}  // namespace sparseflax
