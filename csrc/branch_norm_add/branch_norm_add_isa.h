// The same functions once per instruction set.
#pragma once
#include "branch_norm_add/branch_norm_add.h"

#define REPKERN_DECLARE_BRANCH_NORM(isa)                                                                   \
  namespace isa {                                                                                          \
  size_t branch_norm_workspace(const NormParams& p, int threads);                                          \
  Status branch_norm_forward(const NormParams& p, void* out, void* workspace, int threads);                \
  Status branch_norm_backward(const NormParams& p, const NormGrads& g, void* workspace, int threads);      \
  Status branch_norm_sums(const NormParams& p, const void* out, void* sums, void* workspace, int threads); \
  Status branch_norm_statistics(const NormParams& p, void* workspace, int threads);                        \
  Status branch_norm_statistics_backward(const NormParams& p, const void* grad_mean, const void* grad_var, \
                                         int threads);                                                     \
  }

namespace repkern {
REPKERN_DECLARE_BRANCH_NORM(scalar)
REPKERN_DECLARE_BRANCH_NORM(avx2)
REPKERN_DECLARE_BRANCH_NORM(avx512)
}  // namespace repkern
