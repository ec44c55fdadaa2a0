// The portable build of the kernels, and the choice between the builds at run time.
#define REPKERN_ISA_NAMESPACE scalar
#include "common/isa_dispatch.h"
#include "common/simd/scalar.h"
#include "compose_sequential/compose_sequential_body.h"
#include "compose_sequential/compose_sequential_isa.h"

namespace repkern {

size_t compose_sequential_forward_cpu_workspace(const ComposeParams& p, DType dtype, int threads) {
  return largest_size(REPKERN_BUILDS(compose_forward_workspace), p, dtype, threads);
}

Status compose_sequential_forward_cpu(const ComposeParams& p, void* out, DType dtype, void* workspace, int threads) {
  return chosen_build(REPKERN_BUILDS(compose_forward))(p, out, dtype, workspace, threads);
}

size_t compose_sequential_backward_cpu_workspace(const ComposeParams& p, DType dtype, int threads) {
  return largest_size(REPKERN_BUILDS(compose_backward_workspace), p, dtype, threads);
}

Status compose_sequential_backward_cpu(const ComposeParams& p, const void* grad_out, void* grad_first,
                                       void* grad_second, DType dtype, void* workspace, int threads) {
  return chosen_build(REPKERN_BUILDS(compose_backward))(p, grad_out, grad_first, grad_second, dtype, workspace,
                                                        threads);
}

}  // namespace repkern
