// The Python module: handler capsules, the FFI version it was built for, the kernel table and the tile choice.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <initializer_list>

#include "program.h"
#include "sparse_conv.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace {

// What the kernel would do for a convolution: the counts that a performance model is made of.
nb::dict DescribeSchedule(const std::vector<int64_t>& image, const std::vector<int64_t>& layout, const std::vector<int64_t>& window,
                          int64_t nnz, const std::string& isa, int64_t threads, std::pair<int64_t, int64_t> caches, double fma_cycles) {
  using namespace sparseflax;
  if (image.size() != 5 || layout.size() != 6 || window.size() != 8) {
    throw nb::value_error("wanted image (n, ih, iw, oh, ow), layout (kh, kw, icg, oc, groups, block) and window (sh, sw, top, "
                          "bottom, left, right, dh, dw)");
  }
  Shape s{image[0], image[1], image[2], image[3], image[4], layout[0], layout[1], layout[2], layout[3], layout[4], layout[5],
          window[0], window[1], window[2], window[3], window[4], window[5], window[6], window[7], 0, 0};
  std::string error = s.Check();
  const auto floats = [](std::initializer_list<int64_t> sizes) {
    double product = 1;
    for (const int64_t size : sizes) product *= static_cast<double>(size);
    return product;
  };
  if (std::min({s.n, s.ih, s.iw, s.oh, s.ow}) < 1) error = "an image dimension is empty";
  if (std::max(floats({s.n, s.ih, s.iw, s.ic()}), floats({s.n, s.oh, s.ow, s.oc})) > 0x1p53) error = "the images are too large";
  if (!error.empty()) throw nb::value_error(error.c_str());
  s.x_pixel = s.ic();
  s.y_pixel = s.oc;
  // Of a processor elsewhere: its best instruction set stands for all that it has.
  std::vector<const Isa*> isas;
  for (const Isa* each : isa.empty() ? Isas() : AllIsas()) {
    if (isa.empty() || each->name == isa || (!isas.empty() && !isas[0]->runs_here())) isas.push_back(each);
  }
  if (isas.empty()) throw nb::value_error("unknown kernel name");
  if (threads < 1) throw nb::value_error("threads must be at least 1");
  s = s.Flat();
  Cpu cpu;
  if (caches.first > 0) cpu.l1 = caches.first;
  if (caches.second > 0) cpu.l2 = caches.second;
  cpu.fma_cycles = fma_cycles;
  const Schedule c = ChooseSchedule(s, nnz, isas, cpu);
  if (c.kernel == nullptr) throw nb::value_error("the kernel window is too large for a panel");
  nb::dict d;
  d["isa"] = std::string(c.isa->name);
  d["lanes"] = c.isa->lanes;
  d["fma_cycles"] = c.fma;
  d["tile"] = std::pair<int, int>(c.kernel->y, c.kernel->x);
  d["chains"] = Chains(c.kernel->y * c.kernel->x);
  d["lane_map"] = std::vector<int64_t>{c.bn, c.by, c.bx};
  d["tiles"] = c.tiles();
  d["vectors"] = c.tiles() * c.kernel->y * c.kernel->x;
  d["blocks"] = s.blocks();
  d["packed"] = c.packed;
  d["panel_bytes"] = std::min(s.block, s.icg) * c.slots * c.isa->lanes * 4;
  d["cycles"] = c.cycles;
  const Sharing sharing = c.Share(s.groups, threads);
  d["threads"] = sharing.threads;
  d["work"] = sharing.work;
  d["panels"] = sharing.panels;
  return d;
}

