// Python module mimnet_fast._host, without torch: facts about this build and this CPU, and the ops
// that serve a trained model.

#include <pybind11/pybind11.h>

#include "cpu/dispatch.h"
#include "ops.h"

namespace py = pybind11;

namespace {

// JSON written by CMake.
constexpr char kBuildInfo[] =
#include "build_info.inc"
    ;

py::object build_info() { return py::module_::import("json").attr("loads")(kBuildInfo); }

py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
  // The builtin takes nothing but a literal.
#define MIMNET_FAST_FEATURE(name) features[name] = static_cast<bool>(__builtin_cpu_supports(name))
  __builtin_cpu_init();
  MIMNET_FAST_FEATURE("avx2");
  MIMNET_FAST_FEATURE("fma");
  MIMNET_FAST_FEATURE("f16c");
  MIMNET_FAST_FEATURE("avx512f");
  MIMNET_FAST_FEATURE("avx512bw");
  MIMNET_FAST_FEATURE("avx512dq");
  MIMNET_FAST_FEATURE("avx512vl");
  MIMNET_FAST_FEATURE("avx512bf16");
  MIMNET_FAST_FEATURE("amx-tile");
  MIMNET_FAST_FEATURE("amx-bf16");
#undef MIMNET_FAST_FEATURE
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about this build and this CPU, and ops on NumPy arrays, without torch.";
  m.def("build_info", &build_info,
        "Version, compiler, flags, and the instruction-set variants with their own flags.");
  m.def("cpu_features", &cpu_features,
        "Instruction sets that matter to the kernels: name -> whether this CPU has it.");
  m.def("isa_name", &mimnet_fast::cpu::isa_name,
        "Variant of the kernels that runs here: \"baseline\", \"avx2\" or \"avx512\".");
  mimnet_fast::host::define_ops(m);
}
