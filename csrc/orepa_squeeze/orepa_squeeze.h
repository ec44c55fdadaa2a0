// orepa_squeeze: all branches of an OREPA block -> one convolution kernel, for many layers in one call.
// The math: docs/ops/orepa_squeeze.md. Shapes: Co, Ci = channels, g = groups, Cm = internal channels, e = expansion.
#pragma once
#include "common/types.h"

namespace repkern {

constexpr int kSqueezeBranches = 6;  // origin, avg, prior, 1x1-KxK, 1x1, dw-pw: the rows of scale

// One layer. A null branch is absent. All inputs are contiguous and of the call's dtype.
struct SqueezeLayer {
  int64_t co, ci, cm, groups, k, expansion;
  int64_t identity_reduce;              // 1: row t of reduce gets +1 at column t % (Ci/g), t counted within its group
  const void* origin;                   // [Co, Ci/g, K, K]
  const void* avg;                      // [Co, Ci/g]
  const void* prior;                    // [Co, Ci/g]
  const void* pointwise;                // [Co, Ci/g]
  const void* reduce;                   // [Cm, Ci/g]
  const void* expand;                   // [Co, Cm/g, K, K]
  const void* depthwise;                // [Ci*e, K, K], channel i*e + q
  const void* project;                  // [Co, Ci/g*e], column i*e + q
  const void* scale[kSqueezeBranches];  // each [Co]; null = 1
  const void* prior_filter;             // [Co, K, K]; null when prior is null
};

// What the backward writes, with the shapes above; null = not wanted (its branch is absent).
struct SqueezeGrads {
  const void* grad_out;  // [Co, Ci/g, K, K], contiguous, the call's dtype
  void* origin;
  void* avg;
  void* prior;
  void* pointwise;
  void* reduce;
  void* expand;
  void* depthwise;
  void* project;
  void* scale[kSqueezeBranches];
};

// `out[l]`: [Co, Ci/g, K, K] of out_dtype, contiguous, or in memory [Co, K, K, Ci/g] when channels_last.
// `dtype` is f32 or f64; `out_dtype` any. `workspace`: the bytes the matching *_workspace function names, 64-byte
// aligned.
size_t orepa_squeeze_forward_cpu_workspace(const SqueezeLayer* layers, int count, DType dtype, int threads);
Status orepa_squeeze_forward_cpu(const SqueezeLayer* layers, void* const* out, int count, DType dtype, DType out_dtype,
                                 bool channels_last, void* workspace, int threads);
size_t orepa_squeeze_backward_cpu_workspace(const SqueezeLayer* layers, int count, DType dtype, int threads);
Status orepa_squeeze_backward_cpu(const SqueezeLayer* layers, const SqueezeGrads* grads, int count, DType dtype,
                                  void* workspace, int threads);

// `math`: 0 = strict fp32 (error-compensated TF32, or multiply-adds with REPKERN_CUDA_FP32=ffma), 1 = TF32 allowed.
size_t orepa_squeeze_forward_cuda_workspace(const SqueezeLayer* layers, int count, DType dtype);
Status orepa_squeeze_forward_cuda(const SqueezeLayer* layers, void* const* out, int count, DType dtype, DType out_dtype,
                                  bool channels_last, int math, void* workspace, void* stream);
size_t orepa_squeeze_backward_cuda_workspace(const SqueezeLayer* layers, int count, DType dtype);
Status orepa_squeeze_backward_cuda(const SqueezeLayer* layers, const SqueezeGrads* grads, int count, DType dtype,
                                   int math, void* workspace, void* stream);

}  // namespace repkern
