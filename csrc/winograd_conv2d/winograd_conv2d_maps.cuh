// Where tiles lie in the maps, and what is done to an output on its way there.
#pragma once
#include <cmath>

#include "common/cuda/index.cuh"
#include "winograd_conv2d/winograd_conv2d.h"

namespace repkern {
namespace winograd {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(double v, double& to) { to = v; }
__device__ __forceinline__ void narrow(float v, __half& to) { to = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

// What maps of X are computed in.
template <class X>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class X>
using Wide = typename WideOf<X>::type;

struct Strides {
  int64_t n, c, h, w;
};

inline Strides strides_of(int64_t c, int64_t h, int64_t w, bool channels_last) {
  return channels_last ? Strides{h * w * c, 1, w * c, c} : Strides{c * h * w, h * w, w, 1};
}

// Tiles [0, count) of a launch; the first is tile `rest` of image `n`.
struct TileRange {
  int64_t n;
  unsigned rest, count;
};

struct Geometry {
  WinogradParams p;
  Strides in, out;
  int height, width;  // of the output
  int cg, kg;         // channels of a group
  int64_t tiles;      // of all images
  WideDivisor by_image, by_row;

  Geometry(const WinogradParams& params, int64_t rows, int64_t columns)
      : p(params),
        in(strides_of(p.c, p.h, p.w, p.channels_last != 0)),
        height(static_cast<int>(p.h + 2 * p.padding - 2)),
        width(static_cast<int>(p.w + 2 * p.padding - 2)),
        cg(static_cast<int>(p.c / p.groups)),
        kg(static_cast<int>(p.k / p.groups)),
        tiles(p.n * rows * columns),
        by_image(static_cast<unsigned>(rows * columns)),
        by_row(static_cast<unsigned>(columns)) {
    out = strides_of(p.k, height, width, p.channels_last != 0);
  }

  TileRange range(int64_t first, int64_t count) const {
    return {first / by_image.value, static_cast<unsigned>(first % by_image.value), static_cast<unsigned>(count)};
  }
};

// The image of a tile and its first output.
struct Spot {
  int64_t n;
  int y, x;
};

template <int M>
__device__ __forceinline__ Spot spot_of(const Geometry& geometry, const TileRange& range, unsigned tile) {
  const unsigned at = range.rest + tile, image = geometry.by_image.divide(at);
  const unsigned inside = at - image * geometry.by_image.value, row = geometry.by_row.divide(inside);
  const unsigned column = inside - row * geometry.by_row.value;
  return {range.n + image, static_cast<int>(row) * M, static_cast<int>(column) * M};
}

// NaN stays NaN.
template <class S>
__device__ __forceinline__ S activated(S v, WinogradActivation activation) {
  switch (activation) {
    case WinogradActivation::relu:
      return v < S(0) ? S(0) : v;
    case WinogradActivation::relu6:
      return v < S(0) ? S(0) : v > S(6) ? S(6) : v;
    case WinogradActivation::silu:
      return v / (S(1) + std::exp(-v));
    case WinogradActivation::hardswish: {
      const S gate = v + S(3);
      return v * (gate < S(0) ? S(0) : gate > S(6) ? S(6) : gate) / S(6);
    }
    default:
      return v;
  }
}

// Bias, residual, activation, store: the part of a tile that lies inside the map.
template <class X, int M>
__device__ __forceinline__ void store_tile(const Geometry& geometry, const Spot& spot, int64_t channel,
                                           const Wide<X> (&value)[M][M]) {
  using S = Wide<X>;
  const WinogradParams& p = geometry.p;
  const S bias = p.bias == nullptr ? S(0) : static_cast<const S*>(p.bias)[channel];
  const int64_t at =
      spot.n * geometry.out.n + channel * geometry.out.c + spot.y * geometry.out.h + spot.x * geometry.out.w;
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = 0; j < M; ++j) {
      if (spot.y + i >= geometry.height || spot.x + j >= geometry.width) continue;
      const int64_t here = at + i * geometry.out.h + j * geometry.out.w;
      S sum = value[i][j] + bias;
      if (p.residual != nullptr) sum += widen(static_cast<const X*>(p.residual)[here]);
      narrow(activated(sum, WinogradActivation(p.activation)), static_cast<X*>(p.out)[here]);
    }
}

// Threads of all launches but the tile product.
constexpr int kMapThreads = 128;
constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;

}  // namespace winograd
}  // namespace repkern
