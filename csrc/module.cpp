// levi_fast._build_info: what was built, from what, and what this machine can run. No tensor ops: pybind11 has no
// stable ABI across torch versions, so nothing here touches torch.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <thread>

#include "build_facts.h"
#include "cpu/isa.h"
#include "schemas.h"

namespace py = pybind11;

namespace {

py::list isa_list(bool (*wanted)(levi_fast::Isa)) {
  py::list names;
  for (int i = 0; i < levi_fast::kIsaCount; ++i) {
    const auto isa = static_cast<levi_fast::Isa>(i);
    if (wanted(isa)) {
      names.append(levi_fast::isa_name(isa));
    }
  }
  return names;
}

std::string choose(const std::string& name) {
  levi_fast::Isa chosen;
  std::string error;
  if (!levi_fast::choose_isa(name.c_str(), &chosen, &error)) {
    throw py::value_error(error);
  }
  return levi_fast::isa_name(chosen);
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Facts about the native build of levi_fast, and what this machine's CPU can run.";
  m.attr("compiler") = LEVI_FAST_COMPILER;
  m.attr("flags") = LEVI_FAST_FLAGS;
  m.attr("torch_version") = LEVI_FAST_TORCH_VERSION;        // built against
  m.attr("torch_minimum") = LEVI_FAST_TORCH_MINIMUM;        // oldest stable ABI it can be loaded with
  m.attr("source_digest") = LEVI_FAST_SOURCE_DIGEST;        // of csrc/ and CMakeLists.txt
  py::list schemas;
  for (const char* schema : levi_fast::kSchemas) {
    schemas.append(schema);
  }
  m.attr("schemas") = py::tuple(schemas);
  m.def("isa_compiled", [] { return isa_list(&levi_fast::isa_compiled); },
        "Instruction sets the kernels were compiled for.");
  m.def("isa_supported", [] { return isa_list(&levi_fast::isa_supported); },
        "Those of them that this machine can run.");
  m.def("isa_detected", [] { return levi_fast::isa_name(levi_fast::detect_isa()); },
        "The best of them on this machine.");
  m.def("choose_isa", &choose, py::arg("name") = "auto",
        "The instruction set that a value of LEVI_FAST_CPU_ISA stands for; ValueError where it cannot be used.");
  m.def("hardware_threads", [] { return std::thread::hardware_concurrency(); },
        "Threads the hardware runs at once (what PyTorch uses is torch.get_num_threads()).");
}
