// The same four functions once per instruction set.
#pragma once
#include "compose_sequential/compose_sequential.h"

#define REPKERN_DECLARE_COMPOSE(isa)                                                                         \
  namespace isa {                                                                                            \
  size_t compose_forward_workspace(const ComposeParams& p, DType dtype, int threads);                        \
  Status compose_forward(const ComposeParams& p, void* out, DType dtype, void* workspace, int threads);      \
  size_t compose_backward_workspace(const ComposeParams& p, DType dtype, int threads);                       \
  Status compose_backward(const ComposeParams& p, const void* grad_out, void* grad_first, void* grad_second, \
                          DType dtype, void* workspace, int threads);                                        \
  }

namespace repkern {
REPKERN_DECLARE_COMPOSE(scalar)
REPKERN_DECLARE_COMPOSE(avx2)
REPKERN_DECLARE_COMPOSE(avx512)
}  // namespace repkern
