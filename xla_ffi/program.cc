// Decodes, checks, lays out and runs a program.
#include "program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <set>

namespace sparseflax {
namespace {

constexpr int64_t kVersion = 2, kMost = int64_t{1} << 31, kMostBytes = int64_t{1} << 46;
constexpr int64_t kHeavy = 256 << 10;  // bytes of weights and offsets from which a layer of single pixels runs together
constexpr int64_t kStrip = 1024;       // floats of a value between steps that run together: some of these fit a first cache
constexpr int64_t kAlone = 1 << 15;    // floats of a step below which a second thread costs more than it brings

int64_t Align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

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

struct Alone final : Executor {
  int64_t threads() const override { return 1; }
  void For(int64_t n, const std::function<void(int64_t)>& f) override {
    for (int64_t i = 0; i < n; ++i) f(i);
  }
};

// f(first, end) over so many rows of a step that touches so many floats.
template <typename F>
void ForRows(Executor& executor, int64_t rows, int64_t floats, const F& f) {
  const int64_t parts = floats < kAlone ? 1 : std::min(rows, executor.threads());
  if (parts <= 1) return f(int64_t{0}, rows);
  executor.For(parts, [&](int64_t i) { f(rows * i / parts, rows * (i + 1) / parts); });
}

// Copies what lies inside; `fill` where y reaches beyond x.
template <typename T>
void CopyWindow(const ImageOf<T>& x, const ImageOf<T>& y, const std::vector<int64_t>& shift, T fill, int64_t row, int64_t end) {
  const int64_t first = std::clamp(-shift[2], int64_t{0}, y.c), last = std::clamp(x.c - shift[2], first, y.c);
  for (; row < end; ++row) {
    const int64_t image = row / y.h, i = row % y.h + shift[0];
    for (int64_t j = 0; j < y.w; ++j) {
      T* to = y.Row(row) + j * y.pixel;
      const int64_t from = j + shift[1];
      if (i < 0 || i >= x.h || from < 0 || from >= x.w) {
        std::fill(to, to + y.c, fill);
        continue;
      }
      const T* pixel = x.Row(image * x.h + i) + from * x.pixel;
      std::fill(to, to + first, fill);
      for (int64_t c = first; c < last; ++c) to[c] = pixel[c + shift[2]];
      std::fill(to + last, to + y.c, fill);
    }
  }
}

// A value, all of it, whatever its type; or a slot for a strip of it.
struct Whole {
  Image image;
  bool slot;
  // As an image of its own: `count` pixels of a row, from one on.
  template <typename T>
  ImageOf<T> Strip(int64_t row, int64_t pixel, int64_t count) const {
    const int64_t shift = slot ? 0 : (row * image.w + pixel) * image.pixel;
    return {reinterpret_cast<T*>(image.data) + shift, 1, count, image.c, image.pixel};
  }
};

// All programs that are there, and whether they are traced.
std::mutex all_mutex;
std::set<Program*>* const all = new std::set<Program*>;  // never destroyed: a program may outlive it
std::atomic<bool> tracing{false};

}  // namespace

Program::Program() {
  std::lock_guard<std::mutex> lock(all_mutex);
  all->insert(this);
}

Program::~Program() {
  std::lock_guard<std::mutex> lock(all_mutex);
  all->erase(this);
}

std::vector<Program::Traced> Program::Trace(bool on) {
  std::lock_guard<std::mutex> lock(all_mutex);
  tracing = on;
  std::vector<Traced> traced;
  for (Program* each : *all) {
    if (!on) traced.push_back({each->words_, {each->nanoseconds_.begin(), each->nanoseconds_.end()}});
    for (std::atomic<int64_t>& count : each->nanoseconds_) count = 0;
  }
  return traced;
}

struct Program::Call {
  int64_t n, begin, count;  // images of the batch and of this unit
  const std::vector<const void*>& inputs;
  const std::vector<const void*>& shared;
  const std::vector<void*>& outputs;
  char* whole;
  char* unit;
  Executor& executor;
};

std::unique_ptr<Program> Program::Make(const int64_t* words, int64_t count, const float* numbers, int64_t number_count,
                                       const uint8_t* gaps, int64_t gap_count, const Isa* isa, const Isa* int8, std::string* error) {
  std::unique_ptr<Program> program(new Program);
  program->isa_ = isa;
  program->int8_ = int8;
  program->words_.assign(words, words + count);
  *error = program->Decode(words, count, numbers, number_count, gaps, gap_count);
  if (!error->empty()) return nullptr;
  program->Join();
  program->Cut();
  program->Lay();
  {
    std::lock_guard<std::mutex> lock(all_mutex);
    program->nanoseconds_ = std::vector<std::atomic<int64_t>>(program->steps_.size());
  }
  return program;
}

std::string Program::Decode(const int64_t* words, int64_t count, const float* numbers, int64_t number_count, const uint8_t* gaps,
                            int64_t gap_count) {
  Reader in{words, words + count};
  const int64_t version = in.Next();
  if (version != kVersion) return "a program of version " + std::to_string(version) + ", this build runs " + std::to_string(kVersion);
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
      if (step.params.size() != (int8 ? 19 : 17)) return where + "malformed";
      const int64_t* p = step.params.data();
      Shape s{};
      s.kh = p[0], s.kw = p[1], s.icg = p[2], s.oc = p[3], s.groups = p[4], s.block = p[5];
      s.sh = p[6], s.sw = p[7], s.top = p[8], s.bottom = p[9], s.left = p[10], s.right = p[11], s.dh = p[12], s.dw = p[13];
      std::string error;
      step.conv = Conv::Make(s, gaps + gap_begin, gap_end - gap_begin, int8 ? int8_ : isa_, &error, int8 ? Element::kInt8 : Element::kFloat32);
      if (!error.empty()) return where + error;
      zeros_.resize(std::max(zeros_.size(), static_cast<size_t>(s.oc)));
    }
    const std::string error = CheckStep(step, &y);
    if (!error.empty()) return where + error;
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
  const bool moves = step.op == Op::kPool || step.op == Op::kWindow || step.op == Op::kConcat || step.op == Op::kReshape;
  const bool takes_bytes = step.op == Op::kConvInt8 || step.op == Op::kDequantize;
  for (const Value* each : x) {
    if (moves ? each->type != x[0]->type : (each->type == Type::kUint8) != takes_bytes) return "its images have the wrong type";
  }
  const bool bytes = moves ? !x.empty() && x[0]->type == Type::kUint8
                           : step.op == Op::kQuantize || (step.op == Op::kConvInt8 && p[17] == 0);
  result->type = bytes ? Type::kUint8 : Type::kFloat32;
  const Value& y = *result;
  const auto counts = [&](size_t args, size_t operands, size_t params, size_t numbers) {
    return x.size() == args && step.shared.size() == operands && p.size() == params && step.numbers.size() == numbers;
  };
  const auto same = [](const Value& a, const Value& b) { return a.h == b.h && a.w == b.w && a.c == b.c; };
  const auto flag = [](int64_t v) { return v == 0 || v == 1; };
  const auto zero = [](float v) { return v >= 0 && v <= 255 && v == std::floor(v); };
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
    case Op::kConvInt8: {  // 6 of the layout, 8 of the window, zeros of x, y and the residual, to float, has residual; bounds
      if (std::min({p[14], p[15], p[16]}) < 0 || std::max({p[14], p[15], p[16]}) > 255 || !flag(p[17]) || !flag(p[18])) return "unknown epilogue";
      const Shape& s = step.conv->shape();
      const size_t residual = static_cast<size_t>(p[18]);
      if (!counts(1 + residual, 4 + residual, 19, 2) || x[0]->c != 4 * s.ic() || y.c != s.oc) return wrong;
      const float low = step.numbers[0], high = step.numbers[1];
      if (p[17] == 0 && !(static_cast<float>(-p[15]) <= low && low <= high && high <= static_cast<float>(255 - p[15]))) {
        return "its bounds do not fit uint8";
      }
      if (residual == 1 && !same(*x[1], y)) return wrong;
      const std::string error = step.conv->Fits(x[0]->h, x[0]->w, y.h, y.w);
      if (!error.empty()) return error;
      return operand(0, step.conv->nnz(), Type::kInt32) && operand(1, s.oc, Type::kInt32) && operand(2, s.oc) && operand(3, s.oc) &&
                     (residual == 0 || operand(4, s.oc)) ? "" : wrong;
    }
    case Op::kDepthwise:  // filter, activation, has bias
      if (p.size() != 10 || !filter(0) || p[8] < 0 || p[8] > 2 || !flag(p[9])) return "malformed";
      if (!counts(1, 1 + static_cast<size_t>(p[9]), 10, 0) || x[0]->c != y.c) return wrong;
      return operand(0, p[0] * p[1] * y.c) && (p[9] == 0 || operand(1, y.c)) ? "" : wrong;
    case Op::kPool:  // maximum, filter
      if (p.size() != 9 || !filter(1) || !flag(p[0]) || (bytes && p[0] == 0)) return "malformed";
      return counts(1, 0, 9, 0) && x[0]->c == y.c ? "" : wrong;
    case Op::kChannelSum:  // size, low
      if (p.size() != 2 || p[0] < 1 || p[0] > kMost || p[1] < 0 || p[1] > kMost) return "malformed";
      return counts(1, 0, 2, 0) && same(*x[0], y) ? "" : wrong;
    case Op::kCombine: {  // op, kind of the second operand, swapped
      if (p.size() != 3 || p[0] < 0 || p[0] > static_cast<int64_t>(Binary::kMin) || !flag(p[2])) return "malformed";
      const Other kind = static_cast<Other>(p[1]);
      if (x.empty() || !same(*x[0], y)) return wrong;
      switch (kind) {
        case Other::kSame: return counts(2, 0, 3, 0) && same(*x[1], y) ? "" : wrong;
        case Other::kNumber: return counts(1, 0, 3, 1) ? "" : wrong;
        case Other::kChannel: return counts(1, 1, 3, 0) && operand(0, y.c) ? "" : wrong;
        case Other::kImage: return counts(2, 0, 3, 0) && x[1]->h == 1 && x[1]->w == 1 && x[1]->c == y.c ? "" : wrong;
      }
      return "malformed";
    }
    case Op::kMap:  // op
      if (p.size() != 1 || p[0] < 0 || p[0] > static_cast<int64_t>(Unary::kPower)) return "malformed";
      return counts(1, 0, 1, 2) && same(*x[0], y) ? "" : wrong;
    case Op::kWindow:  // y[i,j,c] = x[i + p0, j + p1, c + p2], or a number outside
      if (p.size() != 3 || std::max({std::abs(p[0]), std::abs(p[1]), std::abs(p[2])}) > kMost) return "malformed";
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
    case Op::kQuantize:  // 1 / scale, zero
    case Op::kDequantize:  // scale, zero
      return counts(1, 0, 0, 2) && same(*x[0], y) && step.numbers[0] > 0 && zero(step.numbers[1]) ? "" : wrong;
    case Op::kEnd: break;
  }
  return "unknown";
}

