// The border to XLA of a whole program: the images, then what all of them share; results like the images.
#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "pool_executor.h"
#include "program.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace sparseflax {
namespace {

struct ProgramState {
  static ffi::TypeId id;
  std::unique_ptr<Program> program;
};
ffi::TypeId ProgramState::id = {};
const auto kProgramInfo = ffi::MakeTypeInfo<ProgramState>();

ffi::Error Invalid(const std::string& what) { return ffi::Error::InvalidArgument("network program: " + what); }

ffi::ErrorOr<std::unique_ptr<ProgramState>> Instantiate(ffi::Span<const int64_t> words, ffi::Span<const float> numbers,
                                                        ffi::Span<const uint8_t> gaps, std::string_view kernel) {
  const Isa* isa = nullptr;
  for (const Isa* candidate : Isas()) {
    if (candidate->name == kernel) isa = candidate;
  }
  if (isa == nullptr && !kernel.empty()) return ffi::Unexpected(Invalid("kernel '" + std::string(kernel) + "' does not run on this machine"));
  auto state = std::make_unique<ProgramState>();
  std::string error;
  state->program = Program::Make(words.begin(), static_cast<int64_t>(words.size()), numbers.begin(), static_cast<int64_t>(numbers.size()),
                                 gaps.begin(), static_cast<int64_t>(gaps.size()), isa, &error);
  if (!error.empty()) return ffi::Unexpected(Invalid(error));
  return state;
}

// The floats of a buffer if it holds `size` of them for each of n images.
template <typename Buffer>
bool Holds(const Buffer& buffer, int64_t n, int64_t size) {
  const auto dimensions = buffer.dimensions();
  return dimensions.size() > 0 && dimensions[0] == n && static_cast<int64_t>(buffer.element_count()) == n * size;
}

ffi::Error Execute(ProgramState* state, ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Program& program = *state->program;
  const size_t images = program.input_sizes.size(), all = images + program.shared_sizes.size();
  if (args.size() != all || rets.size() != program.output_sizes.size()) return Invalid("wrong number of operands");
  std::vector<const float*> inputs, shared;
  std::vector<float*> outputs;
  int64_t n = -1;
  for (size_t i = 0; i < all; ++i) {
    const auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    if (buffer->element_type() != ffi::F32) return Invalid("an operand is not float32");
    if (i == 0) n = buffer->dimensions().size() > 0 ? buffer->dimensions()[0] : -1;
    const bool fits = i < images ? Holds(*buffer, n, program.input_sizes[i])
                                 : static_cast<int64_t>(buffer->element_count()) == program.shared_sizes[i - images];
    if (!fits) return Invalid("operand " + std::to_string(i) + " does not fit");
    (i < images ? inputs : shared).push_back(static_cast<const float*>(buffer->untyped_data()));
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    auto buffer = rets.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    if ((*buffer)->element_type() != ffi::F32 || !Holds(**buffer, n, program.output_sizes[i])) {
      return Invalid("result " + std::to_string(i) + " does not fit");
    }
    outputs.push_back(static_cast<float*>((*buffer)->untyped_data()));
  }
  PoolExecutor<ffi::ThreadPool> executor(pool);
  try {
    const std::string error = program.Run(n, inputs, shared, outputs, executor);
    return error.empty() ? ffi::Error::Success() : Invalid(error);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "network program: out of memory; run fewer images at a time");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("network program: ") + error.what());
  }
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate()
                           .Attr<ffi::Span<const int64_t>>("words")
                           .Attr<ffi::Span<const float>>("numbers")
                           .Attr<ffi::Span<const uint8_t>>("gaps")
                           .Attr<std::string_view>("kernel"));
XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind().Ctx<ffi::State<ProgramState>>().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets());

}  // namespace

// The state's type is registered here, as in handler.cc.
XLA_FFI_Error* ProgramInstantiate(XLA_FFI_CallFrame* frame) {
  static std::mutex mutex;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (ProgramState::id.type_id == 0) {
      if (XLA_FFI_Error* error = ffi::Ffi::RegisterTypeId(frame->api, "sparseflax.Program", &ProgramState::id, &kProgramInfo)) return error;
    }
  }
  return kInstantiate(frame);
}

XLA_FFI_Error* ProgramExecute(XLA_FFI_CallFrame* frame) { return kExecute(frame); }

}  // namespace sparseflax
