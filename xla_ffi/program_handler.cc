// The border to XLA of a whole program: the images, then arrays that hold what all of them share; results like the images.
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

// Where a shared operand lies: elements of an array from `first` on; all of the array, if that is -1.
struct Part {
  size_t array;
  int64_t first;
};

struct ProgramState {
  static ffi::TypeId id;
  std::unique_ptr<Program> program;
  std::vector<Part> parts;  // one for each shared operand
  size_t arrays = 0;        // that there are for these
};
ffi::TypeId ProgramState::id = {};
const auto kProgramInfo = ffi::MakeTypeInfo<ProgramState>();

ffi::Error Invalid(const std::string& what) { return ffi::Error::InvalidArgument("network program: " + what); }

ffi::ErrorOr<std::unique_ptr<ProgramState>> Instantiate(ffi::Span<const int64_t> words, ffi::Span<const float> numbers,
                                                        ffi::Span<const uint8_t> gaps, ffi::Span<const int64_t> parts,
                                                        std::string_view kernel, std::string_view int8) {
  const Isa* isas[2] = {};
  for (const Element element : {Element::kFloat32, Element::kInt8}) {
    const std::string_view name = element == Element::kInt8 ? int8 : kernel;
    const Isa*& isa = isas[element == Element::kInt8];
    for (const Isa* candidate : Isas(element)) {
      if (candidate->name == name) isa = candidate;
    }
    if (isa == nullptr && !name.empty()) return ffi::Unexpected(Invalid("kernel '" + std::string(name) + "' does not run on this machine"));
  }
  auto state = std::make_unique<ProgramState>();
  std::string error;
  state->program = Program::Make(words.begin(), static_cast<int64_t>(words.size()), numbers.begin(), static_cast<int64_t>(numbers.size()),
                                 gaps.begin(), static_cast<int64_t>(gaps.size()), isas[0], isas[1], &error);
  if (!error.empty()) return ffi::Unexpected(Invalid(error));
  const size_t operands = state->program->shared.size();
  if (parts.size() != 2 * operands) return ffi::Unexpected(Invalid("an operand lies nowhere"));
  for (size_t i = 0; i < operands; ++i) {
    const int64_t array = parts[2 * i], first = parts[2 * i + 1];
    if (array < 0 || array >= static_cast<int64_t>(operands) || first < -1) return ffi::Unexpected(Invalid("an operand lies in no array"));
    state->parts.push_back({static_cast<size_t>(array), first});
    state->arrays = std::max(state->arrays, static_cast<size_t>(array) + 1);
  }
  return state;
}

ffi::DataType TypeOf(Type type) { return type == Type::kFloat32 ? ffi::F32 : type == Type::kUint8 ? ffi::U8 : ffi::S32; }

// Whether a buffer holds that for each of n images.
template <typename Buffer>
bool Holds(const Buffer& buffer, int64_t n, const Sized& sized) {
  const auto dimensions = buffer.dimensions();
  return buffer.element_type() == TypeOf(sized.type) && dimensions.size() > 0 && dimensions[0] == n &&
         static_cast<int64_t>(buffer.element_count()) == n * sized.size;
}

ffi::Error Execute(ProgramState* state, ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Program& program = *state->program;
  const size_t images = program.inputs.size();
  if (args.size() != images + state->arrays || rets.size() != program.outputs.size()) return Invalid("wrong number of operands");
  std::vector<const void*> inputs, shared;
  std::vector<void*> outputs;
  std::vector<ffi::AnyBuffer> arrays;
  int64_t n = -1;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    if (i == 0) n = buffer->dimensions().size() > 0 ? buffer->dimensions()[0] : -1;
    if (i < images && !Holds(*buffer, n, program.inputs[i])) return Invalid("operand " + std::to_string(i) + " does not fit");
    if (reinterpret_cast<uintptr_t>(buffer->untyped_data()) % 4 != 0) return Invalid("an operand is not aligned to words of four bytes");
    if (i < images) inputs.push_back(buffer->untyped_data());
    else arrays.push_back(*buffer);
  }
  for (size_t i = 0; i < program.shared.size(); ++i) {
    const Sized& wanted = program.shared[i];
    const auto [array, first] = state->parts[i];
    const int64_t count = static_cast<int64_t>(arrays[array].element_count());
    const bool fits = first < 0 ? count == wanted.size : wanted.size <= count && first <= count - wanted.size;
    if (arrays[array].element_type() != TypeOf(wanted.type) || !fits) return Invalid("operand " + std::to_string(images + array) + " does not fit");
    shared.push_back(static_cast<const char*>(arrays[array].untyped_data()) + std::max<int64_t>(first, 0) * 4);
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    auto buffer = rets.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    if (!Holds(**buffer, n, program.outputs[i])) return Invalid("result " + std::to_string(i) + " does not fit");
    outputs.push_back((*buffer)->untyped_data());
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
                           .Attr<ffi::Span<const int64_t>>("parts")
                           .Attr<std::string_view>("kernel")
                           .Attr<std::string_view>("int8"));
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
