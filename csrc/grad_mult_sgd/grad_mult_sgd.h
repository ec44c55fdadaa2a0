// grad_mult_sgd_: a step of SGD for all tensors of a table. The math: docs/ops/grad_mult_sgd.md.
#pragma once
#include "common/grad_mult.h"

namespace repkern {

// State 0 of the table is the momentum buffer, unused without momentum.
struct SgdParams {
  double momentum, dampening;
  bool nesterov, maximize;
};

Status grad_mult_sgd_cpu(const GradMultTable& table, const SgdParams& p, int threads);
// All chunks belong to tensors of one dtype.
Status grad_mult_sgd_cuda(const GradMultTable& table, const SgdParams& p, DType dtype, void* stream);

}  // namespace repkern