// What becomes of a batch in each step of a program.
nb::list DescribeProgram(const nb::bytes& words, const nb::bytes& numbers, const nb::bytes& gaps, int64_t n, int64_t threads) {
  using namespace sparseflax;
  if (n < 1 || n > kMost || threads < 1 || threads > kMost) throw nb::value_error("n and threads must be at least 1");
  const auto items = [](const nb::bytes& bytes, size_t size) { return static_cast<int64_t>(bytes.size() / size); };
  std::string error;
  const std::unique_ptr<Program> program = Program::Make(
      static_cast<const int64_t*>(words.data()), items(words, 8), static_cast<const float*>(numbers.data()), items(numbers, 4),
      static_cast<const uint8_t*>(gaps.data()), items(gaps, 1), nullptr, nullptr, &error);
  if (!error.empty()) throw nb::value_error(error.c_str());
  nb::list described;
  for (const Program::Described& each : program->Describe(n, threads)) described.append(nb::make_tuple(each.runs, each.first, each.copied));
  return described;
}

}  // namespace

namespace sparseflax {
XLA_FFI_Error* ConvInstantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* ConvExecute(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* Int8ConvInstantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* Int8ConvExecute(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* ProgramInstantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* ProgramExecute(XLA_FFI_CallFrame* frame);
}  // namespace sparseflax

NB_MODULE(_native, m) {
  using namespace sparseflax;
  m.def("api_version", [] { return std::pair<int, int>(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  m.def("conv_instantiate", [] { return nb::capsule(reinterpret_cast<void*>(ConvInstantiate)); });
  m.def("conv_execute", [] { return nb::capsule(reinterpret_cast<void*>(ConvExecute)); });
  m.def("int8_conv_instantiate", [] { return nb::capsule(reinterpret_cast<void*>(Int8ConvInstantiate)); });
  m.def("int8_conv_execute", [] { return nb::capsule(reinterpret_cast<void*>(Int8ConvExecute)); });
  m.def("program_instantiate", [] { return nb::capsule(reinterpret_cast<void*>(ProgramInstantiate)); });
  m.def("program_execute", [] { return nb::capsule(reinterpret_cast<void*>(ProgramExecute)); });
  m.def("kernels", [](bool int8) {
    std::vector<std::string> names;
    for (const Isa* isa : Isas(int8 ? Element::kInt8 : Element::kFloat32)) names.emplace_back(isa->name);
    return names;
  }, nb::arg("int8") = false);
  m.def("tables", [](bool int8) {
    std::vector<std::pair<std::string, double>> tables;
    for (const Isa* isa : AllIsas(int8 ? Element::kInt8 : Element::kFloat32)) tables.emplace_back(isa->name, isa->fma_cycles());
    return tables;
  }, nb::arg("int8") = false, "Instruction sets of this build, best first, whether they run here or not, and cycles of their FMAs.");
  m.def("trace", [](bool on) {
    nb::list traced;
    for (const Program::Traced& each : Program::Trace(on)) traced.append(nb::make_tuple(each.words, each.nanoseconds));
    return traced;
  }, nb::arg("on"), "Starts or ends counting the time of each step of all programs: (words, nanoseconds of each step) of each.");
  m.def("describe", DescribeProgram, nb::arg("words"), nb::arg("numbers"), nb::arg("gaps"), nb::arg("n"), nb::arg("threads"),
        "How a batch goes through each step of a program: (runs that it is shared out in, 0 where nothing is to be done; the step it "
        "runs with; channels copied by a concatenation) of each.");
  m.def("schedule", DescribeSchedule, nb::arg("image"), nb::arg("layout"), nb::arg("window"), nb::arg("nnz"), nb::arg("isa") = "", nb::arg("threads") = 1,
        nb::arg("caches") = std::pair<int64_t, int64_t>(0, 0), nb::arg("fma_cycles") = 0.0,
        "What the kernel would do for a convolution of nnz kept weights: tile, lanes and the counts a performance model needs.");
  m.def("fma_gflops", [](const std::string& isa) {
    for (const Isa* each : Isas()) {
      if (each->name == isa) return each->peak_flops() / 1e9;
    }
    throw nb::value_error("unknown kernel name");
  }, nb::arg("isa"), "GFLOP/s of FMAs in registers, one thread, measured now.");
}
