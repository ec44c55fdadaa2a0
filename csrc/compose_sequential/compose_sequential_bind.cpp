#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/pointer.h"
#include "compose_sequential/compose_sequential.h"

namespace py = pybind11;

namespace repkern {
namespace {

constexpr const char* kOp = "compose_sequential";
using Fields = std::vector<int64_t>;

// The field order is that of ComposeParams; repkern/ops/compose_sequential/native.py writes it.
ComposeParams read_params(const Fields& fields) {
  FieldReader in(fields, kOp);
  ComposeParams p;
  for (int64_t* value : {&p.co, &p.ci, &p.cm, &p.groups, &p.k1, &p.k2}) *value = in.integer();
  p.first = in.pointer();
  p.second = in.pointer();
  return p;
}

}  // namespace

void register_compose_sequential(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
#if REPKERN_WITH_CPU
  m.def("compose_sequential_forward_cpu_workspace", [](const Fields& params, int dtype, int threads) {
    return compose_sequential_forward_cpu_workspace(read_params(params), DType(dtype), threads);
  });
  m.def(
      "compose_sequential_forward_cpu",
      [](const Fields& params, int64_t out, int dtype, int64_t workspace, int threads) {
        throw_unless_ok(compose_sequential_forward_cpu(read_params(params), as_pointer(out), DType(dtype),
                                                       as_pointer(workspace), threads),
                        kOp);
      },
      Release());
  m.def("compose_sequential_backward_cpu_workspace", [](const Fields& params, int dtype, int threads) {
    return compose_sequential_backward_cpu_workspace(read_params(params), DType(dtype), threads);
  });
  m.def(
      "compose_sequential_backward_cpu",
      [](const Fields& params, int64_t grad_out, int64_t grad_first, int64_t grad_second, int dtype, int64_t workspace,
         int threads) {
        throw_unless_ok(
            compose_sequential_backward_cpu(read_params(params), as_pointer(grad_out), as_pointer(grad_first),
                                            as_pointer(grad_second), DType(dtype), as_pointer(workspace), threads),
            kOp);
      },
      Release());
#endif
#if REPKERN_WITH_CUDA
  m.def("compose_sequential_forward_cuda_workspace", [](const Fields& params, int dtype) {
    return compose_sequential_forward_cuda_workspace(read_params(params), DType(dtype));
  });
  m.def(
      "compose_sequential_forward_cuda",
      [](const Fields& params, int64_t out, int dtype, int math, int64_t workspace, int64_t stream) {
        throw_unless_ok(compose_sequential_forward_cuda(read_params(params), as_pointer(out), DType(dtype), math,
                                                        as_pointer(workspace), as_pointer(stream)),
                        kOp);
      },
      Release());
  m.def("compose_sequential_backward_cuda_workspace", [](const Fields& params, int dtype) {
    return compose_sequential_backward_cuda_workspace(read_params(params), DType(dtype));
  });
  m.def(
      "compose_sequential_backward_cuda",
      [](const Fields& params, int64_t grad_out, int64_t grad_first, int64_t grad_second, int dtype, int math,
         int64_t workspace, int64_t stream) {
        throw_unless_ok(compose_sequential_backward_cuda(read_params(params), as_pointer(grad_out),
                                                         as_pointer(grad_first), as_pointer(grad_second), DType(dtype),
                                                         math, as_pointer(workspace), as_pointer(stream)),
                        kOp);
      },
      Release());
#endif
  (void)sizeof(Release);
}

}  // namespace repkern
