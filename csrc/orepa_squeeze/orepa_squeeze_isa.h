// The same four functions once per instruction set.
#pragma once
#include "orepa_squeeze/orepa_squeeze.h"

#define REPKERN_DECLARE_SQUEEZE(isa)                                                                            \
  namespace isa {                                                                                               \
  size_t squeeze_forward_workspace(const SqueezeLayer* layers, int count, DType dtype, int threads);            \
  Status squeeze_forward(const SqueezeLayer* layers, void* const* out, int count, DType dtype, DType out_dtype, \
                         bool channels_last, void* workspace, int threads);                                     \
  size_t squeeze_backward_workspace(const SqueezeLayer* layers, int count, DType dtype, int threads);           \
  Status squeeze_backward(const SqueezeLayer* layers, const SqueezeGrads* grads, int count, DType dtype,        \
                          void* workspace, int threads);                                                        \
  }

namespace repkern {
REPKERN_DECLARE_SQUEEZE(scalar)
REPKERN_DECLARE_SQUEEZE(avx2)
REPKERN_DECLARE_SQUEEZE(avx512)
}  // namespace repkern
