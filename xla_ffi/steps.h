// What the steps of a program do beside sparse convolutions: the contract of each instruction set's loops.
//
// Images are NHWC, float32 or uint8; `pixel` is the distance in elements from one pixel to the next, at least the channels: a value may
// be a range of channels of a wider one. Every function does rows [row, end) of its output, counted over all images;
// the dense convolution units of these.
#pragma once

#include <cstdint>

namespace sparseflax {

template <typename T>
struct ImageOf {  // images of one value, one after the other
  T* data;
  int64_t h, w, c, pixel;
  T* Row(int64_t row) const { return data + row * w * pixel; }
};
using Image = ImageOf<float>;
using Bytes = ImageOf<uint8_t>;

struct Filter {
  int64_t kh, kw, sh, sw, top, left, dh, dw;
};

// A byte q stands for scale * (q - zero).
struct Quantization {
  float scale;
  int32_t zero;
};

enum class Unary : int64_t { kClamp, kLeaky, kLogistic, kSqrt, kRsqrt, kSquare, kAbs, kPower, kExp, kGate, kSwish, kTanh, kErf, kGelu };

// How many numbers it has.
constexpr size_t NumbersOf(Unary op) { return op == Unary::kGate ? 8 : op == Unary::kClamp ? 4 : op == Unary::kSwish ? 3 : 2; }

// f(x), with p, q, low, high, a, b, s, t its numbers, as many as it has. kClamp: min(max(p x + q, low), high), p of a normal size; kLeaky:
// x >= 0 ? x : p x; kPower: x^p, |p| one of 1/4, 1/2, 3/4; kGate: s (u min(max(p u + q, low), high)) + t, u = a x + b; kSwish, whose third
// number is s: s x / (1 + e^-(x (p + q x^2))), |p| and |q| from 2^-10 to 2^10, or q 0; kGelu: q x (1 + erf(p x))
struct Function {
  Unary op;
  const float* numbers;
};

// Whether a convolution can do it to its result.
constexpr bool Follows(Unary op) {
  return op == Unary::kClamp || op == Unary::kLeaky || op == Unary::kLogistic || op == Unary::kGate || op == Unary::kSwish || op == Unary::kTanh ||
         op == Unary::kGelu;
}

// y[i,j,c] = act( sum_{r,s} x[i*sh + r*dh - top, j*sw + s*dw - left, c] * kernel[r,s,c] + bias[c] ), zeros outside; bytes of x are what they
// stand for, and bytes of y are rounded as by Quantize
template <typename X, typename Y>
struct Depthwise {
  ImageOf<X> x;
  ImageOf<Y> y;
  Filter f;
  const float* kernel;
  const float* bias;      // or null
  int activation;         // 0 none, 1 relu, 2 relu6
  Quantization from, to;  // of bytes
  const Function* then = nullptr;  // a function that Follows, done after the activation to a result in float32; or null
  Bytes rounded = {};              // what that is then rounded to, by `to`, y holding two rows of it in turn; or no data
};

// y[i,j,o] = act( sum_{r,s,c} x[i*sh + r*dh, j*sw + s*dw, g*icg + c] * kernel[r,s,c,o] + bias[o] ), g = o / (channels of y / groups),
// icg = channels of x / groups; every window lies inside
struct Dense {
  Image x, y;
  Filter f;  // no padding
  int64_t groups;
  const float* kernel;
  const float* bias;  // or null
  int activation;     // as above
  const Function* then;  // as above
  // A group's output channels are done some at a time: unit u is row u % rows of the output of the u / rows-th of these panels.
  int64_t rows;
  // Whether windows are pixels: rows are one then.
  bool Pixels() const { return f.kh == 1 && f.kw == 1 && f.sh == 1 && f.sw == 1 && x.h == y.h && x.w == y.w; }
  int64_t Panels(int64_t width) const { return groups * ((y.c / groups + width - 1) / width); }
};

// y[i,j,c] = max or sum over the window's positions inside the image; a maximum of nothing is -inf, and of nan nan
template <typename T>
struct Pooling {
  ImageOf<T> x, y;
  Filter f;
  bool maximum;  // of uint8 nothing else; of nothing it is 0 there
};

// y[p,c] = sum_{d < size} x[p, c + d - low], zeros outside
struct ChannelSum {
  Image x, y;
  int64_t size, low;
};

// y[p,0] = max or sum over c of x[p,c]; a maximum of nan is nan
struct Reduce {
  Image x, y;
  bool maximum;
};

enum class Binary : int64_t { kAdd, kSub, kMul, kDiv, kMax, kMin, kLeaky };  // kLeaky: a >= 0 ? a : a * b
// What the second operand is: a value like the first, a number, one for each channel of all images, one for each channel of an image,
// a number that is an operand, a number for each pixel. With one for each channel the first may have a single one, which meets all.
enum class Other : int64_t { kSame, kNumber, kChannel, kImage, kScalar, kPixel };

// y = op(a, b), or op(b, a) if `swapped`
struct Combine {
  Image a, y;
  Binary op;
  Other kind;
  bool swapped;
  Image b;               // kSame, kImage, kPixel
  const float* channel;  // kChannel
  float number;          // kNumber, which a kScalar is by now
};

// y[i,j,c] = x[i / fh, j / fw, c], or, where x has fh * fw times the channels, x[i / fh, j / fw, ((i % fh) * fw + j % fw) * channels + c]
template <typename T>
struct Upsample {
  ImageOf<T> x, y;
  int64_t fh, fw;
};

// y[i,j,c * groups + g] = x[i,j,g * (channels / groups) + c]
template <typename T>
struct Shuffle {
  ImageOf<T> x, y;
  int64_t groups;
};

// y = f(x)
struct Map {
  Image x, y;
  Function f;
};

// y = clamp(round(x / scale), -zero, 255 - zero) + zero, to nearest, ties to even; of nan 0
struct Quantize {
  Image x;
  Bytes y;
  Quantization to;
};

// y = (x - zero) * scale
struct Dequantize {
  Bytes x;
  Image y;
  Quantization from;
};

struct Steps {
  int64_t dense_width;  // output channels of a panel
  void (*dense)(const Dense&, int64_t unit, int64_t end);
  void (*depthwise)(const Depthwise<float, float>&, int64_t row, int64_t end);
  void (*depthwise_to_bytes)(const Depthwise<float, uint8_t>&, int64_t row, int64_t end);
  void (*depthwise_from_bytes)(const Depthwise<uint8_t, float>&, int64_t row, int64_t end);
  void (*depthwise_of_bytes)(const Depthwise<uint8_t, uint8_t>&, int64_t row, int64_t end);
  void (*pool)(const Pooling<float>&, int64_t row, int64_t end);
  void (*pool_bytes)(const Pooling<uint8_t>&, int64_t row, int64_t end);
  void (*channel_sum)(const ChannelSum&, int64_t row, int64_t end);
  void (*reduce)(const Reduce&, int64_t row, int64_t end);
  void (*combine)(const Combine&, int64_t row, int64_t end);
  void (*map)(const Map&, int64_t row, int64_t end);
  void (*quantize)(const Quantize&, int64_t row, int64_t end);
  void (*dequantize)(const Dequantize&, int64_t row, int64_t end);
};

}  // namespace sparseflax
