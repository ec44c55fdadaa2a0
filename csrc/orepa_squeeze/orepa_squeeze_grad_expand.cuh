// grad_expand[o, t, :] = s[o] h,  h = sum over i of reduce[t, i] grad[o, i, :];  grad_s[o] = sum of h * expand.
#pragma once
#include "orepa_squeeze/orepa_squeeze_tile.cuh"

namespace repkern {
namespace squeeze {

struct ExpandLayer {
  const void *grad, *reduce, *expand, *scale;
  void *grad_expand, *scale_partial;  // scale_partial: [slices][Co], null when not wanted
  int first_tile, co, co_g, ci_g, cm_g, kk;
  bool identity_reduce, aligned;
};

constexpr int kExpandLayers = 48;
struct ExpandTable {
  int count;
  ExpandLayer layers[kExpandLayers];
};
static_assert(sizeof(ExpandTable) <= 4096, "kernel parameters hold 4 KB");

template <class Tile, int kPositions>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerSm<typename Tile::Scalar, kPositions>)
    squeeze_grad_expand(const __grid_constant__ ExpandTable table) {
  using T = typename Tile::Scalar;
  RK_DYN_SMEM(T, shared);
  int which = 0;
  while (which + 1 < table.count && static_cast<int>(blockIdx.x) >= table.layers[which + 1].first_tile) ++which;
  const ExpandLayer& layer = table.layers[which];
  const Columns columns(kPositions != 0 ? kPositions : layer.kk);
  const Place place(blockIdx.x - layer.first_tile, layer.cm_g, layer.co_g, columns);

  const T* grad =
      static_cast<const T*>(layer.grad) + static_cast<int64_t>(place.group) * layer.co_g * layer.ci_g * layer.kk;
  const ColumnCopy<T, kPositions> right(grad, layer.ci_g, columns, place);
  const T* reduce = static_cast<const T*>(layer.reduce) + static_cast<int64_t>(place.group) * layer.cm_g * layer.ci_g;
  multiply<Tile, true>(shared, reduce, layer.cm_g, layer.ci_g, layer.aligned, right, layer.ci_g, place.m0);

  const int lane = threadIdx.x % 32, rows = min(kTileM, layer.cm_g - place.m0);
  const Divisor by_position(place.positions);
  const T* expand = static_cast<const T*>(layer.expand);
  for (int c = threadIdx.x / 32; c < place.channels; c += kTileThreads / 32) {
    const int in_group = place.o0 + c, o = place.group * layer.co_g + in_group;
    const T scale = layer.scale == nullptr ? T(1) : static_cast<const T*>(layer.scale)[o];
    T scale_gradient = T(0);
    for (int e = lane; e < rows * place.positions; e += 32) {
      const int m = by_position.divide(e), q = e - m * place.positions, t = place.m0 + m;
      T value = shared[m * kRowC + c * columns.chunk + q];
      if (layer.identity_reduce) value += grad[(in_group * layer.ci_g + t % layer.ci_g) * layer.kk + place.p0 + q];
      const int at = (o * layer.cm_g + t) * layer.kk + place.p0 + q;
      scale_gradient += value * expand[at];
      if (layer.grad_expand != nullptr) static_cast<T*>(layer.grad_expand)[at] = scale * value;
    }
    if (layer.scale_partial == nullptr) continue;
    scale_gradient = warp_sum(scale_gradient);
    if (lane == 0) static_cast<T*>(layer.scale_partial)[place.slice * layer.co + o] = scale_gradient;
  }
}

}  // namespace squeeze
}  // namespace repkern