// Gives values a place inside of others: what is concatenated is written where it will lie, a range of channels stays where it is, and
// a reshape is its argument.
void Program::Join() {
  std::vector<bool> pinned(values_.size());  // pixels have to lie side by side
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    const size_t y = i + static_cast<size_t>(inputs_);
    if (step.op == Op::kReshape) {
      values_[y].parent = step.args[0];
      pinned[static_cast<size_t>(step.args[0])] = pinned[y] = true;
    }
    if (step.conv != nullptr && step.args.size() == 2) pinned[static_cast<size_t>(step.args[1])] = pinned[y] = true;  // one table for both
  }
  // A convolution in eight bits reads words of four channels.
  const auto whole = [](const Value& part, const Value& all, int64_t channel) {
    return all.type != Type::kUint8 || (part.c % 4 == 0 && all.c % 4 == 0 && channel % 4 == 0);
  };
  for (size_t i = 0; i < steps_.size(); ++i) {
    if (steps_[i].op == Op::kWindow) {
      const Value& x = values_[static_cast<size_t>(steps_[i].args[0])];
      Value& y = values_[i + static_cast<size_t>(inputs_)];
      const std::vector<int64_t>& p = steps_[i].params;
      if (p[0] == 0 && p[1] == 0 && x.h == y.h && x.w == y.w && p[2] >= 0 && p[2] + y.c <= x.c && y.place != Place::kOutput &&
          !pinned[i + static_cast<size_t>(inputs_)] && whole(y, x, p[2])) {
        y.parent = steps_[i].args[0];
        y.channel = p[2];
      }
    }
    if (steps_[i].op != Op::kConcat) continue;
    int64_t channel = 0;
    for (const int64_t arg : steps_[i].args) {
      Value& x = values_[static_cast<size_t>(arg)];
      if (arg >= inputs_ && x.place != Place::kOutput && x.parent < 0 && !pinned[static_cast<size_t>(arg)] &&
          whole(x, values_[i + static_cast<size_t>(inputs_)], channel)) {
        x.parent = static_cast<int64_t>(i) + inputs_;
        x.channel = channel;
      }
      channel += x.c;
    }
  }
}

