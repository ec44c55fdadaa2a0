// grad_reduce[t, i] = sum over (o, position) of s[o] expand[o, t, position] grad[o, i, position].
// The depth is far larger than the result: it is cut into slices, which another kernel adds up in a fixed order.
#pragma once
#include "orepa_squeeze/orepa_squeeze_backward_plan.h"

namespace repkern {
namespace squeeze {

struct ReduceLayer {
  const void *grad, *expand, *scale;
  void* out;  // [slices][Cm][Ci/g]
  int first_tile, co_g, ci_g, cm_g, groups, kk;
};

constexpr int kReduceLayers = 64;
struct ReduceTable {
  int count;
  ReduceLayer layers[kReduceLayers];
};
static_assert(sizeof(ReduceTable) <= 4096, "kernel parameters hold 4 KB");

constexpr int kReduceStages = 2;
// A stage: rows of expand, rows of grad, the scale of each row.
template <class T>
constexpr int kReduceStage = reduce_depth(sizeof(T)) * (kRowM + kRowN + 1);
template <class T>
constexpr size_t kReduceSharedBytes = sizeof(T) * kReduceStages * kReduceStage<T>;

// Copies [o][c][position], c in [c0, c0 + kCount), to rows (o, position) of kRow elements; zeros where there is
// nothing.
template <class T, int kCount, int kRow, int kPositions>
class RowCopy {
 public:
  __device__ RowCopy(const T* from, int count, int c0, int kk, const DepthSteps& steps)
      : from_(from),
        count_(count),
        c0_(c0),
        kk_(kk),
        steps_(steps),
        by_chunk_(steps.chunk),
        by_channel_(steps.chunk * kCount) {}

  // Channels [o0, o0 + steps.channels) below `co_g`, positions from p0.
  __device__ __forceinline__ void load(T* to, int o0, int co_g, int p0) const {
    const int total = steps_.channels * steps_.chunk * kCount;
    for (int e = threadIdx.x; e < total; e += kTileThreads) {
      const int o = by_channel_.divide(e), rest = e - o * by_channel_.value, c = by_chunk_.divide(rest);
      const int p = rest - c * steps_.chunk;
      const bool there = o0 + o < co_g && c0_ + c < count_ && p0 + p < kk_;
      const T* source = from_ + (static_cast<int64_t>(o0 + o) * count_ + c0_ + c) * kk_ + p0 + p;
      copy_async<sizeof(T)>(to + (o * steps_.chunk + p) * kRow + c, source, there);
    }
  }

 private:
  const T* from_;
  int count_, c0_, kk_;
  DepthSteps steps_;
  Divisor by_chunk_, by_channel_;
};

// The same for 3x3: each warp takes one of the four channels; its pattern repeats every 9 x 32 elements, 32 columns on.
template <class T, int kCount, int kRow>
class RowCopy<T, kCount, kRow, 9> {
 public:
  __device__ RowCopy(const T* from, int count, int c0, int, const DepthSteps&)
      : channel_(count * 9), left_((count - c0) * 9) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    from_ = from + static_cast<int64_t>(warp) * channel_ + c0 * 9 + lane;
#pragma unroll
    for (int piece = 0; piece < 9; ++piece) {
      const int e = lane + piece * 32;
      to_[piece] = (warp * 9 + e % 9) * kRow + e / 9;
    }
  }

  __device__ __forceinline__ void load(T* to, int o0, int co_g, int) const {
    const int lane = threadIdx.x % 32, left = o0 + static_cast<int>(threadIdx.x) / 32 < co_g ? left_ - lane : 0;
    const T* source = from_ + static_cast<int64_t>(o0) * channel_;
#pragma unroll
    for (int repeat = 0; repeat < kCount / 32; ++repeat)
#pragma unroll
      for (int piece = 0; piece < 9; ++piece) {
        const int e = (repeat * 9 + piece) * 32;
        const bool there = e < left;
        copy_async<sizeof(T)>(to + to_[piece] + repeat * 32, source + e, there);
      }
  }

