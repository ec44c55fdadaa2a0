// Any tile and dtype in three kernels a chunk of tiles: input transform to V, a product per position to M, output
// transform. A chunk is so small that V and M stay in the L2 cache.
#pragma once
#include <algorithm>

#include "common/cuda/copy.cuh"
#include "common/cuda/pipeline.cuh"
#include "common/workspace.h"
#include "winograd_conv2d/winograd_conv2d_maps.cuh"
#include "winograd_conv2d/winograd_conv2d_points.cuh"

namespace repkern {
namespace winograd {

// V and M of a chunk together: what stays in the L2 cache (A100 40 MB, H200 50 MB) beside the weights and the maps.
constexpr int64_t kChunkBytes = 24 << 20;
constexpr int64_t kMostChunkTiles = 1 << 20;

constexpr int kDepth = 2 * kSlab;  // depth of one stage
constexpr int kRowK = kDepth + 4;  // a row of V [tile][channel]: 8 rows x 4 columns in 32 different banks

template <class T>
constexpr int kStages = sizeof(T) == 4 ? 3 : 2;
template <bool kChannelsLast>
constexpr int kStageElements = kDepth * kRowM + (kChannelsLast ? kTileN * kRowK : kDepth * kRowN);

// Blocks that shall fit on one multiprocessor; the shared memory of sm_120 holds two.
template <class T>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kBlocksPerSm = 2;
#else
constexpr int kBlocksPerSm = sizeof(T) == 4 ? 3 : 2;
#endif

// V: [g, P, depth, tiles], M: [g, P, K/g, tiles]; channels_last: [g, P, tiles, depth] and [g, P, tiles, K/g].
struct Chunk {
  int64_t tiles;  // a multiple of kTileN
  int depth;      // C/g up to a multiple of kDepth; V is zero behind C/g and behind the last tile
  int64_t v_count, m_count;
  WideDivisor by_tiles, by_inputs, by_depth, by_outputs, by_kg;

  Chunk(const Geometry& geometry, int positions, size_t element) {
    const int64_t groups = geometry.p.groups;
    depth = ceil_div(geometry.cg, kDepth) * kDepth;
    const int64_t of_tile = positions * (groups * depth + geometry.p.k) * static_cast<int64_t>(element);
    const int64_t most = std::clamp<int64_t>(kChunkBytes / of_tile / kTileN * kTileN, kTileN, kMostChunkTiles);
    const int64_t chunks = (geometry.tiles + most - 1) / most, share = (geometry.tiles + chunks - 1) / chunks;
    tiles = (share + kTileN - 1) / kTileN * kTileN;
    v_count = groups * positions * depth * tiles;
    m_count = positions * geometry.p.k * tiles;
    by_tiles = WideDivisor(static_cast<unsigned>(tiles));
    by_inputs = WideDivisor(static_cast<unsigned>(groups * depth));
    by_depth = WideDivisor(static_cast<unsigned>(depth));
    by_outputs = WideDivisor(static_cast<unsigned>(geometry.p.k));
    by_kg = WideDivisor(static_cast<unsigned>(geometry.kg));
  }
};

// Which tile and channel thread `e` of a launch has: neighbours differ in what lies next to each other in memory.
struct Pair {
  unsigned tile, channel;
};
__device__ __forceinline__ Pair pair_of(unsigned e, bool channels_last, const WideDivisor& by_tiles,
                                        const WideDivisor& by_channels) {
  if (channels_last) {
    const unsigned tile = by_channels.divide(e);
    return {tile, e - tile * by_channels.value};
  }
  const unsigned channel = by_tiles.divide(e);
  return {e - channel * by_tiles.value, channel};
}

// Position 0 of a tile and channel in V or M, and the distance from one position to the next.
struct Line {
  int64_t at, step;

