// grad_mult_adamw_: a step of AdamW for all tensors of a table. The math: docs/ops/grad_mult_adamw.md.
#pragma once
#include "common/grad_mult.h"

namespace repkern {

// States 0 to 2 of the table are exp_avg, exp_avg_sq and max_exp_avg_sq, the last for amsgrad only.
struct AdamwParams {
  double beta1, beta2, eps;
  bool amsgrad, maximize, decoupled, multiply_update;
};

// Both add 1 to every step of the table, after all chunks were updated.
Status grad_mult_adamw_cpu(const GradMultTable& table, const AdamwParams& p, int threads);
// All chunks belong to tensors of one dtype. `arrived`: one zero, zero again afterwards.
Status grad_mult_adamw_cuda(const GradMultTable& table, const AdamwParams& p, DType dtype, unsigned* arrived,
                            void* stream);

}  // namespace repkern
