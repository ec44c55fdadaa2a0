// The portable build of the kernels, and the choice between the builds at run time.
#define REPKERN_ISA_NAMESPACE scalar
#include "common/isa_dispatch.h"
#include "common/simd/scalar_math.h"
#include "winograd_conv2d/winograd_conv2d_body.h"
#include "winograd_conv2d/winograd_conv2d_isa.h"

namespace repkern {

size_t winograd_conv2d_packed_cpu_workspace(const WinogradParams& p, int threads) {
  return largest_size(REPKERN_BUILDS(winograd_workspace), p, threads);
}

Status winograd_conv2d_packed_cpu(const WinogradParams& p, void* workspace, int threads) {
  return chosen_build(REPKERN_BUILDS(winograd_conv))(p, workspace, threads);
}

Status winograd_transform_weight_cpu(const WinogradWeight& w, int threads) {
  return chosen_build(REPKERN_BUILDS(winograd_weight))(w, threads);
}

}  // namespace repkern
