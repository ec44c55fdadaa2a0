// The same function once per instruction set.
#pragma once
#include "grad_mult_sgd/grad_mult_sgd.h"

#define REPKERN_DECLARE_SGD(isa)                                                     \
  namespace isa {                                                                    \
  Status grad_mult_sgd(const GradMultTable& table, const SgdParams& p, int threads); \
  }

namespace repkern {
REPKERN_DECLARE_SGD(scalar)
REPKERN_DECLARE_SGD(avx2)
REPKERN_DECLARE_SGD(avx512)
}  // namespace repkern
