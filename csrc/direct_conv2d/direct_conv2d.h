// direct_conv2d: convolution by matrix products over shifted maps. The layouts: docs/ops/direct_conv2d.md.
// Shapes: N = batch, C / K = input / output channels, g = groups.
#pragma once
#include "common/types.h"

namespace repkern {

// Maps (x, residual, out) are all contiguous ([N, C, H, W] in memory) or all channels_last ([N, H, W, C]); everything
// but split weights is of `dtype` (f32 or f64). OH = (H + 2 ph - dh (kh - 1) - 1) / sh + 1 >= 1, OW likewise.
struct DirectParams {
  int64_t n, c, h, w, k;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;  // kernel, stride, padding, dilation
  int64_t groups;
  int64_t channels_last;
  int64_t activation;  // WinogradActivation
  int64_t split;       // f32 only: the form of `packed`, and arithmetic on the tile unit
  DType dtype;
  const void* x;         // [N, C, H, W]
  const void* packed;    // [g, ceil(K/g / 16), kh kw, C/g, 16]; split: [g, ceil(K/g / 16), blocks, 3, 16, 16, 2], bf16
  const void* bias;      // [K]; null for none
  const void* residual;  // [N, K, OH, OW]; null for none; added before the activation
  void* out;             // [N, K, OH, OW]
};

// Sums are cut at fixed places: the result does not depend on the number of threads, nor on N.
// `workspace`: the bytes the *_workspace function names, 64-byte aligned. Split weights need a CPU with AMX.
size_t direct_conv2d_packed_cpu_workspace(const DirectParams& p, int threads);
Status direct_conv2d_packed_cpu(const DirectParams& p, void* workspace, int threads);
// Whether split weights can be multiplied here and now.
bool direct_conv2d_splits_cpu();

}  // namespace repkern
