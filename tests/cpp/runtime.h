// A runtime of a few lines for the handler: call frames of any attributes and operands, so that all code that runs between XLA
// and the kernel is seen by the sanitizers.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "pool.h"
#include "problem.h"
#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  std::string message;
};

// What a call site has: the state of its handler, and the pool that all share.
struct XLA_FFI_ExecutionContext {
  Pool* pool;
  void* state = nullptr;
  void (*deleter)(void*) = nullptr;
  ~XLA_FFI_ExecutionContext() {
    if (state != nullptr) deleter(state);
  }
};

namespace sparseflax {
XLA_FFI_Error* ConvInstantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* ConvExecute(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* ProgramInstantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* ProgramExecute(XLA_FFI_CallFrame* frame);
}  // namespace sparseflax

using Stage = XLA_FFI_Error* (*)(XLA_FFI_CallFrame*);

[[noreturn]] inline void Fail(const std::string& what) {
  std::fprintf(stderr, "FAILED %s\n", what.c_str());
  std::exit(1);
}

inline void (*registered_deleter)(void*) = nullptr;

inline const XLA_FFI_Api* Api() {
  static const XLA_FFI_Api api = [] {
    XLA_FFI_Api a = {};
    a.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    a.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    a.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->message}; };
    a.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) { args->message = args->error->message.c_str(); };
    a.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
    a.XLA_FFI_Type_Register = [](XLA_FFI_Type_Register_Args* args) -> XLA_FFI_Error* {
      args->type_id->type_id = 1;
      registered_deleter = args->type_info->deleter;
      return nullptr;
    };
    a.XLA_FFI_State_Set = [](XLA_FFI_State_Set_Args* args) -> XLA_FFI_Error* {
      args->ctx->state = args->state;
      args->ctx->deleter = registered_deleter;
      return nullptr;
    };
    a.XLA_FFI_State_Get = [](XLA_FFI_State_Get_Args* args) -> XLA_FFI_Error* {
      args->state = args->ctx->state;
      return args->state != nullptr ? nullptr : new XLA_FFI_Error{"no state"};
    };
    a.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
      args->ctx->pool->Schedule([task = args->task, data = args->data] { task(data); });
      return nullptr;
    };
    a.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
      *args->num_threads = args->ctx->pool->num_threads();
      return nullptr;
    };
    return a;
  }();
  return &api;
}

inline XLA_FFI_CallFrame Frame(XLA_FFI_ExecutionContext* context, XLA_FFI_ExecutionStage stage) {
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = Api();
  frame.ctx = context;
  frame.stage = stage;
  frame.args.struct_size = XLA_FFI_Args_STRUCT_SIZE;
  frame.rets.struct_size = XLA_FFI_Rets_STRUCT_SIZE;
  frame.attrs.struct_size = XLA_FFI_Attrs_STRUCT_SIZE;
  return frame;
}

inline std::string Message(XLA_FFI_Error* error) {
  const std::unique_ptr<XLA_FFI_Error> owned(error);
  return owned == nullptr ? "" : owned->message;
}

// As XLA does at the handler's registration; without it nothing has a type. One handler in each test.
inline void Register(Stage instantiate = sparseflax::ConvInstantiate) {
  XLA_FFI_Metadata metadata = {};
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  XLA_FFI_Metadata_Extension extension = {
      {XLA_FFI_Metadata_Extension_STRUCT_SIZE, XLA_FFI_Extension_Metadata, nullptr}, &metadata};
  XLA_FFI_CallFrame query = Frame(nullptr, XLA_FFI_ExecutionStage_INSTANTIATE);
  query.extension_start = &extension.extension_base;
  if (const std::string error = Message(instantiate(&query)); !error.empty()) Fail(error);
  if (metadata.state_type_id.type_id != 1) Fail("the state's type was not registered by the metadata call");
}

// What sparseflax/conv/primitive.py gives to a call site.
struct Attributes {
  std::vector<int64_t> epilogue;
  std::vector<uint8_t> gaps;
  std::string kernel;
  std::vector<int64_t> layout, window;
};

inline Attributes AttributesOf(const Problem& p) {
  const Shape& s = p.shape;
  return {{p.activation, 1, !p.residual.empty()}, p.gaps, "", {s.kh, s.kw, s.icg, s.oc, s.groups, s.block},
          {s.sh, s.sw, s.top, s.bottom, s.left, s.right, s.dh, s.dw}};
}

