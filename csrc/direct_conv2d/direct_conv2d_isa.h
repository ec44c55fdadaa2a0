// The same functions once per instruction set; `amx` multiplies split weights, the others whole ones.
#pragma once
#include "direct_conv2d/direct_conv2d.h"

#define REPKERN_DECLARE_DIRECT(isa)                                       \
  namespace isa {                                                         \
  size_t direct_workspace(const DirectParams& p, int threads);            \
  Status direct_conv(const DirectParams& p, void* workspace, int threads); \
  }

namespace repkern {
REPKERN_DECLARE_DIRECT(scalar)
REPKERN_DECLARE_DIRECT(avx2)
REPKERN_DECLARE_DIRECT(avx512)
REPKERN_DECLARE_DIRECT(amx)
}  // namespace repkern
