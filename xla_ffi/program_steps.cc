// The steps of a program, for the images of a unit.
#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <type_traits>
#include <utility>

namespace sparseflax {
namespace {

constexpr int64_t kStrip = 1024;     // floats of a value between steps that run together: some of these fit a first cache
constexpr int64_t kAlone = 1 << 15;  // floats of a step below which a second thread costs more than it brings
constexpr int64_t kPerFloat = 16;    // multiply-adds of a dense convolution that take as long: two vectors of eight in a cycle

// f(first, end) over so many rows of a step that touches so many floats.
template <typename F>
void ForRows(Executor& executor, int64_t rows, int64_t floats, const F& f) {
  const int64_t parts = floats < kAlone ? 1 : std::min(rows, executor.threads());
  if (parts <= 1) return f(int64_t{0}, rows);
  executor.For(parts, [&](int64_t i) { f(rows * i / parts, rows * (i + 1) / parts); });
}

// Copies what lies inside; `fill` where y reaches beyond x.
template <typename T>
void CopyWindow(const ImageOf<T>& source, const ImageOf<T>& target, const std::vector<int64_t>& shifts, T fill, int64_t row, int64_t end) {
  const ImageOf<T> x = source, y = target;  // a byte that is stored could lie anywhere: these would be read again after each
  const int64_t shift[] = {shifts[0], shifts[1], shifts[2]};
  const int64_t first = std::clamp(-shift[2], int64_t{0}, y.c), last = std::clamp(x.c - shift[2], first, y.c);
  const bool plain = x.pixel == x.c && y.pixel == y.c && x.c == y.c && shift[2] == 0;  // rows lie side by side
  for (; row < end; ++row) {
    const int64_t image = row / y.h, i = row % y.h + shift[0];
    if (plain && i >= 0 && i < x.h) {
      const int64_t from = std::clamp(-shift[1], int64_t{0}, y.w), to = std::clamp(x.w - shift[1], from, y.w);
      T* const start = std::fill_n(y.Row(row), from * y.c, fill);
      std::copy_n(x.Row(image * x.h + i) + (from + shift[1]) * x.c, (to - from) * y.c, start);
      std::fill(start + (to - from) * y.c, y.Row(row) + y.w * y.c, fill);
      continue;
    }
    if (x.c == 3 && y.c == 4 && shift[2] == 0 && i >= 0 && i < x.h && shift[1] == 0 && x.w == y.w) {  // a picture, for words of four bytes
      const T* from = x.Row(image * x.h + i);
      T* to = y.Row(row);
      int64_t j = 0;
      if constexpr (sizeof(T) == 1) {  // a word at a time, whose fourth byte is the next pixel's
        for (; j + 1 < y.w; ++j, from += x.pixel, to += y.pixel) {
          uint32_t word;
          std::memcpy(&word, from, 4);
          word = (word & 0xffffff) | static_cast<uint32_t>(fill) << 24;
          std::memcpy(to, &word, 4);
        }
      }
      for (; j < y.w; ++j, from += x.pixel, to += y.pixel) to[0] = from[0], to[1] = from[1], to[2] = from[2], to[3] = fill;
      continue;
    }
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

template <typename T>
void UpsampleRows(const Upsample<T>& d, int64_t row, int64_t end) {
  const bool blocks = d.x.c != d.y.c;
  for (; row < end; ++row) {
    const int64_t image = row / d.y.h, i = row % d.y.h, block = blocks ? i % d.fh * d.fw : 0;
    const T* x = d.x.Row(image * d.x.h + i / d.fh) + block * d.y.c;
    T* y = d.y.Row(row);
    const bool run = blocks && d.y.pixel == d.y.c;  // a row of a block is one
    const int64_t parts = run ? 1 : d.fw, count = run ? d.fw * d.y.c : d.y.c, step = run ? count : d.y.pixel;
    for (int64_t j = 0; j < d.x.w; ++j, x += d.x.pixel) {
      for (int64_t b = 0; b < parts; ++b, y += step) {
        const T* from = x + (blocks ? b * d.y.c : 0);
        for (int64_t c = 0; c < count; ++c) y[c] = from[c];
      }
    }
  }
}

template <typename T>
void ShuffleRows(const Shuffle<T>& shuffle, int64_t row, int64_t end) {
  const Shuffle<T> d = shuffle;  // as above
  const int64_t channels = d.x.c / d.groups;
  for (; row < end; ++row) {
    for (int64_t j = 0; j < d.y.w; ++j) {
      const T* const x = d.x.Row(row) + j * d.x.pixel;
      T* const y = d.y.Row(row) + j * d.y.pixel;
      if (d.groups == 2) {  // a loop of which the compiler makes vectors
        for (int64_t c = 0; c < channels; ++c) y[2 * c] = x[c], y[2 * c + 1] = x[channels + c];
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t g = 0; g < d.groups; ++g) y[c * d.groups + g] = x[g * channels + c];
      }
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

Function FunctionOf(const Step& map) { return {static_cast<Unary>(map.params[0]), map.numbers.data()}; }

}  // namespace

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
        const auto number = [&](size_t i) { return i < step.numbers.size() ? step.numbers[i] : 0.0f; };
        const Image x = work.x.Strip<float>(row, j, count), y = work.y.Strip<float>(row, j, count);
        switch (step.op) {
          case Op::kQuantize:
            loops.quantize({x, work.y.Strip<uint8_t>(row, j, count), {number(0), static_cast<int32_t>(number(1))}}, 0, 1);
            break;
          case Op::kDequantize:
            loops.dequantize({work.x.Strip<uint8_t>(row, j, count), y, {number(0), static_cast<int32_t>(number(1))}}, 0, 1);
            break;
          case Op::kMap: loops.map({x, y, FunctionOf(step)}, 0, 1); break;
          case Op::kChannelSum: loops.channel_sum({x, y, p[0], p[1]}, 0, 1); break;
          case Op::kReduce: loops.reduce({x, y, p[0] != 0}, 0, 1); break;
          case Op::kUpsample: {
            const Image& from = work.x.image;
            const float* const pixels = from.Row(row / h * from.h + row % h / p[0]);
            for (int64_t k = 0, at = j / p[1], left = p[1] - j % p[1]; k < count; ++k) {
              std::copy_n(pixels + at * from.pixel, from.c, y.data + k * y.pixel);
              if (--left == 0) ++at, left = p[1];
            }
            break;
          }
          default: {
            const Other kind = static_cast<Other>(p[1]);
            Image b = work.b.Strip<float>(row, j, count);
            if (kind == Other::kImage && !work.b.slot) b.data = work.b.image.data + row / h * work.b.image.pixel;
            const float* const shared = step.shared.empty() ? nullptr : static_cast<const float*>(call.shared[static_cast<size_t>(step.shared[0])]);
            const bool scalar = kind == Other::kScalar;
            loops.combine({x, y, static_cast<Binary>(p[0]), scalar ? Other::kNumber : kind, p[2] != 0, b, shared, scalar ? *shared : number(0)}, 0, 1);
          }
        }
      }
    }
  }
}

std::string Program::RunSteps(const Segment& segment, const Call& call) const {
  const Steps& loops = *(isa_ != nullptr ? isa_ : Isas()[0])->steps;
  const bool traced = tracing_.load(std::memory_order_relaxed);
  for (size_t i = segment.begin; i < segment.end; ++i) {
    if (Stays(i)) continue;
    const Step& step = steps_[i];
    const auto start = traced ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point();
    const std::vector<int64_t>& p = step.params;
    const int64_t result = static_cast<int64_t>(i) + inputs_;
    const bool bytes = values_[static_cast<size_t>(result)].type == Type::kUint8;
    const Image x = At<float>(call, step.args[0]), y = At<float>(call, result);  // sizes, where they are bytes
    const auto operand = [&](size_t index) { return static_cast<const float*>(call.shared[static_cast<size_t>(step.shared[index])]); };
    const int64_t rows = call.count * y.h;
    const Function function = step.then > 0 ? FunctionOf(steps_[step.then]) : Function{};
    const Function* const then = step.then > 0 ? &function : nullptr;
    const auto spread = [&](int64_t floats, const auto& f) { ForRows(call.executor, rows, call.count * floats, f); };
    const auto pixelwise = [&] {
      spread(y.h * y.w * std::max(x.c, y.c) * static_cast<int64_t>(step.end - i), [&](int64_t row, int64_t end) { RunPixelwise(i, call, loops, row, end); });
      i = step.end - 1;
    };
    switch (step.op) {
      case Op::kConv: {
        Buffers b{x.data, operand(0), p[15] != 0 ? operand(1) : zeros_.data(), nullptr, y.data, nullptr, x.pixel, y.pixel, then};
        if (p[16] != 0) b.residual = At<float>(call, step.args[1]).data;
        const std::string error = step.conv->Run(call.count, x.h, x.w, y.h, y.w, b, static_cast<int>(p[14]), call.executor);
        if (!error.empty()) return "step " + std::to_string(i) + ": " + error;
        break;
      }
      case Op::kConvInt8: {
        const auto zero = [&](size_t at) { return static_cast<int32_t>(p[at]); };
        const auto number = [&](size_t at) { return at < step.numbers.size() ? step.numbers[at] : 0.0f; };
        const Scales scales{{number(0), number(1), zero(14), zero(15), zero(16), p[17] != 0, number(5), number(6), number(7)},
                            operand(2), operand(3), number(2), number(3), number(4), p[19] != 0, number(8)};
        Buffers b{x.data, operand(0), operand(1), nullptr, y.data, &scales, x.pixel / 4, y.pixel};
        if (p[18] != 0) b.residual = At<uint8_t>(call, step.args[1]).data;
        const std::string error = step.conv->Run(call.count, x.h, x.w, y.h, y.w, b, 0, call.executor);
        if (!error.empty()) return "step " + std::to_string(i) + ": " + error;
        break;
      }
      case Op::kDepthwise: {
        const auto bytes_at = [&](size_t at) { return Quantization{step.numbers[at], static_cast<int32_t>(step.numbers[at + 1])}; };
        const Quantization from = p[10] != 0 ? bytes_at(0) : Quantization{};
        Quantization to = bytes ? bytes_at(p[10] != 0 ? 2 : 0) : Quantization{};
        Bytes rounded{};
        if (step.rounds > 0) {
          const std::vector<float>& numbers = steps_[step.rounds].numbers;
          to = {numbers[0], static_cast<int32_t>(numbers[1])};
          rounded = At<uint8_t>(call, static_cast<int64_t>(step.rounds) + inputs_);
        }
        const auto convolve = [&](const auto& in, const auto& out, auto loop) {
          const Filter f{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
          const float* const bias = p[9] != 0 ? operand(1) : nullptr;
          spread(y.h * y.w * y.c * p[0] * p[1], [&](int64_t row, int64_t end) {
            auto y_or_strip = out;
            if constexpr (std::is_same_v<std::decay_t<decltype(out)>, Image>) {
              if (rounded.data != nullptr) {
                thread_local Arena arena;
                y_or_strip = {reinterpret_cast<float*>(arena.Get(static_cast<size_t>(2 * y.w * y.c * 4))), y.h, y.w, y.c, y.c};
              }
            }
            loop({in, y_or_strip, f, operand(0), bias, static_cast<int>(p[8]), from, to, then, rounded}, row, end);
          });
        };
        const Bytes x_bytes = At<uint8_t>(call, step.args[0]), y_bytes = At<uint8_t>(call, result);
        if (p[10] != 0) bytes ? convolve(x_bytes, y_bytes, loops.depthwise_of_bytes) : convolve(x_bytes, y, loops.depthwise_from_bytes);
        else bytes ? convolve(x, y_bytes, loops.depthwise_to_bytes) : convolve(x, y, loops.depthwise);
        break;
      }
      case Op::kDense: {
        const Dense d{x, y, {p[0], p[1], p[2], p[3], 0, 0, p[6], p[7]}, p[8], operand(0), p[10] != 0 ? operand(1) : nullptr,
                      static_cast<int>(p[9]), then, rows};
        const int64_t floats = y.h * y.w * y.c * p[0] * p[1] * (x.c / p[8]) / kPerFloat;
        ForRows(call.executor, rows * d.Panels(loops.dense_width), call.count * floats, [&](int64_t unit, int64_t end) { loops.dense(d, unit, end); });
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
      case Op::kReduce:
      case Op::kCombine:
      case Op::kMap:
      case Op::kQuantize:
      case Op::kDequantize:
        pixelwise();
        break;
      case Op::kWindow:
        spread(y.h * y.w * y.c, [&](int64_t row, int64_t end) {
          if (!bytes) return CopyWindow(x, y, p, step.numbers[0], row, end);
          CopyWindow(At<uint8_t>(call, step.args[0]), At<uint8_t>(call, result), p, static_cast<uint8_t>(step.numbers[0]), row, end);
        });
        break;
      case Op::kUpsample:
        if (Pixelwise(i)) {
          pixelwise();
          break;
        }
        spread(y.h * y.w * y.c, [&](int64_t row, int64_t end) {
          if (!bytes) return UpsampleRows<float>({x, y, p[0], p[1]}, row, end);
          UpsampleRows<uint8_t>({At<uint8_t>(call, step.args[0]), At<uint8_t>(call, result), p[0], p[1]}, row, end);
        });
        break;
      case Op::kShuffle:
        spread(y.h * y.w * y.c, [&](int64_t row, int64_t end) {
          if (!bytes) return ShuffleRows<float>({x, y, p[0]}, row, end);
          ShuffleRows<uint8_t>({At<uint8_t>(call, step.args[0]), At<uint8_t>(call, result), p[0]}, row, end);
        });
        break;
      case Op::kConcat: {
        int64_t channel = 0;
        for (const int64_t arg : step.args) {
          const Value& value = values_[static_cast<size_t>(arg)];
          if (!Lies(i, arg, channel)) {
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

}  // namespace sparseflax
