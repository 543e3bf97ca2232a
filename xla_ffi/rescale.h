// The arrays of a Rescale, made of Scales at each call.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "sparse_conv.h"

namespace sparseflax {

// The nearest of 16 significant bits, ties to even.
inline float Of16Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isfinite(value)) bits = (bits + 127 + (bits >> 8 & 1)) & ~uint32_t{255};
  std::memcpy(&value, &bits, 4);
  return value;
}

// A Rescale and its arrays, made of Scales; and where sums start: sum (x - zero) w = sum (x - shift) w - (zero - shift) sum w.
class PerChannel : public Rescale {
 public:
  PerChannel(const Scales& s, const int32_t* sums, int64_t oc, int shift, bool residual)
      : Rescale{s, nullptr, nullptr, nullptr, nullptr}, arrays_(static_cast<size_t>(4 * oc)), starts_(static_cast<size_t>(oc)) {
    float *const to_scale = arrays_.data(), *const to_offset = to_scale + oc, *const to_ratio = to_offset + oc, *const to_inner = to_ratio + oc;
    for (int64_t k = 0; k < oc; ++k) {
      const float unit = s.weight[k] * s.in;
      to_offset[k] = s.bias[k] / unit;
      to_scale[k] = s.rounds ? s.out : s.weight[k] * s.out;
      to_ratio[k] = s.rounds ? s.residual : Of16Bits(s.residual / unit);
      to_inner[k] = s.weight[k] * s.inner;
      starts_[static_cast<size_t>(k)] = static_cast<Word>((shift - s.zero_in) * static_cast<int64_t>(sums[k]));
    }
    scale = to_scale;
    offset = to_offset;
    ratio = residual ? to_ratio : nullptr;
    inner = s.rounds ? to_inner : nullptr;
  }
  const Word* starts() const { return starts_.data(); }

 private:
  std::vector<float> arrays_;
  std::vector<Word> starts_;
};

}  // namespace sparseflax