int64_t Program::Root(int64_t value) const {
  while (values_[static_cast<size_t>(value)].parent >= 0) value = values_[static_cast<size_t>(value)].parent;
  return value;
}

// Whether a step's result lies where its argument does, so that nothing is to be done.
bool Program::Stays(size_t step) const {
  const Op op = steps_[step].op;
  return op == Op::kReshape || (op == Op::kWindow && values_[step + static_cast<size_t>(inputs_)].parent == steps_[step].args[0]);
}

// Whether each pixel of its result is made of the same pixels of others.
bool Program::Pixelwise(size_t step) const {
  const Op op = steps_[step].op;
  return op == Op::kCombine || op == Op::kMap || op == Op::kChannelSum || op == Op::kQuantize || op == Op::kDequantize;
}

// Segments of steps that run in units, and of those that run together; within them, steps that run pixel by pixel: what lies between
// these alone has a slot for a strip of pixels, which stays in the first cache, and no other place.
void Program::Cut() {
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    bool together = false;
    if (step.conv != nullptr) {
      const Value &x = values_[static_cast<size_t>(step.args[0])], &y = values_[i + static_cast<size_t>(inputs_)];
      together = x.h * x.w == 1 && y.h * y.w == 1 && step.conv->nnz() * 6 > kHeavy;
    }
    if (segments_.empty() || segments_.back().together != together) segments_.push_back({i, i, together});
    segments_.back().end = i + 1;
    steps_[i].segment = segments_.size() - 1;
  }
  for (size_t i = 0; i < steps_.size();) {
    const Value& like = values_[i + static_cast<size_t>(inputs_)];
    size_t end = i + 1;
    const auto joins = [&](size_t j) {
      const Value& y = values_[j + static_cast<size_t>(inputs_)];
      if (steps_[j].segment != steps_[i].segment || steps_[j].op == Op::kReshape) return false;  // whose rows are others
      return Stays(j) || (Pixelwise(j) && y.h == like.h && y.w == like.w);
    };
    while (Pixelwise(i) && end < steps_.size() && joins(end)) ++end;
    for (size_t j = i; j < end; ++j) steps_[j].begin = i, steps_[j].end = end;
    i = end;
  }
  std::vector<bool> elsewhere(values_.size());  // read by a step that does not run with its own, or a part or holder of others
  for (size_t i = 0; i < steps_.size(); ++i) {
    for (const int64_t arg : steps_[i].args) {
      if (arg < inputs_ || steps_[static_cast<size_t>(arg - inputs_)].begin != steps_[i].begin || !Pixelwise(i)) elsewhere[static_cast<size_t>(arg)] = true;
    }
  }
  for (const Value& value : values_) {
    if (value.parent >= 0) elsewhere[static_cast<size_t>(value.parent)] = true;
  }
  for (size_t i = 0; i < steps_.size(); ++i) {
    Value& value = values_[i + static_cast<size_t>(inputs_)];
    if (Pixelwise(i) && value.parent < 0 && value.place != Place::kOutput && !elsewhere[i + static_cast<size_t>(inputs_)]) {
      value.place = Place::kSlot;
      value.offset = steps_[steps_[i].begin].slots++;
    }
  }
}

