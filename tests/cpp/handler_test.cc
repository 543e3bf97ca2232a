// Tests of the border to XLA: the handler's own call frames, from a runtime of a few lines, so that all code that runs between
// XLA and the kernel is seen by the sanitizers. Exits with 1 after the first failure.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
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
}  // namespace sparseflax

namespace {

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "FAILED %s\n", what.c_str());
  std::exit(1);
}

void (*registered_deleter)(void*) = nullptr;

const XLA_FFI_Api* Api() {
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

XLA_FFI_CallFrame Frame(XLA_FFI_ExecutionContext* context, XLA_FFI_ExecutionStage stage) {
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

std::string Message(XLA_FFI_Error* error) {
  const std::unique_ptr<XLA_FFI_Error> owned(error);
  return owned == nullptr ? "" : owned->message;
}

// The attributes that sparseflax/conv.py gives to a call site, sorted by name.
std::string Instantiate(XLA_FFI_ExecutionContext* context, const Problem& p, size_t layout_size = 6) {
  const Shape& s = p.shape;
  std::vector<uint8_t> gaps = p.gaps;
  std::vector<int64_t> layout = {s.kh, s.kw, s.icg, s.oc, s.groups, s.block};
  std::vector<int64_t> window = {s.sh, s.sw, s.top, s.bottom, s.left, s.right, s.dh, s.dw};
  std::vector<int64_t> epilogue = {p.activation, 1, !p.residual.empty()};
  XLA_FFI_Array arrays[] = {{XLA_FFI_DataType_S64, epilogue.size(), epilogue.data()}, {XLA_FFI_DataType_U8, gaps.size(), gaps.data()},
                            {XLA_FFI_DataType_S64, layout_size, layout.data()}, {XLA_FFI_DataType_S64, window.size(), window.data()}};
  XLA_FFI_ByteSpan kernel = {"", 0};
  XLA_FFI_ByteSpan names[] = {{"epilogue", 8}, {"gaps", 4}, {"kernel", 6}, {"layout", 6}, {"window", 6}};
  XLA_FFI_ByteSpan* name_pointers[] = {&names[0], &names[1], &names[2], &names[3], &names[4]};
  XLA_FFI_AttrType types[] = {XLA_FFI_AttrType_ARRAY, XLA_FFI_AttrType_ARRAY, XLA_FFI_AttrType_STRING, XLA_FFI_AttrType_ARRAY,
                              XLA_FFI_AttrType_ARRAY};
  void* values[] = {&arrays[0], &arrays[1], &kernel, &arrays[2], &arrays[3]};
  XLA_FFI_CallFrame frame = Frame(context, XLA_FFI_ExecutionStage_INSTANTIATE);
  frame.attrs.size = 5;
  frame.attrs.types = types;
  frame.attrs.names = name_pointers;
  frame.attrs.attrs = values;
  return Message(sparseflax::ConvInstantiate(&frame));
}

std::string Execute(XLA_FFI_ExecutionContext* context, const Problem& p, std::vector<float>& y, int64_t values) {
  const Shape& s = p.shape;
  int64_t x_dims[] = {s.n, s.ih, s.iw, s.ic()}, y_dims[] = {s.n, s.oh, s.ow, s.oc}, bias_dims[] = {s.oc};
  const auto buffer = [](const std::vector<float>& data, int64_t rank, int64_t* dims) {
    return XLA_FFI_Buffer{XLA_FFI_Buffer_STRUCT_SIZE, nullptr, XLA_FFI_DataType_F32, const_cast<float*>(data.data()), rank, dims};
  };
  XLA_FFI_Buffer buffers[] = {buffer(p.x, 4, x_dims), buffer(p.values, 1, &values), buffer(p.bias, 1, bias_dims),
                              buffer(p.residual, 4, y_dims)};
  XLA_FFI_Buffer out = buffer(y, 4, y_dims);
  XLA_FFI_ArgType arg_types[] = {XLA_FFI_ArgType_BUFFER, XLA_FFI_ArgType_BUFFER, XLA_FFI_ArgType_BUFFER, XLA_FFI_ArgType_BUFFER};
  XLA_FFI_RetType ret_type = XLA_FFI_RetType_BUFFER;
  void* args[] = {&buffers[0], &buffers[1], &buffers[2], &buffers[3]};
  void* ret = &out;
  XLA_FFI_CallFrame frame = Frame(context, XLA_FFI_ExecutionStage_EXECUTE);
  frame.args.size = p.residual.empty() ? 3 : 4;
  frame.args.types = arg_types;
  frame.args.args = args;
  frame.rets.size = 1;
  frame.rets.types = &ret_type;
  frame.rets.rets = &ret;
  return Message(sparseflax::ConvExecute(&frame));
}

void CheckRefused(const std::string& message, const std::string& wanted) {
  if (message.find(wanted) == std::string::npos) Fail("said \"" + message + "\", wanted \"..." + wanted + "...\"");
}

}  // namespace

int main() {
  XLA_FFI_Metadata metadata = {};
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  XLA_FFI_Metadata_Extension extension = {
      {XLA_FFI_Metadata_Extension_STRUCT_SIZE, XLA_FFI_Extension_Metadata, nullptr}, &metadata};
  XLA_FFI_CallFrame query = Frame(nullptr, XLA_FFI_ExecutionStage_INSTANTIATE);
  query.extension_start = &extension.extension_base;
  if (const std::string error = Message(sparseflax::ConvInstantiate(&query)); !error.empty()) Fail(error);
  if (metadata.state_type_id.type_id != 1) Fail("the state's type was not registered by the metadata call");

  Pool pool(3);
  // Two call sites, each executed by four threads at once: the first executions race for the plan.
  const Shape shape = MakeShape(2, 24, 25, 40, 1, 67, 3, 3, 16, 1, 1, 1, 1, 1, 1, 1, 1);
  for (const bool residual : {true, false}) {
    const Problem p = MakeProblem(shape, 0.1, 1, residual, 5);
    XLA_FFI_ExecutionContext site = {&pool};
    if (const std::string error = Instantiate(&site, p); !error.empty()) Fail(error);
    std::vector<std::thread> callers;
    for (int t = 0; t < 4; ++t) {
      callers.emplace_back([&] {
        for (int repeat = 0; repeat < 3; ++repeat) {
          std::vector<float> y(p.y.size());
          const std::string error = Execute(&site, p, y, static_cast<int64_t>(p.values.size()));
          if (!error.empty()) Fail(error);
          for (size_t i = 0; i < y.size(); ++i) {
            if (!(std::abs(y[i] - p.y[i]) <= p.bound[i])) Fail("y[" + std::to_string(i) + "] is " + std::to_string(y[i]));
          }
        }
      });
    }
    for (std::thread& caller : callers) caller.join();

    std::vector<float> y(p.y.size());
    CheckRefused(Execute(&site, p, y, static_cast<int64_t>(p.values.size()) - 1), "weights, values holds");
  }

  Problem p = MakeProblem(shape, 0.1, 1, false, 5);
  {
    XLA_FFI_ExecutionContext site = {&pool};
    CheckRefused(Instantiate(&site, p, 5), "malformed attributes");
    std::vector<float> y(p.y.size());
    CheckRefused(Execute(&site, p, y, static_cast<int64_t>(p.values.size())), "no state");
  }
  p.gaps.insert(p.gaps.end(), 1000, 255);
  p.gaps.push_back(0);
  XLA_FFI_ExecutionContext site = {&pool};
  CheckRefused(Instantiate(&site, p), "points outside its kernel");
  std::puts("ok");
  return 0;
}
