// compose_sequential: two stacked convolutions -> the one that computes the same. The math:
// docs/ops/compose_sequential.md.
#pragma once
#include "common/types.h"

namespace repkern {

// K = K1 + K2 - 1. Everything is contiguous and of the call's dtype (f32 or f64).
struct ComposeParams {
  int64_t co, ci, cm, groups, k1, k2;
  const void* first;   // [Cm, Ci/g, K1, K1]
  const void* second;  // [Co, Cm/g, K2, K2]
};

// `workspace`: the bytes the matching *_workspace function names, 64-byte aligned.
size_t compose_sequential_forward_cpu_workspace(const ComposeParams& p, DType dtype, int threads);
Status compose_sequential_forward_cpu(const ComposeParams& p, void* out /* [Co, Ci/g, K, K] */, DType dtype,
                                      void* workspace, int threads);
size_t compose_sequential_backward_cpu_workspace(const ComposeParams& p, DType dtype, int threads);
Status compose_sequential_backward_cpu(const ComposeParams& p, const void* grad_out /* [Co, Ci/g, K, K] */,
                                       void* grad_first, void* grad_second, DType dtype, void* workspace, int threads);

size_t compose_sequential_forward_cuda_workspace(const ComposeParams& p, DType dtype);
Status compose_sequential_forward_cuda(const ComposeParams& p, void* out, DType dtype, int math, void* workspace,
                                       void* stream);
size_t compose_sequential_backward_cuda_workspace(const ComposeParams& p, DType dtype);
Status compose_sequential_backward_cuda(const ComposeParams& p, const void* grad_out, void* grad_first,
                                        void* grad_second, DType dtype, int math, void* workspace, void* stream);

}  // namespace repkern
