// One sparse convolution: its pattern, checked once, and its plans.
#include "sparse_conv.h"

#include <algorithm>
#include <limits>

#include "nearly_all.h"
#include "plan.h"

namespace sparseflax {

#if defined(__x86_64__)
extern const Isa kAvx512, kAvx512vl, kAvx2, kAvx512Vnni, kAvx512vlVnni, kAvxVnni, kAvx2Int8;
#elif defined(__aarch64__)
extern const Isa kNeon, kNeonDot, kNeonInt8;
#endif
extern const Isa kPortable, kPortableInt8;

const std::vector<const Isa*>& AllIsas(Element element) {
#if defined(__x86_64__)
  static const std::vector<const Isa*> isas = {&kAvx512, &kAvx512vl, &kAvx2, &kPortable};
  static const std::vector<const Isa*> int8 = {&kAvx512Vnni, &kAvx512vlVnni, &kAvxVnni, &kAvx2Int8, &kPortableInt8};
#elif defined(__aarch64__)
  static const std::vector<const Isa*> isas = {&kNeon, &kPortable};
  static const std::vector<const Isa*> int8 = {&kNeonDot, &kNeonInt8, &kPortableInt8};
#else
  static const std::vector<const Isa*> isas = {&kPortable};
  static const std::vector<const Isa*> int8 = {&kPortableInt8};
#endif
  return element == Element::kFloat32 ? isas : int8;
}

const std::vector<const Isa*>& Isas(Element element) {
  const auto running = [](Element of) {
    std::vector<const Isa*> found;
    for (const Isa* isa : AllIsas(of)) {
      if (isa->runs_here()) found.push_back(isa);
    }
    return found;
  };
  static const std::vector<const Isa*> isas = running(Element::kFloat32), int8 = running(Element::kInt8);
  return element == Element::kFloat32 ? isas : int8;
}

std::string Shape::Check() const {
  constexpr int64_t kLargest = int64_t{1} << 31;
  const int64_t all[] = {kh, kw, icg, oc, groups, block, sh, sw, dh, dw};
  for (int64_t v : all) {
    if (v < 1 || v > kLargest) return "a size of the convolution is not positive or too large";
  }
  if (oc % groups != 0) return "groups do not divide the output channels";
  if (block > icg) return "the channel block is larger than the channels of a group";
  if (std::min({top, bottom, left, right}) < 0) return "padding is negative";
  if (std::max({top, bottom, left, right}) > kLargest) return "padding is too large";
  if (kh > 65535 || kw > 65535 || taps() > 65536 * int64_t{16}) return "the kernel window is too large";
  constexpr int64_t kMostWeights = int64_t{1} << 40;  // as packing.py: no product of these sizes comes near an overflow
  if (oc > kMostWeights / (kh * kw) || icg > kMostWeights / (kh * kw * oc)) return "the kernel is too large";
  return "";
}

Shape Shape::Flat() const {
  const int64_t row = n * ih * iw;
  if (kh != 1 || kw != 1 || sh != 1 || sw != 1 || ih != oh || iw != ow || top != 0 || left != 0 ||
      row * std::max(x_pixel, y_pixel) > std::numeric_limits<int32_t>::max()) {
    return *this;
  }
  Shape flat = *this;
  flat.n = flat.ih = flat.oh = 1;
  flat.iw = flat.ow = row;
  return flat;
}

std::unique_ptr<Conv> Conv::Make(const Shape& shape, const uint8_t* gaps, int64_t size, const Isa* isa, std::string* error,
                                 Element element) {
  *error = shape.Check();
  if (!error->empty()) return nullptr;
  std::unique_ptr<Conv> conv(new Conv);
  conv->shape_ = shape;
  conv->isa_ = isa;
  conv->element_ = element;
  conv->gaps_.assign(gaps, gaps + size);
  int64_t nnz = 0;
  if (!Decode(shape, gaps, size, [&](int64_t, int64_t, int64_t, int64_t) { ++nnz; })) {
    *error = "the packed pattern points outside its kernel: it is damaged or was edited; pack the dense kernel again";
    return nullptr;
  }
  if (nnz >= std::numeric_limits<uint32_t>::max()) {
    *error = "more than 2^32 kept weights";
    return nullptr;
  }
  conv->nnz_ = nnz;
  if (element == Element::kInt8) conv->nearly_all_ = NearlyAll::Of(shape, conv->gaps_, nnz);
  return conv;
}

Conv::~Conv() = default;

std::shared_ptr<const Plan> Conv::GetPlan(const Shape& shape, const Schedule* forced) {
  if (forced != nullptr) return std::make_shared<Plan>(shape, *forced, gaps_, nnz_);
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& plan : plans_) {
    if (plan->n == shape.n && plan->ih == shape.ih && plan->iw == shape.iw && plan->shape.x_pixel == shape.x_pixel &&
        plan->shape.y_pixel == shape.y_pixel) {
      return plan;
    }
  }
  const std::vector<const Isa*> forced_isa = {isa_};
  const Schedule chosen = ChooseSchedule(shape.Flat(), nnz_, isa_ != nullptr ? forced_isa : Isas(element_), Cpu());
  if (chosen.kernel == nullptr) return nullptr;
  plans_.push_back(std::make_shared<Plan>(shape, chosen, gaps_, nnz_));
  return plans_.back();
}

std::string Conv::Fits(int64_t ih, int64_t iw, int64_t oh, int64_t ow) const {
  const Shape& s = shape_;
  if (std::min({ih, iw, oh, ow}) < 1) return "an image dimension is empty";
  const int64_t reach_h = (s.kh - 1) * s.dh + 1, reach_w = (s.kw - 1) * s.dw + 1;
  if (ih + s.top + s.bottom < reach_h || (ih + s.top + s.bottom - reach_h) / s.sh + 1 != oh ||
      iw + s.left + s.right < reach_w || (iw + s.left + s.right - reach_w) / s.sw + 1 != ow) {
    return "the output's height and width do not follow from the input's and the window";
  }
  return "";
}

std::string Conv::Run(int64_t n, int64_t ih, int64_t iw, int64_t oh, int64_t ow, const Buffers& buffers, int activation,
                      Executor& executor, const Schedule* forced) {
  Shape s = shape_;
  s.n = n;
  s.ih = ih;
  s.iw = iw;
  s.oh = oh;
  s.ow = ow;
  s.x_pixel = buffers.x_pixel > 0 ? buffers.x_pixel : s.ic();
  s.y_pixel = buffers.y_pixel > 0 ? buffers.y_pixel : s.oc;
  if (s.x_pixel < s.ic() || s.y_pixel < s.oc) return "a pixel is narrower than its channels";
  if (n < 1) return "an image dimension is empty";
  const std::string error = Fits(ih, iw, oh, ow);
  if (!error.empty()) return error;
  if (std::max(ih * iw * s.x_pixel, oh * ow * s.y_pixel) > std::numeric_limits<int32_t>::max()) return "an image holds more than 2^31 floats";
  if (nearly_all_ != nullptr && forced == nullptr) {
    nearly_all_->Run(s, buffers, isa_ != nullptr ? *isa_ : *Isas(element_)[0], executor);
    return "";
  }
  const std::shared_ptr<const Plan> plan = GetPlan(s, forced);
  if (plan == nullptr) return "the kernel window is too large for a panel";
  plan->Run(buffers, activation, executor);
  return "";
}

}  // namespace sparseflax
