#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/pointer.h"
#include "orepa_squeeze/orepa_squeeze.h"

namespace py = pybind11;

namespace repkern {
namespace {

constexpr const char* kOp = "orepa_squeeze";
using Fields = std::vector<int64_t>;

// The field order is that of SqueezeLayer; repkern/ops/orepa_squeeze/native.py writes it.
std::vector<SqueezeLayer> read_layers(const Fields& fields) {
  FieldReader in(fields, kOp);
  std::vector<SqueezeLayer> layers;
  while (!in.done()) {
    SqueezeLayer layer;
    for (int64_t* value :
         {&layer.co, &layer.ci, &layer.cm, &layer.groups, &layer.k, &layer.expansion, &layer.identity_reduce})
      *value = in.integer();
    for (const void** value : {&layer.origin, &layer.avg, &layer.prior, &layer.pointwise, &layer.reduce, &layer.expand,
                               &layer.depthwise, &layer.project})
      *value = in.pointer();
    for (const void*& row : layer.scale) row = in.pointer();
    layer.prior_filter = in.pointer();
    layers.push_back(layer);
  }
  return layers;
}

std::vector<SqueezeGrads> read_grads(const Fields& fields) {
  FieldReader in(fields, kOp);
  std::vector<SqueezeGrads> grads;
  while (!in.done()) {
    SqueezeGrads g;
    g.grad_out = in.pointer();
    for (void** value : {&g.origin, &g.avg, &g.prior, &g.pointwise, &g.reduce, &g.expand, &g.depthwise, &g.project})
      *value = in.pointer();
    for (void*& row : g.scale) row = in.pointer();
    grads.push_back(g);
  }
  return grads;
}

std::vector<void*> read_pointers(const Fields& fields) {
  std::vector<void*> pointers;
  for (int64_t address : fields) pointers.push_back(as_pointer(address));
  return pointers;
}

void expect_count(size_t layers, size_t other) {
  if (layers != other) throw std::invalid_argument("orepa_squeeze: one output or gradient entry per layer is needed");
}

int count_of(const std::vector<SqueezeLayer>& layers) { return static_cast<int>(layers.size()); }

}  // namespace

void register_orepa_squeeze(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
#if REPKERN_WITH_CPU
  m.def("orepa_squeeze_forward_cpu_workspace", [](const Fields& layers, int dtype, int threads) {
    const auto in = read_layers(layers);
    return orepa_squeeze_forward_cpu_workspace(in.data(), count_of(in), DType(dtype), threads);
  });
  m.def(
      "orepa_squeeze_forward_cpu",
      [](const Fields& layers, const Fields& out, int dtype, int out_dtype, bool channels_last, int64_t workspace,
         int threads) {
        const auto in = read_layers(layers);
        const auto to = read_pointers(out);
        expect_count(in.size(), to.size());
        throw_unless_ok(orepa_squeeze_forward_cpu(in.data(), to.data(), count_of(in), DType(dtype), DType(out_dtype),
                                                  channels_last, as_pointer(workspace), threads),
                        kOp);
      },
      Release());
  m.def("orepa_squeeze_backward_cpu_workspace", [](const Fields& layers, int dtype, int threads) {
    const auto in = read_layers(layers);
    return orepa_squeeze_backward_cpu_workspace(in.data(), count_of(in), DType(dtype), threads);
  });
  m.def(
      "orepa_squeeze_backward_cpu",
      [](const Fields& layers, const Fields& grads, int dtype, int64_t workspace, int threads) {
        const auto in = read_layers(layers);
        const auto to = read_grads(grads);
        expect_count(in.size(), to.size());
        throw_unless_ok(orepa_squeeze_backward_cpu(in.data(), to.data(), count_of(in), DType(dtype),
                                                   as_pointer(workspace), threads),
                        kOp);
      },
      Release());
#endif
#if REPKERN_WITH_CUDA
  m.def("orepa_squeeze_forward_cuda_workspace", [](const Fields& layers, int dtype) {
    const auto in = read_layers(layers);
    return orepa_squeeze_forward_cuda_workspace(in.data(), count_of(in), DType(dtype));
  });
  m.def(
      "orepa_squeeze_forward_cuda",
      [](const Fields& layers, const Fields& out, int dtype, int out_dtype, bool channels_last, int math,
         int64_t workspace, int64_t stream) {
        const auto in = read_layers(layers);
        const auto to = read_pointers(out);
        expect_count(in.size(), to.size());
        throw_unless_ok(orepa_squeeze_forward_cuda(in.data(), to.data(), count_of(in), DType(dtype), DType(out_dtype),
                                                   channels_last, math, as_pointer(workspace), as_pointer(stream)),
                        kOp);
      },
      Release());
  m.def("orepa_squeeze_backward_cuda_workspace", [](const Fields& layers, int dtype) {
    const auto in = read_layers(layers);
    return orepa_squeeze_backward_cuda_workspace(in.data(), count_of(in), DType(dtype));
  });
  m.def(
      "orepa_squeeze_backward_cuda",
      [](const Fields& layers, const Fields& grads, int dtype, int math, int64_t workspace, int64_t stream) {
        const auto in = read_layers(layers);
        const auto to = read_grads(grads);
        expect_count(in.size(), to.size());
        throw_unless_ok(orepa_squeeze_backward_cuda(in.data(), to.data(), count_of(in), DType(dtype), math,
                                                    as_pointer(workspace), as_pointer(stream)),
                        kOp);
      },
      Release());
#endif
  (void)sizeof(Release);
}

}  // namespace repkern