// Which memory each value lies in, and where: as low as nothing lies that is needed at the same time.
void Program::Lay() {
  const int64_t inputs = inputs_, steps = static_cast<int64_t>(steps_.size());
  for (int64_t v = 0; v < inputs; ++v) {
    values_[static_cast<size_t>(v)].place = Place::kInput;
    values_[static_cast<size_t>(v)].offset = v;
  }
  for (Value& value : values_) value.first = steps;
  for (int64_t i = 0; i < steps; ++i) {
    const Step& step = steps_[static_cast<size_t>(i)];
    const auto use = [&](int64_t v) {  // by all steps that run row by row with this one
      Value& root = values_[static_cast<size_t>(Root(v))];
      root.first = std::min(root.first, static_cast<int64_t>(step.begin));
      root.last = std::max(root.last, static_cast<int64_t>(step.end) - 1);
    };
    use(i + inputs);
    for (const int64_t arg : step.args) use(arg);
  }
  struct Taken {
    int64_t begin, end, last;
  };
  std::vector<Taken> taken[2];  // whole, unit
  for (int64_t i = 0; i < steps; ++i) {
    for (size_t v = static_cast<size_t>(inputs); v < values_.size(); ++v) {
      Value& value = values_[v];
      if (value.parent >= 0 || value.place == Place::kOutput || value.place == Place::kSlot || value.first != i) continue;
      const Segment& segment = segments_[steps_[static_cast<size_t>(i)].segment];
      const bool whole = segment.together || value.last >= static_cast<int64_t>(segment.end);
      value.place = whole ? Place::kWhole : Place::kUnit;
      std::vector<Taken>& here = taken[whole ? 0 : 1];
      here.erase(std::remove_if(here.begin(), here.end(), [i](const Taken& t) { return t.last < i; }), here.end());
      const int64_t bytes = Align(value.size() * value.bytes());
      value.offset = 0;
      size_t at = 0;
      for (; at < here.size() && here[at].begin < value.offset + bytes; ++at) value.offset = std::max(value.offset, here[at].end);
      here.insert(here.begin() + static_cast<int64_t>(at), {value.offset, value.offset + bytes, value.last});
      int64_t& all = whole ? whole_bytes_ : unit_bytes_;
      all = std::max(all, value.offset + bytes);
    }
  }
}

