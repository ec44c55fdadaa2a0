// F(2x2, 3x3) in one kernel, float32, multiply-adds only: no workspace. A block makes 64 output channels of 32 tiles;
// warp w has positions 2w and 2w + 1, and each of its lanes 8 channels x 8 tiles of them.
#pragma once
#include <algorithm>

#include "common/cuda/copy.cuh"
#include "winograd_conv2d/winograd_conv2d_maps.cuh"
#include "winograd_conv2d/winograd_conv2d_points.cuh"

namespace repkern {
namespace winograd {

constexpr int kFusedThreads = 256, kFusedTiles = 32, kFusedOutputs = 64, kFusedDepth = 8, kFusedP = 16;
constexpr int kStageV = kFusedP * kFusedDepth * kFusedTiles, kStageU = kFusedP * kFusedDepth * kFusedOutputs;
constexpr size_t kFusedShared = 2 * sizeof(float) * (kStageV + kStageU);

// Element (position, channel, tile) of a stage of V. Four tiles stay together; which four lie where depends on the
// channel, so that neither lanes that differ in tile nor lanes that differ in channel write to the same bank.
__device__ __forceinline__ int place_v(int position, int c, int tile) {
  return (position * kFusedDepth + c) * kFusedTiles + ((tile / 4 ^ c) * 4 + tile % 4);
}

// One patch of a thread: loaded early, transformed late.
class Patch {
 public:
  __device__ Patch(const Geometry& geometry, const TileRange& range, unsigned first_tile, int group)
      : geometry_(geometry) {
    const bool channels_last = geometry.p.channels_last != 0;
    const int t = threadIdx.x;
    c_ = channels_last ? t % kFusedDepth : t / kFusedTiles;
    tile_ = channels_last ? t / kFusedDepth : t % kFusedTiles;
    const Spot spot = spot_of<2>(geometry, range, first_tile + tile_);
    const int64_t y = spot.y - geometry.p.padding, x = spot.x - geometry.p.padding;
    const bool exists = first_tile + tile_ < range.count;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (exists && y + i >= 0 && y + i < geometry.p.h) rows_ |= 1u << i;
      if (exists && x + i >= 0 && x + i < geometry.p.w) columns_ |= 1u << i;
    }
    at_ = spot.n * geometry.in.n + (static_cast<int64_t>(group) * geometry.cg + c_) * geometry.in.c +
          y * geometry.in.h + x * geometry.in.w;
  }

  __device__ __forceinline__ void load(int c0) {
    const float* x = static_cast<const float*>(geometry_.p.x);
    const bool there = c0 + c_ < geometry_.cg;
    const int64_t at = at_ + c0 * geometry_.in.c;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool inside = there && (rows_ >> i & 1) != 0 && (columns_ >> j & 1) != 0;
        d_[i][j] = inside ? x[at + i * geometry_.in.h + j * geometry_.in.w] : 0.0f;
      }
  }

  __device__ __forceinline__ void transform(float* stage) const {
    float half[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) to_points<2>(d_[i], half[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float column[4] = {half[0][j], half[1][j], half[2][j], half[3][j]};
      float v[4];
      to_points<2>(column, v);
#pragma unroll
      for (int i = 0; i < 4; ++i) stage[place_v(i * 4 + j, c_, tile_)] = v[i];
    }
  }

 private:
  const Geometry& geometry_;
  float d_[4][4];
  int64_t at_;
  int c_, tile_;
  unsigned rows_ = 0, columns_ = 0;
};

// Packed weights of kFusedDepth channels to [position][channel][output]; zeros where there is nothing.
template <int kVector>
__device__ __forceinline__ void copy_weights(const Geometry& geometry, float* stage, int group, int k0, int c0) {
  constexpr int kLanes = kWinogradLanes, kPerRow = kLanes / kVector;
  const int blocks = ceil_div(geometry.kg, kLanes), first = k0 / kLanes, cg = geometry.cg;
  const float* packed = static_cast<const float*>(geometry.p.packed);
#pragma unroll(kVector == 4 ? 4 : 1)
  for (int e = threadIdx.x; e < kStageU / kVector; e += kFusedThreads) {
    const int lane = e % kPerRow * kVector, c = e / kPerRow % kFusedDepth;
    const int position = e / (kPerRow * kFusedDepth) % kFusedP, block = e / (kPerRow * kFusedDepth * kFusedP);
    const bool there = first + block < blocks && c0 + c < cg;
    const int64_t unit = static_cast<int64_t>(group) * blocks + first + block;
    const float* from = packed + ((unit * kFusedP + position) * cg + c0 + c) * kLanes + lane;
    copy_async<kVector * sizeof(float)>(stage + (position * kFusedDepth + c) * kFusedOutputs + block * kLanes + lane,
                                        from, there);
  }
}

// What a thread adds up: channels lane / 4 * 4 + {0..3, 32..35}, tiles lane % 4 * 4 + {0..3, 16..19}.
class FusedSums {
 public:
  __device__ FusedSums() {
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum_[q][i][j] = 0.0f;
  }

