// The border to XLA of int8 convolutions: as handler.cc, with uint8 images, words of four weights, and Scales.
#include <algorithm>
#include <cmath>
#include <exception>
#include <memory>
#include <mutex>
#include <string>

#include "pool_executor.h"
#include "sparse_conv.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace sparseflax {
namespace {

struct Int8State {
  static ffi::TypeId id;
  std::unique_ptr<Conv> conv;
  Scales scales{};  // without its arrays
};
ffi::TypeId Int8State::id = {};
const auto kStateInfo = ffi::MakeTypeInfo<Int8State>();

ffi::Error Invalid(const std::string& what) { return ffi::Error::InvalidArgument("sparse_conv int8: " + what); }

ffi::ErrorOr<std::unique_ptr<Int8State>> Instantiate(ffi::Span<const uint8_t> gaps, ffi::Span<const int64_t> layout,
                                                     ffi::Span<const int64_t> window, ffi::Span<const int64_t> zeros,
                                                     ffi::Span<const float> numbers, std::string_view kernel) {
  if (layout.size() != 6 || window.size() != 8 || zeros.size() != 3 || numbers.size() != 5) {
    return ffi::Unexpected(Invalid("malformed attributes"));
  }
  if (std::any_of(zeros.begin(), zeros.end(), [](int64_t zero) { return zero < 0 || zero > 255; })) {
    return ffi::Unexpected(Invalid("a zero point is not 0 to 255"));
  }
  const Isa* isa = nullptr;
  for (const Isa* candidate : Isas(Element::kInt8)) {
    if (candidate->name == kernel) isa = candidate;
  }
  if (isa == nullptr && !kernel.empty()) return ffi::Unexpected(Invalid("kernel '" + std::string(kernel) + "' does not run on this machine"));
  Shape s{};
  s.kh = layout[0], s.kw = layout[1], s.icg = layout[2], s.oc = layout[3], s.groups = layout[4], s.block = layout[5];
  s.sh = window[0], s.sw = window[1], s.top = window[2], s.bottom = window[3], s.left = window[4], s.right = window[5];
  s.dh = window[6], s.dw = window[7];
  auto state = std::make_unique<Int8State>();
  std::string error;
  state->conv = Conv::Make(s, gaps.begin(), static_cast<int64_t>(gaps.size()), isa, &error, Element::kInt8);
  if (!error.empty()) return ffi::Unexpected(Invalid(error));
  Scales& scales = state->scales;
  scales.zero_in = static_cast<int32_t>(zeros[0]);
  scales.zero = static_cast<int32_t>(zeros[1]);
  scales.zero_residual = static_cast<int32_t>(zeros[2]);
  scales.low = numbers[0];
  scales.high = numbers[1];
  scales.in = numbers[2];
  scales.out = numbers[3];
  scales.residual = numbers[4];
  return state;
}

ffi::Error Execute(Int8State* state, ffi::ThreadPool pool, ffi::BufferR4<ffi::U8> x, ffi::BufferR1<ffi::S32> words,
                   ffi::BufferR1<ffi::S32> sums, ffi::BufferR1<ffi::F32> scale, ffi::BufferR1<ffi::F32> bias, ffi::RemainingArgs rest,
                   ffi::Result<ffi::AnyBuffer> y) {
  const Shape& s = state->conv->shape();
  const auto in = x.dimensions(), out = y->dimensions();
  if (out.size() != 4 || in[3] != 4 * s.ic() || out[3] != s.oc || in[0] != out[0]) return Invalid("x and y do not fit the kernel");
  if (reinterpret_cast<uintptr_t>(x.typed_data()) % 4 != 0) return Invalid("x is not aligned to words of four bytes");
  if (static_cast<int64_t>(words.element_count()) != state->conv->nnz()) {
    return Invalid("the pattern keeps " + std::to_string(state->conv->nnz()) + " words, " + std::to_string(words.element_count()) +
                   " are given");
  }
  for (size_t count : {sums.element_count(), scale.element_count(), bias.element_count()}) {
    if (static_cast<int64_t>(count) != s.oc) return Invalid("sums, scale or bias do not fit the kernel");
  }
  Scales scales = state->scales;
  scales.weight = scale.typed_data();
  scales.bias = bias.typed_data();
  scales.to_float = y->element_type() == ffi::F32;
  if (!scales.to_float) {
    if (y->element_type() != ffi::U8) return Invalid("y is neither uint8 nor float32");
    const float least = static_cast<float>(-scales.zero), most = static_cast<float>(255 - scales.zero);
    if (!(least <= scales.low && scales.low <= scales.high && scales.high <= most)) return Invalid("bounds do not fit uint8");
  }
  Buffers buffers = {x.typed_data(), words.typed_data(), sums.typed_data(), nullptr, y->untyped_data(), &scales};
  if (rest.size() == 1) {
    const auto residual = rest.get<ffi::BufferR4<ffi::U8>>(0);
    if (!residual.has_value()) return residual.error();
    if (!std::equal(out.begin(), out.end(), residual->dimensions().begin())) return Invalid("residual does not fit y");
    buffers.residual = residual->typed_data();
  } else if (rest.size() != 0) {
    return Invalid("wrong number of operands");
  }
  PoolExecutor<ffi::ThreadPool> executor(pool);
  try {
    const std::string error = state->conv->Run(in[0], in[1], in[2], out[1], out[2], buffers, 0, executor);
    return error.empty() ? ffi::Error::Success() : Invalid(error);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("sparse_conv int8: ") + error.what());
  }
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate()
                           .Attr<ffi::Span<const uint8_t>>("gaps")
                           .Attr<ffi::Span<const int64_t>>("layout")
                           .Attr<ffi::Span<const int64_t>>("window")
                           .Attr<ffi::Span<const int64_t>>("zeros")
                           .Attr<ffi::Span<const float>>("numbers")
                           .Attr<std::string_view>("kernel"));
XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<Int8State>>()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::BufferR4<ffi::U8>>()
                           .Arg<ffi::BufferR1<ffi::S32>>()
                           .Arg<ffi::BufferR1<ffi::S32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .RemainingArgs()
                           .Ret<ffi::AnyBuffer>());

}  // namespace

// The state's type is registered in the metadata call, as in handler.cc.
XLA_FFI_Error* Int8ConvInstantiate(XLA_FFI_CallFrame* frame) {
  static std::mutex mutex;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (Int8State::id.type_id == 0) {
      if (XLA_FFI_Error* error = ffi::Ffi::RegisterTypeId(frame->api, "sparseflax.Int8Conv", &Int8State::id, &kStateInfo)) return error;
    }
  }
  return kInstantiate(frame);
}

XLA_FFI_Error* Int8ConvExecute(XLA_FFI_CallFrame* frame) { return kExecute(frame); }

}  // namespace sparseflax
