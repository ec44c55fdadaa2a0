#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/pointer.h"
#include "direct_conv2d/direct_conv2d.h"

namespace py = pybind11;

namespace repkern {
namespace {

constexpr const char* kOp = "direct_conv2d";
using Fields = std::vector<int64_t>;

// The field order is that of DirectParams; repkern/ops/direct_conv2d/native.py writes it.
[[maybe_unused]] DirectParams read_params(const Fields& fields) {
  FieldReader in(fields, kOp);
  DirectParams p;
  for (int64_t* value : {&p.n, &p.c, &p.h, &p.w, &p.k, &p.kh, &p.kw, &p.sh, &p.sw, &p.ph, &p.pw, &p.dh, &p.dw,
                         &p.groups, &p.channels_last, &p.activation, &p.split})
    *value = in.integer();
  p.dtype = DType(in.integer());
  p.x = in.pointer();
  p.packed = in.pointer();
  p.bias = in.pointer();
  p.residual = in.pointer();
  p.out = in.pointer();
  return p;
}

}  // namespace

void register_direct_conv2d([[maybe_unused]] py::module_& m) {
#if REPKERN_WITH_CPU
  m.def("direct_conv2d_splits_cpu", &direct_conv2d_splits_cpu);
  m.def("direct_conv2d_packed_cpu_workspace", [](const Fields& params, int threads) {
    return direct_conv2d_packed_cpu_workspace(read_params(params), threads);
  });
  m.def(
      "direct_conv2d_packed_cpu",
      [](const Fields& params, int64_t workspace, int threads) {
        throw_unless_ok(direct_conv2d_packed_cpu(read_params(params), as_pointer(workspace), threads), kOp);
      },
      py::call_guard<py::gil_scoped_release>());
#endif
}

}  // namespace repkern
