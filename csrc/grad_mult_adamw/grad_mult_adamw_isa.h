// The same function once per instruction set.
#pragma once
#include "grad_mult_adamw/grad_mult_adamw.h"

#define REPKERN_DECLARE_ADAMW(isa)                                                       \
  namespace isa {                                                                        \
  Status grad_mult_adamw(const GradMultTable& table, const AdamwParams& p, int threads); \
  }

namespace repkern {
REPKERN_DECLARE_ADAMW(scalar)
REPKERN_DECLARE_ADAMW(avx2)
REPKERN_DECLARE_ADAMW(avx512)
}  // namespace repkern