template <typename T>
ImageOf<T> Program::At(const Call& call, int64_t v) const {
  const Value& value = values_[static_cast<size_t>(v)];
  int64_t channel = 0, root = v, pixel = value.c;
  while (values_[static_cast<size_t>(root)].parent >= 0) {
    const Value& each = values_[static_cast<size_t>(root)];
    const bool part = steps_[static_cast<size_t>(root - inputs_)].op != Op::kReshape;  // a range of channels
    channel += each.channel;
    root = each.parent;
    if (part) pixel = values_[static_cast<size_t>(root)].c;
  }
  const Value& from = values_[static_cast<size_t>(root)];
  const int64_t before = call.begin * from.size() * from.bytes();  // bytes of the images before
  char* data = nullptr;
  switch (from.place) {
    case Place::kInput: data = static_cast<char*>(const_cast<void*>(call.inputs[static_cast<size_t>(from.offset)])) + before; break;  // only read
    case Place::kOutput: data = static_cast<char*>(call.outputs[static_cast<size_t>(from.offset)]) + before; break;
    case Place::kWhole: data = call.whole + from.offset * call.n + before; break;
    case Place::kUnit: data = call.unit + from.offset * call.count; break;
    case Place::kSlot: break;  // see RunPixelwise
  }
  return {reinterpret_cast<T*>(data + channel * from.bytes()), value.h, value.w, value.c, pixel};
}

// Rows [row, end) of all steps that run with the first, strip by strip.
void Program::RunPixelwise(size_t first, const Call& call, const Steps& loops, int64_t row, int64_t end) const {
  const Step& group = steps_[first];
  int64_t most = 1;
  for (size_t i = first; i < group.end; ++i) most = std::max(most, values_[i + static_cast<size_t>(inputs_)].c);
  const int64_t width = std::max<int64_t>(1, kStrip / most);
  thread_local Arena arena;
  float* const scratch = reinterpret_cast<float*>(arena.Get(static_cast<size_t>(std::max<int64_t>(1, group.slots) * width * most * 4)));
  const auto operand = [&](int64_t v) {
    const Value& value = values_[static_cast<size_t>(v)];
    if (value.place != Place::kSlot) return Whole{At<float>(call, v), false};
    return Whole{{scratch + value.offset * width * most, value.h, value.w, value.c, value.c}, true};
  };
  struct Work {
    const Step& step;
    Whole y, x, b;
  };
  std::vector<Work> works;
  for (size_t i = first; i < group.end; ++i) {
    const Step& step = steps_[i];
    if (Pixelwise(i)) works.push_back({step, operand(static_cast<int64_t>(i) + inputs_), operand(step.args[0]), operand(step.args.back())});
  }
  const int64_t h = works[0].y.image.h, w = works[0].y.image.w;
  for (; row < end; ++row) {
    for (int64_t j = 0; j < w; j += width) {
      const int64_t count = std::min(width, w - j);
      for (const Work& work : works) {
        const Step& step = work.step;
        const std::vector<int64_t>& p = step.params;
        const auto number = [&](size_t i) { return step.numbers.empty() ? 0.0f : step.numbers[i]; };
        const Image x = work.x.Strip<float>(row, j, count), y = work.y.Strip<float>(row, j, count);
        switch (step.op) {
          case Op::kQuantize:
            loops.quantize({x, work.y.Strip<uint8_t>(row, j, count), number(0), static_cast<int32_t>(number(1))}, 0, 1);
            break;
          case Op::kDequantize:
            loops.dequantize({work.x.Strip<uint8_t>(row, j, count), y, number(0), static_cast<int32_t>(number(1))}, 0, 1);
            break;
          case Op::kMap: loops.map({x, y, static_cast<Unary>(p[0]), number(0), number(1)}, 0, 1); break;
          case Op::kChannelSum: loops.channel_sum({x, y, p[0], p[1]}, 0, 1); break;
          default: {
            const Other kind = static_cast<Other>(p[1]);
            Image b = work.b.Strip<float>(row, j, count);
            if (kind == Other::kImage && !work.b.slot) b.data = work.b.image.data + row / h * work.b.image.pixel;
            const float* const channel = kind == Other::kChannel ? static_cast<const float*>(call.shared[static_cast<size_t>(step.shared[0])]) : nullptr;
            loops.combine({x, y, static_cast<Binary>(p[0]), kind, p[2] != 0, b, channel, number(0)}, 0, 1);
          }
        }
      }
    }
  }
}

