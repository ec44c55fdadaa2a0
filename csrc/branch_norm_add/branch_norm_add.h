// branch_norm_add: out = activation(sum over branches of norm_b(y_b)), the normalized maps never written.
// The math: docs/ops/branch_norm_add.md. Shapes: N = batch, C = channels, P = H * W, B = branches,
// Bn = those with a norm (mode batch or given).
#pragma once
#include "common/types.h"

namespace repkern {

constexpr int kMostNormBranches = 16;

// The codes are fixed: repkern/ops/branch_norm_add/contract.py passes them as integers.
enum class NormMode : int64_t { batch = 0, given = 1, as_is = 2 };
enum class NormActivation : int64_t { none = 0, relu = 1, relu6 = 2, silu = 3, hardswish = 4 };

// One term of the sum. Maps are of the call's dtype X, laid out as the call says; the statistics dtype S is f64 when X
// is f64, else f32; the parameters' dtype is S or X. Two branches may be the same map.
struct NormBranch {
  int64_t mode;        // NormMode
  const void* y;       // [N, C, H, W]
  const void* weight;  // [C], parameters' dtype; null when mode is as_is
  const void* bias;    // [C], likewise
  void* mean;  // [C]; mode batch: S, written by forward and statistics, else read; given: parameters' dtype, read
  void* var;   // [C], biased; likewise
  double eps;
  void* grad;  // [N, C, H, W], written by the backward passes; null in the others and when mode is as_is
};

// X maps: contiguous ([N, C, P] in memory), or channels_last ([N, P, C]). C * P = 0 and N = 0 never get here, nor does
// N * P = 1 with a branch of mode batch.
struct NormParams {
  int64_t n, c, p;
  int64_t channels_last;
  int64_t activation;  // NormActivation
  int64_t branches;    // 1 ... kMostNormBranches
  DType dtype, param_dtype;
  NormBranch branch[kMostNormBranches];
};

struct NormGrads {
  const void* out;    // [N, C, H, W], X: the gradient of the output
  const void* sums;   // [1 + Bn, C], S: as *_sums writes them, of a larger batch than this one; null: this batch's
  const void* count;  // [1], S: elements a channel behind `sums`; null: N * P
  void* as_is;        // [N, C, H, W], X: the gradient of every branch of mode as_is; null when there is none
  void* weight;       // [Bn, C], parameters' dtype
  void* bias;         // [C], parameters' dtype: the gradient of every bias
};

// Per channel, identical in every pass so that the backward's activation sees the forward's own sums:
//   scale_b = weight / sqrt(var + eps) in double, rounded to S;
//   shift = sum over b of (bias_b - mean_b * scale_b) in double with the rounded scale, rounded to S;
//   z = fma(y_B, scale_B, ... fma(y_1, scale_1, shift)) in S, branches in order (mode as_is: z + y_b);
//   out = activation(z), rounded to X.
// Batch statistics are those written to mean and var, i.e. rounded to S. They are centred (no E[y^2] - E[y]^2), and
// so are the sums of the backward (y - mean before the product with dz). No chain of additions in S is longer than
// 1024; what is merged beyond that is in double. bounds.py relies on this paragraph. `workspace`: the bytes the
// matching *_workspace function names, 64-byte aligned.
size_t branch_norm_add_forward_cpu_workspace(const NormParams& p, int threads);
Status branch_norm_add_forward_cpu(const NormParams& p, void* out, void* workspace, int threads);

// dz = grad * activation'(z). Mode batch: grad_b = scale_b (dz - s_0 / count - xhat_b s_b / count), where s are the
// sums below and xhat_b = (y_b - mean_b) / sqrt(var_b + eps); mode given: scale_b dz; mode as_is: dz. grads.weight[b] =
// s_b, grads.bias = s_0, of `grads.sums` where given.
size_t branch_norm_add_backward_cpu_workspace(const NormParams& p, int threads);
Status branch_norm_add_backward_cpu(const NormParams& p, const NormGrads& grads, void* workspace, int threads);

// sums: [1 + Bn, C], S: row 0 = sum of dz over N, H, W; row 1 + k = sum of dz xhat of the k-th branch with a norm.
size_t branch_norm_sums_cpu_workspace(const NormParams& p, int threads);
Status branch_norm_sums_cpu(const NormParams& p, const void* grad_out, void* sums, void* workspace, int threads);

// Mean and biased variance of every branch into branch[b].mean and .var; every mode is batch. activation, weight, bias
// and eps are not read.
size_t branch_norm_statistics_cpu_workspace(const NormParams& p, int threads);
Status branch_norm_statistics_cpu(const NormParams& p, void* workspace, int threads);

// branch[b].grad = (grad_mean[b] + 2 (y_b - mean_b) grad_var[b]) / (N P); every mode is batch, means are read.
// grad_mean, grad_var: [B, C], S.
Status branch_norm_statistics_backward_cpu(const NormParams& p, const void* grad_mean, const void* grad_var,
                                           int threads);

size_t branch_norm_add_forward_cuda_workspace(const NormParams& p);
Status branch_norm_add_forward_cuda(const NormParams& p, void* out, void* workspace, void* stream);
size_t branch_norm_add_backward_cuda_workspace(const NormParams& p);
Status branch_norm_add_backward_cuda(const NormParams& p, const NormGrads& grads, void* workspace, void* stream);
size_t branch_norm_sums_cuda_workspace(const NormParams& p);
Status branch_norm_sums_cuda(const NormParams& p, const void* grad_out, void* sums, void* workspace, void* stream);
size_t branch_norm_statistics_cuda_workspace(const NormParams& p);
Status branch_norm_statistics_cuda(const NormParams& p, void* workspace, void* stream);
Status branch_norm_statistics_backward_cuda(const NormParams& p, const void* grad_mean, const void* grad_var,
                                            void* stream);

}  // namespace repkern
