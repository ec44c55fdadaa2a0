// The portable build of the kernel, and the choice between the builds at run time.
#include "common/isa_dispatch.h"
#include "common/simd/scalar_math.h"
#define REPKERN_ISA_NAMESPACE scalar
#include "grad_mult_sgd/grad_mult_sgd_body.h"

namespace repkern {

Status grad_mult_sgd_cpu(const GradMultTable& table, const SgdParams& p, int threads) {
  return chosen_build(REPKERN_BUILDS(grad_mult_sgd))(table, p, threads);
}

}  // namespace repkern