  __device__ __forceinline__ void add(const float* u, const float* v) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int c = 0; c < kFusedDepth; ++c) {
        const int position = 2 * warp + q;
        float left[8], right[8];
#pragma unroll
        for (int i = 0; i < 8; ++i)
          left[i] = u[(position * kFusedDepth + c) * kFusedOutputs + lane / 4 * 4 + i / 4 * 32 + i % 4];
#pragma unroll
        for (int j = 0; j < 8; ++j) right[j] = v[place_v(position, c, lane % 4 * 4 + j / 4 * 16) + j % 4];
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j) sum_[q][i][j] += left[i] * right[j];
      }
  }

  // The i-th of each thread's channels, to [position][lane / 4][tile].
  template <int kI>
  __device__ __forceinline__ void stage(float* to) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        to[((2 * warp + q) * 8 + lane / 4) * kFusedTiles + lane % 4 * 4 + j / 4 * 16 + j % 4] = sum_[q][kI][j];
  }

 private:
  float sum_[2][8][8];
};

// Channels k0 + 4 * (0..7) + kI % 4 + 32 * (kI / 4), and those after them.
template <int kI>
__device__ __forceinline__ void fused_epilogue(const Geometry& geometry, const TileRange& range, const FusedSums& sums,
                                               float* shared, unsigned first_tile, int group, int k0) {
  if constexpr (kI < 8) {
    sums.stage<kI>(shared);
    __syncthreads();
    const bool channels_last = geometry.p.channels_last != 0;
    const int t = threadIdx.x, row = channels_last ? t % 8 : t / kFusedTiles;
    const unsigned tile = channels_last ? t / 8 : t % kFusedTiles;
    const int k = k0 + row * 4 + kI % 4 + kI / 4 * 32;
    if (k < geometry.kg && first_tile + tile < range.count) {
      float half[4][2], out[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = shared[((i * 4 + j) * 8 + row) * kFusedTiles + tile];
        from_points<2>(v, half[i]);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float column[4] = {half[0][j], half[1][j], half[2][j], half[3][j]};
        float made[2];
        from_points<2>(column, made);
        out[0][j] = made[0];
        out[1][j] = made[1];
      }
      const Spot spot = spot_of<2>(geometry, range, first_tile + tile);
      store_tile<float, 2>(geometry, spot, static_cast<int64_t>(group) * geometry.kg + k, out);
    }
    __syncthreads();
    fused_epilogue<kI + 1>(geometry, range, sums, shared, first_tile, group, k0);
  }
}

__global__ void __launch_bounds__(kFusedThreads, 1)
    winograd_fused(const __grid_constant__ Geometry geometry, const __grid_constant__ TileRange range, bool aligned) {
  RK_DYN_SMEM(float, shared);
  float* v = shared;
  float* u = shared + 2 * kStageV;
  // The blocks that read the same tiles run side by side.
  const unsigned outputs = ceil_div(geometry.kg, kFusedOutputs);
  const int k0 = blockIdx.x % outputs * kFusedOutputs;
  const unsigned rest = blockIdx.x / outputs, groups = static_cast<unsigned>(geometry.p.groups);
  const int group = rest % groups;
  const unsigned first_tile = rest / groups * kFusedTiles;

  auto copy = [&](int step) {
    float* stage = u + step % 2 * kStageU;
    if (aligned) {
      copy_weights<4>(geometry, stage, group, k0, step * kFusedDepth);
    } else {
      copy_weights<1>(geometry, stage, group, k0, step * kFusedDepth);
    }
    copy_commit();
  };
  Patch patch(geometry, range, first_tile, group);
  FusedSums sums;
  copy(0);
  patch.load(0);
  const int steps = ceil_div(geometry.cg, kFusedDepth);
  for (int step = 0; step < steps; ++step) {
    patch.transform(v + step % 2 * kStageV);
    copy_wait<0>();
    __syncthreads();  // this step has arrived, and everybody has left the last one
    if (step + 1 < steps) {
      copy(step + 1);
      patch.load((step + 1) * kFusedDepth);
    }
    sums.add(u + step % 2 * kStageU, v + step % 2 * kStageV);
  }
  __syncthreads();
  fused_epilogue<0>(geometry, range, sums, shared, first_tile, group, k0);
}

inline Status run_fused(const Geometry& geometry, void* stream) {
  const int64_t beside = ceil_div(geometry.kg, kFusedOutputs) * geometry.p.groups;
  const int64_t most = std::min<int64_t>(int64_t(1) << 30, kMostBlocks / beside * kFusedTiles);
  const bool aligned = reinterpret_cast<uintptr_t>(geometry.p.packed) % 16 == 0;
  for (int64_t first = 0; first < geometry.tiles; first += most) {
    const int64_t count = std::min(most, geometry.tiles - first);
    const unsigned blocks = static_cast<unsigned>((count + kFusedTiles - 1) / kFusedTiles * beside);
    if (Status problem = RK_LAUNCH(winograd_fused, dim3(blocks), dim3(kFusedThreads), kFusedShared, stream, geometry,
                                   geometry.range(first, count), aligned))
      return problem;
  }
  return nullptr;
}

}  // namespace winograd
}  // namespace repkern
