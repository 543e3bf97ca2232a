// Convolutions in eight bits that keep nearly all of their words: run as dense ones.
#include "nearly_all.h"

#include <algorithm>

#include "plan.h"
#include "rescale.h"

namespace sparseflax {
namespace {

constexpr int64_t kAlone = int64_t{1} << 19;      // products below which a second thread costs more than it brings, as of dense float32
constexpr int64_t kMostWords = int64_t{1} << 18;  // of a kernel's output channel: a panel of 64 channels takes 64 MB

}  // namespace

std::unique_ptr<NearlyAll> NearlyAll::Of(const Shape& s, const std::vector<uint8_t>& gaps, int64_t nnz) {
  const int64_t words = s.kh * s.kw * s.icg;
  if (words > kMostWords || static_cast<double>(nnz) < kNearlyAll * static_cast<double>(words * s.oc)) return nullptr;
  std::unique_ptr<NearlyAll> kept(new NearlyAll);
  kept->starts_.assign(1, 0);
  int64_t line = 0, next = 0;  // which tap of which block and output channel may come
  const auto pass = [&](int64_t to_line, int64_t to) {
    for (; line < to_line || next < to; ++next) {
      const int64_t block = line / s.ocg() % s.blocks();
      if (next == std::min(s.block, s.icg - block * s.block) * s.kh * s.kw) {
        kept->starts_.push_back(static_cast<uint32_t>(kept->missing_.size()));
        ++line;
        next = -1;
      } else {
        kept->missing_.push_back(static_cast<uint32_t>(next));
      }
    }
  };
  Decode(s, gaps.data(), static_cast<int64_t>(gaps.size()), [&](int64_t g, int64_t b, int64_t k, int64_t tap) {
    pass((g * s.blocks() + b) * s.ocg() + k, tap);
    ++next;
  });
  pass(s.groups * s.blocks() * s.ocg(), 0);
  return kept;
}

void NearlyAll::Run(const Shape& called, const Buffers& b, const Isa& isa, Executor& executor) const {
  const Shape s = called.Flat();
  const int64_t pixels = s.n * s.oh * s.ow, panels = s.groups * ((s.ocg() + isa.dense_width - 1) / isa.dense_width);
  const PerChannel channels(*b.scales, static_cast<const int32_t*>(b.bias), s.oc, isa.shift, b.residual != nullptr);
  const DenseWords d{s, static_cast<const Word*>(b.x), static_cast<const Word*>(b.values), missing_.data(), starts_.data(),
                     channels.starts(), b.y, b.residual, &channels};
  // Each panel is packed once, unless threads would be left without one.
  const int64_t products = pixels * s.kh * s.kw * s.icg * s.oc, threads = products < kAlone ? 1 : executor.threads();
  const int64_t parts = panels % threads == 0 ? 1 : std::clamp<int64_t>(pixels / kFewPixels, 1, threads);
  const auto unit = [&](int64_t i) { isa.dense(d, i / parts, pixels * (i % parts) / parts, pixels * (i % parts + 1) / parts); };
  if (threads == 1) {
    for (int64_t i = 0; i < panels * parts; ++i) unit(i);
  } else {
    executor.For(panels * parts, unit);
  }
}

}  // namespace sparseflax
