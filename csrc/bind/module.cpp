// The native module: one register line per op, and what this build contains.
#include <pybind11/pybind11.h>

#include "common/cpu_info.h"

#if REPKERN_WITH_CUDA && !REPKERN_SIMT
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace repkern {

void register_branch_norm_add(py::module_& m);
void register_compose_sequential(py::module_& m);
void register_direct_conv2d(py::module_& m);
void register_grad_mult_adamw(py::module_& m);
void register_grad_mult_sgd(py::module_& m);
void register_orepa_squeeze(py::module_& m);
void register_winograd_conv2d(py::module_& m);

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["isa_found"] = isa_name(isa_found());
  info["isa_used"] = isa_name(isa_used());
#if REPKERN_WITH_CUDA && !REPKERN_SIMT
  info["cuda"] = CUDART_VERSION / 1000 * 1.0 + CUDART_VERSION % 1000 / 10 * 0.1;
  info["cuda_archs"] = REPKERN_CUDA_ARCHS_BUILT;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = "";
#endif
#if defined(__SANITIZE_ADDRESS__)
  info["sanitized"] = true;
#else
  info["sanitized"] = false;
#endif
  return info;
}

void set_isa_by_name(const std::string& name) {
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (name != isa_name(isa)) continue;
    const char* problem = set_isa(isa);
    if (problem != nullptr) throw py::value_error("isa '" + name + "': " + problem);
    return;
  }
  throw py::value_error("isa must be scalar, avx2, avx512 or amx, got '" + name + "'");
}

}  // namespace
}  // namespace repkern

PYBIND11_MODULE(REPKERN_MODULE_NAME, m) {
  m.doc() = "Native kernels of repkern. Private: use repkern.ops.";
  m.def("build_info", &repkern::build_info);
  m.def("set_isa", &repkern::set_isa_by_name, py::arg("name"));
  repkern::register_branch_norm_add(m);
  repkern::register_compose_sequential(m);
  repkern::register_direct_conv2d(m);
  repkern::register_grad_mult_adamw(m);
  repkern::register_grad_mult_sgd(m);
  repkern::register_orepa_squeeze(m);
  repkern::register_winograd_conv2d(m);
}
