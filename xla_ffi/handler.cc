// The border to XLA: typed buffers and attributes in, errors out, XLA's intra-op thread pool as the executor.
#include <algorithm>
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

struct State {
  static ffi::TypeId id;
  std::unique_ptr<Conv> conv;
  int activation = 0;
  bool has_bias = false, has_residual = false;
  std::once_flag once;
  std::vector<float> zeros;  // the bias of a convolution without one: made when there is an output that vouches for its size
};
ffi::TypeId State::id = {};
const auto kStateInfo = ffi::MakeTypeInfo<State>();

ffi::Error Invalid(const std::string& what) { return ffi::Error::InvalidArgument("sparse_conv: " + what); }

ffi::ErrorOr<std::unique_ptr<State>> Instantiate(ffi::Span<const uint8_t> gaps, ffi::Span<const int64_t> layout,
                                                 ffi::Span<const int64_t> window, ffi::Span<const int64_t> epilogue,
                                                 std::string_view kernel) {
  if (layout.size() != 6 || window.size() != 8 || epilogue.size() != 3) return ffi::Unexpected(Invalid("malformed attributes"));
  if (epilogue[0] < 0 || epilogue[0] > 2) return ffi::Unexpected(Invalid("unknown activation"));
  const Isa* isa = nullptr;
  for (const Isa* candidate : Isas()) {
    if (candidate->name == kernel) isa = candidate;
  }
  if (isa == nullptr && !kernel.empty()) return ffi::Unexpected(Invalid("kernel '" + std::string(kernel) + "' does not run on this machine"));
  Shape s{};
  s.kh = layout[0], s.kw = layout[1], s.icg = layout[2], s.oc = layout[3], s.groups = layout[4], s.block = layout[5];
  s.sh = window[0], s.sw = window[1], s.top = window[2], s.bottom = window[3], s.left = window[4], s.right = window[5];
  s.dh = window[6], s.dw = window[7];
  auto state = std::make_unique<State>();
  std::string error;
  state->conv = Conv::Make(s, gaps.begin(), static_cast<int64_t>(gaps.size()), isa, &error);
  if (!error.empty()) return ffi::Unexpected(Invalid(error));
  state->activation = static_cast<int>(epilogue[0]);
  state->has_bias = epilogue[1] != 0;
  state->has_residual = epilogue[2] != 0;
  return state;
}

ffi::Error Execute(State* state, ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> x, ffi::BufferR1<ffi::F32> values,
                   ffi::RemainingArgs rest, ffi::ResultBufferR4<ffi::F32> y) {
  const Shape& s = state->conv->shape();
  const auto in = x.dimensions(), out = y->dimensions();
  if (in[3] != s.ic() || out[3] != s.oc || in[0] != out[0]) return Invalid("x and y do not fit the kernel");
  if (static_cast<int64_t>(values.element_count()) != state->conv->nnz()) {
    return Invalid("the pattern keeps " + std::to_string(state->conv->nnz()) + " weights, values holds " +
                   std::to_string(values.element_count()));
  }
  if (rest.size() != static_cast<size_t>(state->has_bias) + static_cast<size_t>(state->has_residual)) {
    return Invalid("wrong number of operands");
  }
  Buffers buffers = {x.typed_data(), values.typed_data(), nullptr, nullptr, y->typed_data()};
  if (state->has_bias) {
    const auto bias = rest.get<ffi::BufferR1<ffi::F32>>(0);
    if (!bias.has_value()) return bias.error();
    if (static_cast<int64_t>(bias->element_count()) != s.oc) return Invalid("bias does not fit the kernel");
    buffers.bias = bias->typed_data();
  }
  if (state->has_residual) {
    const auto residual = rest.get<ffi::BufferR4<ffi::F32>>(state->has_bias ? 1 : 0);
    if (!residual.has_value()) return residual.error();
    if (!std::equal(out.begin(), out.end(), residual->dimensions().begin())) return Invalid("residual does not fit y");
    buffers.residual = residual->typed_data();
  }
  PoolExecutor<ffi::ThreadPool> executor(pool);
  try {
    if (buffers.bias == nullptr) {
      std::call_once(state->once, [&] { state->zeros.resize(static_cast<size_t>(s.oc)); });
      buffers.bias = state->zeros.data();
    }
    const std::string error = state->conv->Run(in[0], in[1], in[2], out[1], out[2], buffers, state->activation, executor);
    return error.empty() ? ffi::Error::Success() : Invalid(error);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("sparse_conv: ") + error.what());
  }
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate()
                           .Attr<ffi::Span<const uint8_t>>("gaps")
                           .Attr<ffi::Span<const int64_t>>("layout")
                           .Attr<ffi::Span<const int64_t>>("window")
                           .Attr<ffi::Span<const int64_t>>("epilogue")
                           .Attr<std::string_view>("kernel"));
XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<State>>()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::BufferR4<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .RemainingArgs()
                           .Ret<ffi::BufferR4<ffi::F32>>());

}  // namespace

// The state's type is registered here, in the metadata call that every registration begins with: jaxlib flushes queued
// handlers before queued types, so registering it from Python would refuse the whole CPU backend.
XLA_FFI_Error* ConvInstantiate(XLA_FFI_CallFrame* frame) {
  static std::mutex mutex;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (State::id.type_id == 0) {
      if (XLA_FFI_Error* error = ffi::Ffi::RegisterTypeId(frame->api, "sparseflax.Conv", &State::id, &kStateInfo)) return error;
    }
  }
  return kInstantiate(frame);
}

XLA_FFI_Error* ConvExecute(XLA_FFI_CallFrame* frame) { return kExecute(frame); }

}  // namespace sparseflax
