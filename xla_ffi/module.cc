// The Python module: handler capsules, the FFI version it was built for, the kernel table and the tile choice.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "sparse_conv.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace sparseflax {
XLA_FFI_Error* ConvInstantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* ConvExecute(XLA_FFI_CallFrame* frame);
}  // namespace sparseflax

NB_MODULE(_native, m) {
  using namespace sparseflax;
  m.def("api_version", [] { return std::pair<int, int>(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  m.def("conv_instantiate", [] { return nb::capsule(reinterpret_cast<void*>(ConvInstantiate)); });
  m.def("conv_execute", [] { return nb::capsule(reinterpret_cast<void*>(ConvExecute)); });
  m.def("kernels", [] {
    std::vector<std::string> names;
    for (const Isa* isa : Isas()) names.emplace_back(isa->name);
    return names;
  });
  m.def("fma_gflops", [](const std::string& isa) {
    for (const Isa* each : Isas()) {
      if (each->name == isa) return each->peak_flops() / 1e9;
    }
    throw nb::value_error("unknown kernel name");
  }, nb::arg("isa"), "GFLOP/s of FMAs in registers, one thread, measured now.");
}
