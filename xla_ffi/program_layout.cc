// Says which steps of a program run together, and gives each value its place in memory.
#include <algorithm>

#include "program.h"

namespace sparseflax {
namespace {

constexpr int64_t kHeavy = 256 << 10;  // bytes of weights, and offsets, from which a layer of single pixels runs together

}  // namespace

// Convolutions whose result nothing reads but a map do that at once, while what they wrote is in a cache: their result lies where the map's does,
// or nowhere, if that is read by a rounding alone.
void Program::Follow() {
  std::vector<int64_t> reads(values_.size());
  std::vector<size_t> reader(values_.size());
  for (size_t i = 0; i < steps_.size(); ++i) {
    for (const int64_t arg : steps_[i].args) ++reads[static_cast<size_t>(arg)], reader[static_cast<size_t>(arg)] = i;
  }
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Op op = steps_[i].op;
    Value& y = values_[i + static_cast<size_t>(inputs_)];
    if ((op != Op::kConv && op != Op::kDepthwise && op != Op::kDense) || steps_[i].args.size() > 1 || reads[i + static_cast<size_t>(inputs_)] != 1) continue;
    const size_t map = reader[i + static_cast<size_t>(inputs_)];
    if (y.place == Place::kOutput || steps_[map].op != Op::kMap || !Follows(static_cast<Unary>(steps_[map].params[0]))) continue;
    steps_[i].then = map;
    y.parent = static_cast<int64_t>(map) + inputs_;
    // What a depthwise convolution's is rounded to is all that is kept of it.
    Value& mapped = values_[map + static_cast<size_t>(inputs_)];
    if (op != Op::kDepthwise || mapped.place == Place::kOutput || reads[map + static_cast<size_t>(inputs_)] != 1) continue;
    const size_t rounds = reader[map + static_cast<size_t>(inputs_)];
    if (steps_[rounds].op != Op::kQuantize) continue;
    steps_[i].rounds = rounds;
    steps_[rounds].done = true;
    mapped.place = Place::kSlot;
  }
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
  const int64_t y = static_cast<int64_t>(step) + inputs_, x = steps_[step].args[0];
  return steps_[step].done || op == Op::kReshape || (op == Op::kWindow && values_[static_cast<size_t>(y)].parent == x) || (op == Op::kMap && values_[static_cast<size_t>(x)].parent == y);
}

// Whether what a concatenation has from a channel on was written there already.
bool Program::Lies(size_t concat, int64_t arg, int64_t channel) const {
  const Value& value = values_[static_cast<size_t>(arg)];
  return value.parent == static_cast<int64_t>(concat) + inputs_ && value.channel == channel;
}

// Whether each pixel of its result is made of the same pixels of others, or is one of a smaller image.
bool Program::Pixelwise(size_t step) const {
  const Op op = steps_[step].op;
  if (Stays(step)) return false;
  if (op == Op::kUpsample) {
    const Value &x = values_[static_cast<size_t>(steps_[step].args[0])], &y = values_[step + static_cast<size_t>(inputs_)];
    return y.type == Type::kFloat32 && x.c == y.c && x.h * x.w < y.h * y.w;  // smaller, so that no step that it runs with makes it
  }
  return op == Op::kCombine || op == Op::kMap || op == Op::kChannelSum || op == Op::kReduce || op == Op::kQuantize || op == Op::kDequantize;
}

// Segments of steps that run in units, and of those that run together; within them, steps that run pixel by pixel: what lies between
// these alone has a slot for a strip of pixels, which stays in the first cache, and no other place.
void Program::Cut() {
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    bool together = false;
    if (step.conv != nullptr || step.op == Op::kDense) {
      const Value &x = values_[static_cast<size_t>(step.args[0])], &y = values_[i + static_cast<size_t>(inputs_)];
      const int64_t bytes = step.conv != nullptr ? step.conv->nnz() * 6 : x.c / step.params[8] * y.c * 4;
      together = x.h * x.w == 1 && y.h * y.w == 1 && bytes > kHeavy;
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
  std::vector<size_t> last(values_.size());  // step that reads it
  for (size_t i = 0; i < steps_.size(); ++i) {
    for (const int64_t arg : steps_[i].args) last[static_cast<size_t>(arg)] = i;
  }
  std::vector<std::pair<size_t, int64_t>> taken;  // slots of a group: when what is in one was read last, and which
  for (size_t i = 0; i < steps_.size(); ++i) {
    const size_t y = i + static_cast<size_t>(inputs_);
    Value& value = values_[y];
    if (steps_[i].begin == i) taken.clear();
    if (!Pixelwise(i) || value.parent >= 0 || value.place == Place::kOutput || elsewhere[y]) continue;
    value.place = Place::kSlot;
    const auto free = std::find_if(taken.begin(), taken.end(), [i](const auto& slot) { return slot.first < i; });
    if (free != taken.end()) {
      free->first = last[y];
      value.offset = free->second;
    } else {
      value.offset = steps_[steps_[i].begin].slots++;
      taken.push_back({last[y], value.offset});
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
    if (step.rounds > 0) use(static_cast<int64_t>(step.rounds) + inputs);
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
      const int64_t bytes = AlignLines(value.size() * value.bytes());
      value.offset = 0;
      size_t at = 0;
      for (; at < here.size() && here[at].begin < value.offset + bytes; ++at) value.offset = std::max(value.offset, here[at].end);
      here.insert(here.begin() + static_cast<int64_t>(at), {value.offset, value.offset + bytes, value.last});
      int64_t& all = whole ? whole_bytes_ : unit_bytes_;
      all = std::max(all, value.offset + bytes);
    }
  }
}

}  // namespace sparseflax