// An array, or a string whose type is not looked at.
struct Attribute {
  std::string name;
  XLA_FFI_AttrType kind;
  XLA_FFI_Array array;
};
inline Attribute Of(const char* name, std::vector<int64_t>& v) { return {name, XLA_FFI_AttrType_ARRAY, {XLA_FFI_DataType_S64, v.size(), v.data()}}; }
inline Attribute Of(const char* name, std::vector<float>& v) { return {name, XLA_FFI_AttrType_ARRAY, {XLA_FFI_DataType_F32, v.size(), v.data()}}; }
inline Attribute Of(const char* name, std::vector<uint8_t>& v) { return {name, XLA_FFI_AttrType_ARRAY, {XLA_FFI_DataType_U8, v.size(), v.data()}}; }
inline Attribute Of(const char* name, std::string& v) { return {name, XLA_FFI_AttrType_STRING, {XLA_FFI_DataType_U8, v.size(), v.data()}}; }

// Attributes sorted by their names.
inline std::string Instantiate(XLA_FFI_ExecutionContext* context, Stage instantiate, std::vector<Attribute> attributes) {
  std::vector<XLA_FFI_ByteSpan> names, strings;
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  std::vector<XLA_FFI_AttrType> kinds;
  std::vector<void*> values;
  names.reserve(attributes.size()), strings.reserve(attributes.size());  // pointed into
  for (Attribute& each : attributes) {
    names.push_back({each.name.data(), each.name.size()});
    name_pointers.push_back(&names.back());
    kinds.push_back(each.kind);
    strings.push_back({static_cast<const char*>(each.array.data), each.array.size});
    values.push_back(each.kind == XLA_FFI_AttrType_STRING ? static_cast<void*>(&strings.back()) : &each.array);
  }
  XLA_FFI_CallFrame frame = Frame(context, XLA_FFI_ExecutionStage_INSTANTIATE);
  frame.attrs.size = static_cast<int64_t>(attributes.size());
  frame.attrs.types = kinds.data();
  frame.attrs.names = name_pointers.data();
  frame.attrs.attrs = values.data();
  return Message(instantiate(&frame));
}

inline std::string Instantiate(XLA_FFI_ExecutionContext* context, Attributes a) {
  return Instantiate(context, sparseflax::ConvInstantiate,
                     {Of("epilogue", a.epilogue), Of("gaps", a.gaps), Of("kernel", a.kernel), Of("layout", a.layout), Of("window", a.window)});
}

// An operand or a result; `data` has as many elements as `dims` says.
struct Operand {
  std::vector<int64_t> dims;
  void* data;
  XLA_FFI_DataType type = XLA_FFI_DataType_F32;
};

inline std::string Execute(XLA_FFI_ExecutionContext* context, Stage execute, std::vector<Operand> operands, std::vector<Operand> results) {
  std::vector<XLA_FFI_Buffer> buffers;
  std::vector<void*> pointers;
  buffers.reserve(operands.size() + results.size());  // pointed into
  for (std::vector<Operand>* each : {&operands, &results}) {
    for (Operand& o : *each) {
      buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, o.type, o.data, static_cast<int64_t>(o.dims.size()), o.dims.data()});
      pointers.push_back(&buffers.back());
    }
  }
  std::vector<XLA_FFI_ArgType> arg_types(operands.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(results.size(), XLA_FFI_RetType_BUFFER);
  XLA_FFI_CallFrame frame = Frame(context, XLA_FFI_ExecutionStage_EXECUTE);
  frame.args.size = static_cast<int64_t>(operands.size());
  frame.args.types = arg_types.data();
  frame.args.args = pointers.data();
  frame.rets.size = static_cast<int64_t>(results.size());
  frame.rets.types = ret_types.data();
  frame.rets.rets = pointers.data() + operands.size();
  return Message(execute(&frame));
}

// A problem's own operands.
inline std::string Execute(XLA_FFI_ExecutionContext* context, const Problem& p, std::vector<float>& y, int64_t values) {
  const Shape& s = p.shape;
  const auto data = [](const std::vector<float>& v) { return const_cast<float*>(v.data()); };
  std::vector<Operand> operands = {{{s.n, s.ih, s.iw, s.ic()}, data(p.x)}, {{values}, data(p.values)}, {{s.oc}, data(p.bias)}};
  if (!p.residual.empty()) operands.push_back({{s.n, s.oh, s.ow, s.oc}, data(p.residual)});
  return Execute(context, sparseflax::ConvExecute, operands, {{{s.n, s.oh, s.ow, s.oc}, y.data()}});
}
