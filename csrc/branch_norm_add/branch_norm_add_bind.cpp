#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/pointer.h"
#include "branch_norm_add/branch_norm_add.h"

namespace py = pybind11;

namespace repkern {
namespace {

constexpr const char* kOp = "branch_norm_add";
using Fields = std::vector<int64_t>;
using Numbers = std::vector<double>;

// The field order is that of NormParams; repkern/ops/branch_norm_add/native.py writes it. `eps`: one a branch.
NormParams read_params(const Fields& fields, const Numbers& eps) {
  FieldReader in(fields, kOp);
  NormParams p{};
  for (int64_t* value : {&p.n, &p.c, &p.p, &p.channels_last, &p.activation}) *value = in.integer();
  p.dtype = DType(in.integer());
  p.param_dtype = DType(in.integer());
  for (; !in.done(); ++p.branches) {
    if (p.branches == kMostNormBranches) throw std::invalid_argument("branch_norm_add: too many branches");
    NormBranch& branch = p.branch[p.branches];
    branch.mode = in.integer();
    for (const void** value : {&branch.y, &branch.weight, &branch.bias}) *value = in.pointer();
    for (void** value : {&branch.mean, &branch.var, &branch.grad}) *value = in.pointer();
  }
  if (p.branches == 0 || eps.size() != static_cast<size_t>(p.branches))
    throw std::invalid_argument("branch_norm_add: one eps a branch is needed");
  for (int64_t b = 0; b < p.branches; ++b) p.branch[b].eps = eps[b];
  return p;
}

NormGrads read_grads(const Fields& fields) {
  FieldReader in(fields, kOp);
  NormGrads g{};
  for (const void** value : {&g.out, &g.sums, &g.count}) *value = in.pointer();
  for (void** value : {&g.as_is, &g.weight, &g.bias}) *value = in.pointer();
  return g;
}

#if REPKERN_WITH_CPU
void register_cpu(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  using Size = size_t (*)(const NormParams&, int);
  const std::pair<const char*, Size> sizes[] = {
      {"branch_norm_add_forward_cpu_workspace", branch_norm_add_forward_cpu_workspace},
      {"branch_norm_add_backward_cpu_workspace", branch_norm_add_backward_cpu_workspace},
      {"branch_norm_sums_cpu_workspace", branch_norm_sums_cpu_workspace},
      {"branch_norm_statistics_cpu_workspace", branch_norm_statistics_cpu_workspace}};
  for (const auto& [name, size] : sizes)
    m.def(name, [size = size](const Fields& fields, const Numbers& eps, int threads) {
      return size(read_params(fields, eps), threads);
    });
  m.def(
      "branch_norm_add_forward_cpu",
      [](const Fields& fields, const Numbers& eps, int64_t out, int64_t workspace, int threads) {
        const auto p = read_params(fields, eps);
        throw_unless_ok(branch_norm_add_forward_cpu(p, as_pointer(out), as_pointer(workspace), threads), kOp);
      },
      Release());
  m.def(
      "branch_norm_add_backward_cpu",
      [](const Fields& fields, const Numbers& eps, const Fields& grads, int64_t workspace, int threads) {
        const auto p = read_params(fields, eps);
        throw_unless_ok(branch_norm_add_backward_cpu(p, read_grads(grads), as_pointer(workspace), threads), kOp);
      },
      Release());
  m.def(
      "branch_norm_sums_cpu",
      [](const Fields& fields, const Numbers& eps, int64_t grad, int64_t sums, int64_t workspace, int threads) {
        const auto p = read_params(fields, eps);
        throw_unless_ok(branch_norm_sums_cpu(p, as_pointer(grad), as_pointer(sums), as_pointer(workspace), threads),
                        kOp);
      },
      Release());
  m.def(
      "branch_norm_statistics_cpu",
      [](const Fields& fields, const Numbers& eps, int64_t workspace, int threads) {
        const auto p = read_params(fields, eps);
        throw_unless_ok(branch_norm_statistics_cpu(p, as_pointer(workspace), threads), kOp);
      },
      Release());
  m.def(
      "branch_norm_statistics_backward_cpu",
      [](const Fields& fields, const Numbers& eps, int64_t grad_mean, int64_t grad_var, int threads) {
        const auto p = read_params(fields, eps);
        throw_unless_ok(branch_norm_statistics_backward_cpu(p, as_pointer(grad_mean), as_pointer(grad_var), threads),
                        kOp);
      },
      Release());
}
#endif

#if REPKERN_WITH_CUDA
void register_cuda(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  using Size = size_t (*)(const NormParams&);
  const std::pair<const char*, Size> sizes[] = {
      {"branch_norm_add_forward_cuda_workspace", branch_norm_add_forward_cuda_workspace},
      {"branch_norm_add_backward_cuda_workspace", branch_norm_add_backward_cuda_workspace},
      {"branch_norm_sums_cuda_workspace", branch_norm_sums_cuda_workspace},
      {"branch_norm_statistics_cuda_workspace", branch_norm_statistics_cuda_workspace}};
  for (const auto& [name, size] : sizes)
    m.def(name, [size = size](const Fields& fields, const Numbers& eps) { return size(read_params(fields, eps)); });
  m.def(
      "branch_norm_add_forward_cuda",
      [](const Fields& fields, const Numbers& eps, int64_t out, int64_t workspace, int64_t stream) {
        const auto p = read_params(fields, eps);
        throw_unless_ok(branch_norm_add_forward_cuda(p, as_pointer(out), as_pointer(workspace), as_pointer(stream)),
                        kOp);
      },
      Release());
  m.def(
      "branch_norm_add_backward_cuda",
      [](const Fields& fields, const Numbers& eps, const Fields& grads, int64_t workspace, int64_t stream) {
        const auto p = read_params(fields, eps);
        throw_unless_ok(branch_norm_add_backward_cuda(p, read_grads(grads), as_pointer(workspace), as_pointer(stream)),
                        kOp);
      },
      Release());
  m.def(
      "branch_norm_sums_cuda",
      [](const Fields& fields, const Numbers& eps, int64_t grad, int64_t sums, int64_t workspace, int64_t stream) {
        const auto p = read_params(fields, eps);
        throw_unless_ok(
            branch_norm_sums_cuda(p, as_pointer(grad), as_pointer(sums), as_pointer(workspace), as_pointer(stream)),
            kOp);
      },
      Release());
  m.def(
      "branch_norm_statistics_cuda",
      [](const Fields& fields, const Numbers& eps, int64_t workspace, int64_t stream) {
        const auto p = read_params(fields, eps);
        throw_unless_ok(branch_norm_statistics_cuda(p, as_pointer(workspace), as_pointer(stream)), kOp);
      },
      Release());
  m.def(
      "branch_norm_statistics_backward_cuda",
      [](const Fields& fields, const Numbers& eps, int64_t grad_mean, int64_t grad_var, int64_t stream) {
        const auto p = read_params(fields, eps);
        throw_unless_ok(
            branch_norm_statistics_backward_cuda(p, as_pointer(grad_mean), as_pointer(grad_var), as_pointer(stream)),
            kOp);
      },
      Release());
}
#endif

}  // namespace

void register_branch_norm_add(py::module_& m) {
#if REPKERN_WITH_CPU
  register_cpu(m);
#endif
#if REPKERN_WITH_CUDA
  register_cuda(m);
#endif
}

}  // namespace repkern
