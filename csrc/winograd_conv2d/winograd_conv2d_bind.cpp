#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/pointer.h"
#include "winograd_conv2d/winograd_conv2d.h"

namespace py = pybind11;

namespace repkern {
namespace {

constexpr const char* kOp = "winograd_conv2d";
using Fields = std::vector<int64_t>;

// The field order is that of WinogradParams; repkern/ops/winograd_conv2d/native.py writes it.
WinogradParams read_params(const Fields& fields) {
  FieldReader in(fields, kOp);
  WinogradParams p;
  for (int64_t* value : {&p.n, &p.c, &p.h, &p.w, &p.k, &p.groups, &p.padding, &p.stride, &p.tile, &p.points,
                         &p.channels_last, &p.activation})
    *value = in.integer();
  p.dtype = DType(in.integer());
  p.x = in.pointer();
  p.packed = in.pointer();
  p.bias = in.pointer();
  p.residual = in.pointer();
  p.out = in.pointer();
  return p;
}

// The field order is that of WinogradWeight.
WinogradWeight read_weight(const Fields& fields) {
  FieldReader in(fields, kOp);
  WinogradWeight w;
  for (int64_t* value : {&w.k, &w.c, &w.groups, &w.tile}) *value = in.integer();
  w.dtype = DType(in.integer());
  w.weight = in.pointer();
  w.packed = in.pointer();
  return w;
}

}  // namespace

void register_winograd_conv2d(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
#if REPKERN_WITH_CPU
  m.def("winograd_conv2d_packed_cpu_workspace", [](const Fields& params, int threads) {
    return winograd_conv2d_packed_cpu_workspace(read_params(params), threads);
  });
  m.def(
      "winograd_conv2d_packed_cpu",
      [](const Fields& params, int64_t workspace, int threads) {
        throw_unless_ok(winograd_conv2d_packed_cpu(read_params(params), as_pointer(workspace), threads), kOp);
      },
      Release());
  m.def(
      "winograd_transform_weight_cpu",
      [](const Fields& weight, int threads) {
        throw_unless_ok(winograd_transform_weight_cpu(read_weight(weight), threads), kOp);
      },
      Release());
#endif
#if REPKERN_WITH_CUDA
  m.def("winograd_conv2d_packed_cuda_workspace", [](const Fields& params, int math) {
    return winograd_conv2d_packed_cuda_workspace(read_params(params), math);
  });
  m.def(
      "winograd_conv2d_packed_cuda",
      [](const Fields& params, int math, int64_t workspace, int64_t stream) {
        throw_unless_ok(
            winograd_conv2d_packed_cuda(read_params(params), math, as_pointer(workspace), as_pointer(stream)), kOp);
      },
      Release());
  m.def(
      "winograd_transform_weight_cuda",
      [](const Fields& weight, int64_t stream) {
        throw_unless_ok(winograd_transform_weight_cuda(read_weight(weight), as_pointer(stream)), kOp);
      },
      Release());
#endif
  (void)sizeof(Release);
}

}  // namespace repkern
