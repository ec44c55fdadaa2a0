// The portable build of the kernels, and the choice between the builds at run time.
#include "common/isa_dispatch.h"
#include "common/simd/scalar_math.h"
#define REPKERN_ISA_NAMESPACE scalar
#include "branch_norm_add/branch_norm_add_body.h"
#include "branch_norm_add/branch_norm_add_isa.h"

namespace repkern {

namespace {

size_t workspace_of(const NormParams& p, int threads) {
  return largest_size(REPKERN_BUILDS(branch_norm_workspace), p, threads);
}

}  // namespace

size_t branch_norm_add_forward_cpu_workspace(const NormParams& p, int threads) { return workspace_of(p, threads); }

Status branch_norm_add_forward_cpu(const NormParams& p, void* out, void* workspace, int threads) {
  return chosen_build(REPKERN_BUILDS(branch_norm_forward))(p, out, workspace, threads);
}

size_t branch_norm_add_backward_cpu_workspace(const NormParams& p, int threads) { return workspace_of(p, threads); }

Status branch_norm_add_backward_cpu(const NormParams& p, const NormGrads& grads, void* workspace, int threads) {
  return chosen_build(REPKERN_BUILDS(branch_norm_backward))(p, grads, workspace, threads);
}

size_t branch_norm_sums_cpu_workspace(const NormParams& p, int threads) { return workspace_of(p, threads); }

Status branch_norm_sums_cpu(const NormParams& p, const void* grad_out, void* sums, void* workspace, int threads) {
  return chosen_build(REPKERN_BUILDS(branch_norm_sums))(p, grad_out, sums, workspace, threads);
}

size_t branch_norm_statistics_cpu_workspace(const NormParams& p, int threads) { return workspace_of(p, threads); }

Status branch_norm_statistics_cpu(const NormParams& p, void* workspace, int threads) {
  return chosen_build(REPKERN_BUILDS(branch_norm_statistics))(p, workspace, threads);
}

Status branch_norm_statistics_backward_cpu(const NormParams& p, const void* grad_mean, const void* grad_var,
                                           int threads) {
  return chosen_build(REPKERN_BUILDS(branch_norm_statistics_backward))(p, grad_mean, grad_var, threads);
}

}  // namespace repkern
