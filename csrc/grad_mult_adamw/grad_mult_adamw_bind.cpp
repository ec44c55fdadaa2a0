#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/grad_mult_table.h"
#include "grad_mult_adamw/grad_mult_adamw.h"

namespace py = pybind11;

namespace repkern {
namespace {

constexpr const char* kOp = "grad_mult_adamw_";

// `flags`: amsgrad, maximize, decoupled, multiply_update.
AdamwParams read_params(double beta1, double beta2, double eps, const std::vector<int64_t>& flags) {
  FieldReader in(flags, kOp);
  AdamwParams p{beta1, beta2, eps, false, false, false, false};
  for (bool* flag : {&p.amsgrad, &p.maximize, &p.decoupled, &p.multiply_update}) *flag = in.integer() != 0;
  return p;
}

}  // namespace

void register_grad_mult_adamw(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
#if REPKERN_WITH_CPU
  m.def(
      "grad_mult_adamw_cpu",
      [](const std::vector<int64_t>& table, double beta1, double beta2, double eps, const std::vector<int64_t>& flags,
         int threads) {
        const AdamwParams params = read_params(beta1, beta2, eps, flags);
        throw_unless_ok(grad_mult_adamw_cpu(read_grad_mult_table(table, kOp), params, threads), kOp);
      },
      Release());
#endif
#if REPKERN_WITH_CUDA
  m.def(
      "grad_mult_adamw_cuda",
      [](const std::vector<int64_t>& table, double beta1, double beta2, double eps, const std::vector<int64_t>& flags,
         int dtype, int64_t arrived, int64_t stream) {
        const AdamwParams params = read_params(beta1, beta2, eps, flags);
        throw_unless_ok(grad_mult_adamw_cuda(read_grad_mult_table(table, kOp), params, DType(dtype),
                                             static_cast<unsigned*>(as_pointer(arrived)), as_pointer(stream)),
                        kOp);
      },
      Release());
#endif
  (void)sizeof(Release);
}

}  // namespace repkern