std::string Program::RunSteps(const Segment& segment, const Call& call) const {
  const Steps& loops = *(isa_ != nullptr ? isa_ : Isas()[0])->steps;
  const bool traced = tracing.load(std::memory_order_relaxed);
  for (size_t i = segment.begin; i < segment.end; ++i) {
    const Step& step = steps_[i];
    const auto start = traced ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point();
    const std::vector<int64_t>& p = step.params;
    const int64_t result = static_cast<int64_t>(i) + inputs_;
    const bool bytes = values_[static_cast<size_t>(result)].type == Type::kUint8;
    const Image x = At<float>(call, step.args[0]), y = At<float>(call, result);  // sizes, where they are bytes
    const auto operand = [&](size_t index) { return static_cast<const float*>(call.shared[static_cast<size_t>(step.shared[index])]); };
    const int64_t rows = call.count * y.h;
    const auto spread = [&](int64_t floats, const auto& f) { ForRows(call.executor, rows, call.count * floats, f); };
    switch (step.op) {
      case Op::kConv: {
        Buffers b{x.data, operand(0), p[15] != 0 ? operand(1) : zeros_.data(), nullptr, y.data, nullptr, x.pixel, y.pixel};
        if (p[16] != 0) b.residual = At<float>(call, step.args[1]).data;
        const std::string error = step.conv->Run(call.count, x.h, x.w, y.h, y.w, b, static_cast<int>(p[14]), call.executor);
        if (!error.empty()) return "step " + std::to_string(i) + ": " + error;
        break;
      }
      case Op::kConvInt8: {
        const auto zero = [&](size_t at) { return static_cast<int32_t>(p[at]); };
        const Rescale rescale{operand(2), operand(3), p[18] != 0 ? operand(4) : nullptr, step.numbers[0], step.numbers[1],
                              zero(14), zero(15), zero(16), p[17] != 0};
        Buffers b{x.data, operand(0), operand(1), nullptr, y.data, &rescale, x.pixel / 4, y.pixel};
        if (p[18] != 0) b.residual = At<uint8_t>(call, step.args[1]).data;
        const std::string error = step.conv->Run(call.count, x.h, x.w, y.h, y.w, b, 0, call.executor);
        if (!error.empty()) return "step " + std::to_string(i) + ": " + error;
        break;
      }
      case Op::kDepthwise: {
        const Depthwise d{x, y, {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}, operand(0), p[9] != 0 ? operand(1) : nullptr,
                          static_cast<int>(p[8])};
        spread(y.h * y.w * y.c * p[0] * p[1], [&](int64_t row, int64_t end) { loops.depthwise(d, row, end); });
        break;
      }
      case Op::kPool: {
        const Filter f{p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8]};
        spread(y.h * y.w * y.c * p[1] * p[2], [&](int64_t row, int64_t end) {
          if (bytes) return loops.pool_bytes({At<uint8_t>(call, step.args[0]), At<uint8_t>(call, result), f, true}, row, end);
          loops.pool({x, y, f, p[0] != 0}, row, end);
        });
        break;
      }
      case Op::kChannelSum:
      case Op::kCombine:
      case Op::kMap:
      case Op::kQuantize:
      case Op::kDequantize:
        spread(y.h * y.w * y.c * static_cast<int64_t>(step.end - i), [&](int64_t row, int64_t end) { RunPixelwise(i, call, loops, row, end); });
        i = step.end - 1;
        break;
      case Op::kWindow:
        if (Stays(i)) break;
        spread(y.h * y.w * y.c, [&](int64_t row, int64_t end) {
          if (!bytes) return CopyWindow(x, y, p, step.numbers[0], row, end);
          CopyWindow(At<uint8_t>(call, step.args[0]), At<uint8_t>(call, result), p, static_cast<uint8_t>(step.numbers[0]), row, end);
        });
        break;
      case Op::kConcat: {
        int64_t channel = 0;
        for (const int64_t arg : step.args) {
          const Value& value = values_[static_cast<size_t>(arg)];
          if (value.parent != static_cast<int64_t>(i) + inputs_ || value.channel != channel) {
            const auto copy = [&](auto from, auto to) {
              to.data += channel;
              to.c = value.c;
              spread(y.h * y.w * value.c, [&](int64_t row, int64_t end) { CopyWindow(from, to, {0, 0, 0}, {}, row, end); });
            };
            bytes ? copy(At<uint8_t>(call, arg), At<uint8_t>(call, result)) : copy(At<float>(call, arg), y);
          }
          channel += value.c;
        }
        break;
      }
      case Op::kReshape:
      case Op::kEnd: break;
    }
    if (traced) nanoseconds_[step.begin] += std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
  }
  return "";
}

