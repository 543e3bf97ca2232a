// What the steps of a program do beside sparse convolutions: the contract of each instruction set's loops.
//
// Images are NHWC float32; `pixel` is the distance in floats from one pixel to the next, at least the channels: a value may be a
// range of channels of a wider one. Every function does rows [row, end) of its output, counted over all images.
#pragma once

#include <cstdint>

namespace sparseflax {

struct Image {  // images of one value, one after the other
  float* data;
  int64_t h, w, c, pixel;
  float* Row(int64_t row) const { return data + row * w * pixel; }
};

struct Filter {
  int64_t kh, kw, sh, sw, top, left, dh, dw;
};

// y[i,j,c] = act( sum_{r,s} x[i*sh + r*dh - top, j*sw + s*dw - left, c] * kernel[r,s,c] + bias[c] ), zeros outside
struct Depthwise {
  Image x, y;
  Filter f;
  const float* kernel;
  const float* bias;  // or null
  int activation;     // 0 none, 1 relu, 2 relu6
};

// y[i,j,c] = max or sum over the window's positions inside the image; a maximum of nothing is -inf, and of nan nan
struct Pooling {
  Image x, y;
  Filter f;
  bool maximum;
};

// y[p,c] = sum_{d < size} x[p, c + d - low], zeros outside
struct ChannelSum {
  Image x, y;
  int64_t size, low;
};

enum class Binary : int64_t { kAdd, kSub, kMul, kDiv, kMax, kMin };
// What the second operand is: a value like the first, a number, one for each channel of all images, one for each channel of an image.
enum class Other : int64_t { kSame, kNumber, kChannel, kImage };

// y = op(a, b), or op(b, a) if `swapped`
struct Combine {
  Image a, y;
  Binary op;
  Other kind;
  bool swapped;
  Image b;               // kSame, kImage
  const float* channel;  // kChannel
  float number;          // kNumber
};

enum class Unary : int64_t { kClamp, kLeaky, kLogistic, kSqrt, kRsqrt, kSquare, kNeg, kAbs, kPower };

// y = op(x). kClamp: min(max(x, p), q); kLeaky: x >= 0 ? x : p x; kPower: x^p, |p| one of 1/4, 1/2, 3/4
struct Map {
  Image x, y;
  Unary op;
  float p, q;
};

struct Steps {
  void (*depthwise)(const Depthwise&, int64_t row, int64_t end);
  void (*pool)(const Pooling&, int64_t row, int64_t end);
  void (*channel_sum)(const ChannelSum&, int64_t row, int64_t end);
  void (*combine)(const Combine&, int64_t row, int64_t end);
  void (*map)(const Map&, int64_t row, int64_t end);
};

}  // namespace sparseflax
