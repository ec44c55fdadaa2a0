// winograd_conv2d: 3x3 convolution by F(m x m, 3x3), m = 2, 4, 5, 6, and with stride 2 by F(4x4, 2x2) on the even
// inputs. The math: docs/ops/winograd_conv2d.md. Shapes: N = batch, C / K = input / output channels, g = groups, P = (m
// + 2)^2.
#pragma once
#include "common/types.h"

namespace repkern {

// Output channels that lie next to each other in packed weights.
constexpr int64_t kWinogradLanes = 16;

// The codes are fixed: repkern/ops/winograd_conv2d/contract.py passes them as integers.
enum class WinogradActivation : int64_t { none = 0, relu = 1, relu6 = 2, silu = 3, hardswish = 4 };

// Maps (x, residual, out) are of dtype X, all contiguous ([N, C, H, W] in memory) or all channels_last ([N, H, W, C]).
// S is f64 when X is f64, else f32. OH = (H + 2 padding - 3) / stride + 1 >= 1, OW likewise; every size is at least
// 1.
struct WinogradParams {
  int64_t n, c, h, w, k;
  int64_t groups, padding;  // padding 0, 1, 2
  int64_t stride;           // 1; on the CPU also 2, with tile 4
  int64_t tile;             // m
  int64_t points;           // of packed: P, or 9 for the kernels themselves, which are transformed on the way
  int64_t channels_last;
  int64_t activation;  // WinogradActivation
  DType dtype;
  const void* x;         // [N, C, H, W]
  const void* packed;    // [g, ceil(K/g / 16), points, C/g, 16], S; zeros behind the last output channel of a group
  const void* bias;      // [K], S; null for none
  const void* residual;  // [N, K, OH, OW], X; null for none; added before the activation
  void* out;             // [N, K, OH, OW]
};

// A weight to be transformed: U = G w G^T in double, rounded once to S.
struct WinogradWeight {
  int64_t k, c;  // c: input channels per group
  int64_t groups, tile;
  DType dtype;         // of `weight`
  const void* weight;  // [K, C/g, 3, 3], contiguous
  void* packed;        // as WinogradParams::packed
};

// Products are added up over C/g in S. The result does not depend on the number of threads, nor on N.
// `workspace`: the bytes the matching *_workspace function names, 64-byte aligned.
size_t winograd_conv2d_packed_cpu_workspace(const WinogradParams& p, int threads);
Status winograd_conv2d_packed_cpu(const WinogradParams& p, void* workspace, int threads);
Status winograd_transform_weight_cpu(const WinogradWeight& w, int threads);

// math: how products of f32 maps are formed; see common/cuda/mma.cuh.
size_t winograd_conv2d_packed_cuda_workspace(const WinogradParams& p, int math);
Status winograd_conv2d_packed_cuda(const WinogradParams& p, int math, void* workspace, void* stream);
Status winograd_transform_weight_cuda(const WinogradWeight& w, void* stream);

}  // namespace repkern