  __device__ Line(bool channels_last, int64_t tiles, int channels, int positions, int group, int channel, unsigned tile)
      : step(tiles * channels) {
    at = group * positions * step +
         (channels_last ? tile * static_cast<int64_t>(channels) + channel : channel * tiles + tile);
  }
};

// Blocks of winograd_input that share a multiprocessor: left to itself, the assembler gives F5 of bfloat16 on sm_90 fewer
// registers than it needs.
template <int M>
constexpr int kInputBlocks = M == 5 ? 4 : 0;

template <class X, int M>
__global__ void __launch_bounds__(kMapThreads, kInputBlocks<M>)
    winograd_input(const __grid_constant__ Geometry geometry, const __grid_constant__ Chunk chunk,
                   const __grid_constant__ TileRange range, Wide<X>* v) {
  using S = Wide<X>;
  constexpr int R = M + 2;
  const bool channels_last = geometry.p.channels_last != 0;
  const Pair pair = pair_of(blockIdx.x * kMapThreads + threadIdx.x, channels_last, chunk.by_tiles, chunk.by_inputs);
  const int group = chunk.by_depth.divide(pair.channel), c = pair.channel - group * chunk.depth;
  const Line line(channels_last, chunk.tiles, chunk.depth, R * R, group, c, pair.tile);
  S* to = v + line.at;

  const bool exists = pair.tile < range.count && c < geometry.cg;
  const Spot spot = spot_of<M>(geometry, range, pair.tile);
  const int64_t y = spot.y - geometry.p.padding, x = spot.x - geometry.p.padding;
  const X* from = static_cast<const X*>(geometry.p.x) + spot.n * geometry.in.n +
                  (static_cast<int64_t>(group) * geometry.cg + c) * geometry.in.c + y * geometry.in.h +
                  x * geometry.in.w;
  S half[R][R];
#pragma unroll
  for (int j = 0; j < R; ++j) {
    S d[R], made[R];
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const bool inside = exists && y + i >= 0 && y + i < geometry.p.h && x + j >= 0 && x + j < geometry.p.w;
      d[i] = inside ? widen(from[i * geometry.in.h + j * geometry.in.w]) : S(0);
    }
    to_points<M>(d, made);
#pragma unroll
    for (int i = 0; i < R; ++i) half[i][j] = made[i];
  }
#pragma unroll
  for (int i = 0; i < R; ++i) {
    S made[R];
    to_points<M>(half[i], made);
#pragma unroll
    for (int j = 0; j < R; ++j) to[(i * R + j) * line.step] = made[j];
  }
}

template <class X, int M>
__global__ void __launch_bounds__(kMapThreads)
    winograd_output(const __grid_constant__ Geometry geometry, const __grid_constant__ Chunk chunk,
                    const __grid_constant__ TileRange range, const Wide<X>* m) {
  using S = Wide<X>;
  constexpr int R = M + 2;
  const bool channels_last = geometry.p.channels_last != 0;
  const Pair pair = pair_of(blockIdx.x * kMapThreads + threadIdx.x, channels_last, chunk.by_tiles, chunk.by_outputs);
  if (pair.tile >= range.count || pair.channel >= geometry.p.k) return;
  const int group = chunk.by_kg.divide(pair.channel), k = pair.channel - group * geometry.kg;
  const Line line(channels_last, chunk.tiles, geometry.kg, R * R, group, k, pair.tile);
  const S* from = m + line.at;
  S half[M][R];
#pragma unroll
  for (int j = 0; j < R; ++j) {
    S v[R], made[M];
#pragma unroll
    for (int i = 0; i < R; ++i) v[i] = from[(i * R + j) * line.step];
    from_points<M>(v, made);
#pragma unroll
    for (int i = 0; i < M; ++i) half[i][j] = made[i];
  }
  S out[M][M];
#pragma unroll
  for (int i = 0; i < M; ++i) from_points<M>(half[i], out[i]);
  store_tile<X, M>(geometry, spot_of<M>(geometry, range, pair.tile), pair.channel, out);
}

struct Product {
  const void *packed, *v;
  void* m;
  int64_t tiles;
  int positions, cg, kg, depth, used_tiles;  // used_tiles: those of this chunk, in units of kTileN
  bool aligned;
};

// kDepth x kTileM of the packed weights, to [channel][output]; zeros where there is nothing.
template <class T, int kVector>
__device__ __forceinline__ void copy_weights(const Product& job, T* stage, int64_t group, int position, int k0,
                                             int c0) {
  constexpr int kLanes = kWinogradLanes, kPerRow = kLanes / kVector;
  const int blocks = ceil_div(job.kg, kLanes), first = k0 / kLanes;
  const T* packed = static_cast<const T*>(job.packed);
#pragma unroll(kVector > 1 ? 4 : 1)
  for (int e = threadIdx.x; e < kDepth * kTileM / kVector; e += kTileThreads) {
    const int lane = e % kPerRow * kVector, c = e / kPerRow % kDepth, block = e / (kPerRow * kDepth);
    const bool there = first + block < blocks && c0 + c < job.cg;
    const int64_t unit = group * blocks + first + block;
    const T* from = packed + ((unit * job.positions + position) * job.cg + c0 + c) * kLanes + lane;
    copy_async<kVector * sizeof(T)>(stage + c * kRowM + block * kLanes + lane, from, there);
  }
}

// A stage of V; all of it exists.
template <bool kChannelsLast, class T>
__device__ __forceinline__ void copy_points(const Product& job, T* stage, const T* v, int t0, int c0) {
  constexpr int kVector = 16 / sizeof(T), kPerRow = (kChannelsLast ? kDepth : kTileN) / kVector;
#pragma unroll
  for (int e = threadIdx.x; e < kDepth * kTileN / kVector; e += kTileThreads) {
    const int row = e / kPerRow, at = e % kPerRow * kVector;
    if constexpr (kChannelsLast) {
      copy_async<16>(stage + row * kRowK + at, v + static_cast<int64_t>(t0 + row) * job.depth + c0 + at, true);
    } else {
      copy_async<16>(stage + row * kRowN + at, v + (c0 + row) * job.tiles + t0 + at, true);
    }
  }
}

// M[group, position] = U[group, position] V[group, position].
template <class Tile, bool kChannelsLast>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerSm<typename Tile::Scalar>)
    winograd_product(const __grid_constant__ Product job) {
  using T = typename Tile::Scalar;
  constexpr int kLeft = kDepth * kRowM;
  RK_DYN_SMEM(T, shared);
  // The blocks that read the same tiles run side by side.
  const unsigned outputs = ceil_div(job.kg, kTileM);
  const int k0 = blockIdx.x % outputs * kTileM;
  unsigned rest = blockIdx.x / outputs;
  const int t0 = rest % job.used_tiles * kTileN;
  rest /= job.used_tiles;
  const int position = rest % job.positions;
  const int64_t group = rest / job.positions, line = group * job.positions + position;
  const T* v = static_cast<const T*>(job.v) + line * job.depth * job.tiles;

  auto load = [&](T* stage, int step) {
    if (job.aligned) {
      copy_weights<T, 16 / sizeof(T)>(job, stage, group, position, k0, step * kDepth);
    } else {
      copy_weights<T, 1>(job, stage, group, position, k0, step * kDepth);
    }
    copy_points<kChannelsLast>(job, stage + kLeft, v, t0, step * kDepth);
  };
  Tile tile;
  run_pipeline<kStages<T>, kStageElements<kChannelsLast>, kDepth>(
      tile, shared, job.depth / kDepth, load, [](const T* stage, int m, int k) { return stage[k * kRowM + m]; },
      [](const T* stage, int k, int n) { return stage[kLeft + (kChannelsLast ? n * kRowK + k : k * kRowN + n)]; });

  T* to = static_cast<T*>(job.m) + line * job.kg * job.tiles;
  tile.for_each([&](int m, int n, T value) {
    const int k = k0 + m, t = t0 + n;
    if (k < job.kg) to[kChannelsLast ? static_cast<int64_t>(t) * job.kg + k : k * job.tiles + t] = value;
  });
}

