// The portable build of the kernels, and the choice between the builds at run time.
#define REPKERN_ISA_NAMESPACE scalar
#include "common/isa_dispatch.h"
#include "common/simd/scalar.h"
#include "orepa_squeeze/orepa_squeeze_body.h"
#include "orepa_squeeze/orepa_squeeze_isa.h"

namespace repkern {

size_t orepa_squeeze_forward_cpu_workspace(const SqueezeLayer* layers, int count, DType dtype, int threads) {
  return largest_size(REPKERN_BUILDS(squeeze_forward_workspace), layers, count, dtype, threads);
}

Status orepa_squeeze_forward_cpu(const SqueezeLayer* layers, void* const* out, int count, DType dtype, DType out_dtype,
                                 bool channels_last, void* workspace, int threads) {
  return chosen_build(REPKERN_BUILDS(squeeze_forward))(layers, out, count, dtype, out_dtype, channels_last, workspace,
                                                       threads);
}

size_t orepa_squeeze_backward_cpu_workspace(const SqueezeLayer* layers, int count, DType dtype, int threads) {
  return largest_size(REPKERN_BUILDS(squeeze_backward_workspace), layers, count, dtype, threads);
}

Status orepa_squeeze_backward_cpu(const SqueezeLayer* layers, const SqueezeGrads* grads, int count, DType dtype,
                                  void* workspace, int threads) {
  return chosen_build(REPKERN_BUILDS(squeeze_backward))(layers, grads, count, dtype, workspace, threads);
}

}  // namespace repkern