std::string Program::Run(int64_t n, const std::vector<const void*>& images, const std::vector<const void*>& operands,
                         const std::vector<void*>& results, Executor& executor) {
  if (n < 1) return "";
  const int64_t threads = executor.threads();
  int64_t units = 1;
  if (n >= threads) {
    units = (n + chunk_ - 1) / chunk_;
    units = std::min(n, (units + threads - 1) / threads * threads);  // the same for every thread
  }
  const int64_t most = (n + units - 1) / units, slots = std::min(units, threads);
  if (n > kMost || whole_bytes_ > kMostBytes / n || unit_bytes_ > kMostBytes / (most * slots)) return "it needs more than 2^46 bytes";
  std::unique_ptr<Arena> arena;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!arenas_.empty()) {
      arena = std::move(arenas_.back());
      arenas_.pop_back();
    }
  }
  if (arena == nullptr) arena = std::make_unique<Arena>();
  const int64_t unit_size = Align(unit_bytes_ * most);
  char* const whole = arena->Get(static_cast<size_t>(std::max<int64_t>(64, whole_bytes_ * n + unit_size * slots)));
  char* const unit = whole + whole_bytes_ * n;

  std::string error;
  std::mutex mutex;  // of the error and of the free slots
  std::vector<int64_t> idle;
  for (int64_t slot = 0; slot < slots; ++slot) idle.push_back(slot);
  for (const Segment& segment : segments_) {
    if (segment.together || units == 1) {
      error = RunSteps(segment, {n, 0, n, images, operands, results, whole, unit, executor});
    } else {
      const auto run = [&](int64_t i) {
        Alone alone;
        int64_t slot;
        {
          std::lock_guard<std::mutex> lock(mutex);
          slot = idle.back();
          idle.pop_back();
        }
        const int64_t begin = n * i / units, count = n * (i + 1) / units - begin;
        std::string wrong;
        try {
          wrong = RunSteps(segment, {n, begin, count, images, operands, results, whole, unit + slot * unit_size, alone});
        } catch (const std::exception& thrown) {
          wrong = thrown.what();
        }
        std::lock_guard<std::mutex> lock(mutex);
        idle.push_back(slot);
        if (!wrong.empty()) error = wrong;
      };
      if (threads == 1) {
        for (int64_t i = 0; i < units; ++i) run(i);
      } else {
        executor.For(units, run);
      }
    }
    if (!error.empty()) break;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  arenas_.push_back(std::move(arena));
  return error;
}

}  // namespace sparseflax