template <class Tile, bool kChannelsLast>
Status run_product(const Product& job, int64_t groups, void* stream) {
  using T = typename Tile::Scalar;
  const int64_t blocks = groups * job.positions * job.used_tiles * ceil_div(job.kg, kTileM);
  if (blocks > kMostBlocks) return "so many groups and channels exceed the largest CUDA grid";
  return RK_LAUNCH((winograd_product<Tile, kChannelsLast>), dim3(static_cast<unsigned>(blocks)), dim3(kTileThreads),
                   sizeof(T) * kStages<T> * kStageElements<kChannelsLast>, stream, job);
}

template <class Tile, class X, int M>
Status run_chunks(const Geometry& geometry, void* workspace, void* stream) {
  using S = Wide<X>;
  constexpr int kPositions = (M + 2) * (M + 2);
  const WinogradParams& p = geometry.p;
  const Chunk chunk(geometry, kPositions, sizeof(S));
  Workspace space(workspace);
  S* v = space.take<S>(chunk.v_count);
  S* m = space.take<S>(chunk.m_count);
  const int64_t inputs = p.groups * chunk.depth * chunk.tiles / kMapThreads, outputs = p.k * chunk.tiles / kMapThreads;
  Product job{p.packed, v, m, chunk.tiles, kPositions, geometry.cg, geometry.kg, chunk.depth, 0, false};
  job.aligned = reinterpret_cast<uintptr_t>(p.packed) % 16 == 0;
  for (int64_t first = 0; first < geometry.tiles; first += chunk.tiles) {
    const TileRange range = geometry.range(first, std::min(chunk.tiles, geometry.tiles - first));
    job.used_tiles = ceil_div(static_cast<int>(range.count), kTileN);
    if (Status problem = RK_LAUNCH((winograd_input<X, M>), dim3(static_cast<unsigned>(inputs)), dim3(kMapThreads), 0,
                                   stream, geometry, chunk, range, v))
      return problem;
    const Status problem = p.channels_last != 0 ? run_product<Tile, true>(job, p.groups, stream)
                                                : run_product<Tile, false>(job, p.groups, stream);
    if (problem != nullptr) return problem;
    if (Status status = RK_LAUNCH((winograd_output<X, M>), dim3(static_cast<unsigned>(outputs)), dim3(kMapThreads), 0,
                                  stream, geometry, chunk, range, m))
      return status;
  }
  return nullptr;
}

}  // namespace winograd
}  // namespace repkern
