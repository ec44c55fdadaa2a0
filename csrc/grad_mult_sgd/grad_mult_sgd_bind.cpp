#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/grad_mult_table.h"
#include "grad_mult_sgd/grad_mult_sgd.h"

namespace py = pybind11;

namespace repkern {

void register_grad_mult_sgd(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  constexpr const char* kOp = "grad_mult_sgd_";
#if REPKERN_WITH_CPU
  m.def(
      "grad_mult_sgd_cpu",
      [](const std::vector<int64_t>& table, double momentum, double dampening, bool nesterov, bool maximize,
         int threads) {
        const SgdParams params{momentum, dampening, nesterov, maximize};
        throw_unless_ok(grad_mult_sgd_cpu(read_grad_mult_table(table, kOp), params, threads), kOp);
      },
      Release());
#endif
#if REPKERN_WITH_CUDA
  m.def(
      "grad_mult_sgd_cuda",
      [](const std::vector<int64_t>& table, double momentum, double dampening, bool nesterov, bool maximize, int dtype,
         int64_t stream) {
        const SgdParams params{momentum, dampening, nesterov, maximize};
        throw_unless_ok(grad_mult_sgd_cuda(read_grad_mult_table(table, kOp), params, DType(dtype), as_pointer(stream)),
                        kOp);
      },
      Release());
#endif
  (void)kOp;
  (void)sizeof(Release);
}

}  // namespace repkern