 private:
  const T* from_;
  int channel_, left_;
  int to_[9];
};

template <class Tile, int kPositions>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerSm<typename Tile::Scalar, kPositions>)
    squeeze_grad_reduce(const __grid_constant__ ReduceTable table) {
  using T = typename Tile::Scalar;
  RK_DYN_SMEM(T, shared);
  int which = 0;
  while (which + 1 < table.count && static_cast<int>(blockIdx.x) >= table.layers[which + 1].first_tile) ++which;
  const ReduceLayer& layer = table.layers[which];
  constexpr int kDeep = reduce_depth(sizeof(T)), kLeft = kDeep * kRowM, kRight = kDeep * kRowN;
  const DepthSteps steps(kPositions != 0 ? kPositions : layer.kk, kDeep);
  const int m_tiles = ceil_div(layer.cm_g, kTileM), n_tiles = ceil_div(layer.ci_g, kTileN);
  int index = blockIdx.x - layer.first_tile;
  const int m0 = index % m_tiles * kTileM, n0 = index / m_tiles % n_tiles * kTileN;
  index /= m_tiles * n_tiles;
  const int group = index % layer.groups, slice = index / layer.groups;
  const int first = slice * kStepsPerSlice, count = min(kStepsPerSlice, steps.count(layer.co_g) - first);

  // Rows that fill a stage up to whole slabs are never copied to.
  const int used = steps.channels * steps.chunk;
  for (int stage = 0; stage < kReduceStages; ++stage) {
    T* rows = shared + stage * kReduceStage<T>;
    for (int e = used * kRowM + threadIdx.x; e < kLeft; e += kTileThreads) rows[e] = T(0);
    for (int e = used * kRowN + threadIdx.x; e < kRight; e += kTileThreads) rows[kLeft + e] = T(0);
  }

  const int64_t kernel = static_cast<int64_t>(layer.co_g) * layer.kk;
  const RowCopy<T, kTileM, kRowM, kPositions> left(static_cast<const T*>(layer.expand) + group * kernel * layer.cm_g,
                                                   layer.cm_g, m0, layer.kk, steps);
  const RowCopy<T, kTileN, kRowN, kPositions> right(static_cast<const T*>(layer.grad) + group * kernel * layer.ci_g,
                                                    layer.ci_g, n0, layer.kk, steps);
  const bool scaled = layer.scale != nullptr;
  const T* scale = static_cast<const T*>(layer.scale) + group * layer.co_g;
  const int my_channel = static_cast<int>(threadIdx.x) / steps.chunk;

  Tile tile;
  auto load = [&](T* stage, int step) {
    const int block = (first + step) / steps.chunks, o0 = block * steps.channels;
    const int p0 = (first + step - block * steps.chunks) * steps.chunk;
    left.load(stage, o0, layer.co_g, p0);
    right.load(stage + kLeft, o0, layer.co_g, p0);
    if (scaled && threadIdx.x < kDeep) {
      const bool there = my_channel < steps.channels && o0 + my_channel < layer.co_g;
      copy_async<sizeof(T)>(stage + kLeft + kRight + threadIdx.x, scale + o0 + my_channel, there);
    }
  };
  run_pipeline<kReduceStages, kReduceStage<T>, kDeep>(
      tile, shared, count, load,
      [&](const T* stage, int m, int k) {
        const T value = stage[k * kRowM + m];
        return scaled ? value * stage[kLeft + kRight + k] : value;
      },
      [](const T* stage, int k, int n) { return stage[kLeft + k * kRowN + n]; });

  T* out = static_cast<T*>(layer.out) + (static_cast<int64_t>(slice) * layer.groups + group) * layer.cm_g * layer.ci_g;
  tile.for_each([&](int m, int n, T value) {
    if (m0 + m < layer.cm_g && n0 + n < layer.ci_g) out[(m0 + m) * layer.ci_g + n0 + n] = value;
  });
}

}  // namespace squeeze
}  // namespace repkern
