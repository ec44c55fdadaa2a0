// The same functions once per instruction set.
#pragma once
#include "winograd_conv2d/winograd_conv2d.h"

#define REPKERN_DECLARE_WINOGRAD(isa)                                          \
  namespace isa {                                                              \
  size_t winograd_workspace(const WinogradParams& p, int threads);             \
  Status winograd_conv(const WinogradParams& p, void* workspace, int threads); \
  Status winograd_weight(const WinogradWeight& w, int threads);                \
  }

namespace repkern {
REPKERN_DECLARE_WINOGRAD(scalar)
REPKERN_DECLARE_WINOGRAD(avx2)
REPKERN_DECLARE_WINOGRAD(avx512)
}  // namespace repkern
