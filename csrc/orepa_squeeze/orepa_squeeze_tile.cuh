// How the tile products of orepa_squeeze get their operands. Names as in docs/ops/orepa_squeeze.md; kk = K*K.
#pragma once
#include "common/cuda/copy.cuh"
#include "common/cuda/index.cuh"
#include "common/cuda/pipeline.cuh"
#include "orepa_squeeze/orepa_squeeze.h"

namespace repkern {
namespace squeeze {

constexpr int kDepth = 2 * kSlab;  // depth of one stage
constexpr int kRowK = kDepth + 4;  // a row of the [m][k] operand: 8 rows x 4 columns in 32 different banks

template <class T>
constexpr int kStages = sizeof(T) == 4 ? 3 : 2;
template <class T>
constexpr int kStageElements = (kTileM * kRowK > kDepth * kRowM ? kTileM * kRowK : kDepth * kRowM) + kDepth * kRowN;
template <class T>
constexpr size_t kSharedBytes =
    sizeof(T) * (kStages<T> * kStageElements<T> > kTileM * kRowC ? kStages<T> * kStageElements<T> : kTileM * kRowC);

// Blocks that shall fit on one multiprocessor; python_tests/cuda/registers.csv holds the registers this leaves each
// thread. sm_120 has less than half the shared memory of the others, so that its registers are not what limits it.
template <class T, int kPositions>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kBlocksPerSm = 2;
#else
constexpr int kBlocksPerSm = sizeof(T) == 4 && kPositions == 9 ? 3 : 2;
#endif

// The columns (o, position) of a tile: whole output channels where a kernel fits into a tile, else a chunk of one.
struct Columns {
  int kk, chunk, chunks, per_tile;  // positions, positions of a chunk, chunks of a kernel, channels of a tile

  __host__ __device__ explicit Columns(int positions) : kk(positions) {
    chunks = ceil_div(kk, kTileN);
    chunk = ceil_div(kk, chunks);
    per_tile = kTileN / chunk;
  }
  __host__ __device__ int tiles(int channels) const { return ceil_div(channels, per_tile) * chunks; }
};

// Where a block works: `index` counts tiles of a layer, rows fastest.
struct Place {
  int group, m0, o0, p0, channels, positions, slice;  // slice: which of the tiles that share an output channel

  __device__ Place(int index, int rows, int channels_per_group, const Columns& columns) {
    const int m_tiles = ceil_div(rows, kTileM), o_tiles = ceil_div(channels_per_group, columns.per_tile);
    const int row_tile = index % m_tiles;
    index /= m_tiles;
    const int chunk = index % columns.chunks;
    index /= columns.chunks;
    const int o_tile = index % o_tiles;
    group = index / o_tiles;
    m0 = row_tile * kTileM;
    o0 = o_tile * columns.per_tile;
    p0 = chunk * columns.chunk;
    channels = min(columns.per_tile, channels_per_group - o0);
    positions = min(columns.chunk, columns.kk - p0);
    slice = row_tile * columns.chunks + chunk;
  }
};

// Copies [channel][k][position] from global memory to [k][column]; zeros where there is nothing. Any kernel size.
template <class T, int kPositions>
class ColumnCopy {
 public:
  __device__ ColumnCopy(const T* from, int depth, const Columns& columns, const Place& place)
      : from_(from),
        depth_(depth),
        columns_(columns),
        place_(place),
        by_chunk_(columns.chunk),
        by_channel_(columns.chunk * kDepth) {}

  // Stage `stage` of the depth, into `to`.
  __device__ __forceinline__ void load(T* to, int stage) const {
    const int total = columns_.per_tile * columns_.chunk * kDepth;
    for (int e = threadIdx.x; e < total; e += kTileThreads) {
      const int o = by_channel_.divide(e), rest = e - o * by_channel_.value, k = by_chunk_.divide(rest);
      const int p = rest - k * columns_.chunk, at = stage * kDepth + k;
      const bool there = o < place_.channels && p < place_.positions && at < depth_;
      const T* source = from_ + static_cast<int64_t>((place_.o0 + o) * depth_ + at) * columns_.kk + place_.p0 + p;
      copy_async<sizeof(T)>(to + k * kRowN + o * columns_.chunk + p, source, there);
    }
  }

 private:
  const T* from_;
  int depth_;
  const Columns& columns_;
  const Place& place_;
  Divisor by_chunk_, by_channel_;
};

// The same for 3x3: a channel's stage is one run of memory, and each warp takes every fourth channel.
template <class T>
class ColumnCopy<T, 9> {
 public:
  __device__ ColumnCopy(const T* from, int depth, const Columns&, const Place& place)
      : depth_(depth * 9), channels_(place.channels) {
    const int lane = threadIdx.x % 32;
    from_ = from + static_cast<int64_t>(place.o0 + warp()) * depth_ + lane;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int e = lane + piece * 32;
      to_[piece] = e / 9 * kRowN + e % 9 + warp() * 9;
    }
  }

  __device__ __forceinline__ void load(T* to, int stage) const {
    const int left = depth_ - stage * kRun - static_cast<int>(threadIdx.x) % 32;
    const T* source = from_ + stage * kRun;
#pragma unroll
    for (int step = 0; step < kChannels; step += kWarps) {
      const bool exists = warp() + step < channels_;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const bool here = (piece + 1 < kPieces || threadIdx.x % 32 < kRun % 32) && warp() + step < kChannels;
        const bool there = exists && piece * 32 < left;
        if (here) copy_async<sizeof(T)>(to + to_[piece] + step * 9, source + piece * 32, there);
      }
      source += static_cast<int64_t>(kWarps) * depth_;
    }
  }

 private:
  static constexpr int kRun = kDepth * 9, kPieces = ceil_div(kRun, 32), kWarps = kTileThreads / 32,
                       kChannels = kTileN / 9;
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }

  const T* from_;
  int depth_, channels_;
  int to_[kPieces];
};

// Copies rows [row0, row0 + kRows) x columns [column0, column0 + kColumns) of a matrix [rows][columns] to rows of
// `kRow` elements in shared memory; zeros outside. 16 bytes at once when the caller knows that all is aligned.
template <class T, int kRows, int kColumns, int kRow>
__device__ __forceinline__ void copy_matrix(T* to, const T* from, int rows, int columns, int row0, int column0,
                                            bool aligned) {
  constexpr int kVector = 16 / sizeof(T);
  if (aligned) {
    constexpr int kPerRow = kColumns / kVector;
#pragma unroll
    for (int e = threadIdx.x; e < kRows * kPerRow; e += kTileThreads) {
      const int r = e / kPerRow, c = e % kPerRow * kVector;
      const bool there = row0 + r < rows && column0 + c < columns;
      copy_async<16>(to + r * kRow + c, from + static_cast<int64_t>(row0 + r) * columns + column0 + c, there);
    }
  } else {
#pragma unroll 1  // the rare path must not take registers from the other
    for (int e = threadIdx.x; e < kRows * kColumns; e += kTileThreads) {
      const int r = e / kColumns, c = e % kColumns;
      const bool there = row0 + r < rows && column0 + c < columns;
      copy_async<sizeof(T)>(to + r * kRow + c, from + static_cast<int64_t>(row0 + r) * columns + column0 + c, there);
    }
  }
}

// tile += A·B over `depth`, A = reduce (or its transpose), B = the columns of a kernel. Ends with the result staged in
// shared memory as [m][kRowC] and all threads past a barrier.
// kTransposed: false: reduce[k][m]; true: reduce[m][k]. `rows` and `columns` are those of the matrix in memory.
template <class Tile, bool kTransposed, class Right>
__device__ __forceinline__ void multiply(typename Tile::Scalar* shared, const typename Tile::Scalar* reduce, int rows,
                                         int columns, bool aligned, const Right& right, int depth, int m0) {
  using T = typename Tile::Scalar;
  constexpr int kLeft = kStageElements<T> - kDepth * kRowN;
  auto load = [&](T* stage, int step) {
    if constexpr (kTransposed) {
      copy_matrix<T, kTileM, kDepth, kRowK>(stage, reduce, rows, columns, m0, step * kDepth, aligned);
    } else {
      copy_matrix<T, kDepth, kTileM, kRowM>(stage, reduce, rows, columns, step * kDepth, m0, aligned);
    }
    right.load(stage + kLeft, step);
  };
  Tile tile;
  run_pipeline<kStages<T>, kStageElements<T>, kDepth>(
      tile, shared, ceil_div(depth, kDepth), load,
      [](const T* stage, int m, int k) { return kTransposed ? stage[m * kRowK + k] : stage[k * kRowM + m]; },
      [](const T* stage, int k, int n) { return stage[kLeft + k * kRowN + n]; });
  tile.for_each([&](int m, int n, T value) { shared[m * kRowC + n] = value; });
  __syncthreads();
}

inline bool is_aligned(const void* pointer, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_bytes % 16 == 0;
}

// Null if every tensor of the layer can be indexed with 31 bits and every small count fits the kernels.
inline Status check_sizes(const SqueezeLayer& layer) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  const int64_t kk = layer.k * layer.k, e = layer.expansion > 0 ? layer.expansion : 1, cm = layer.cm > 0 ? layer.cm : 1;
  if (layer.co * (layer.ci / layer.groups) * kk >= kLimit || layer.co * (cm / layer.groups) * kk >= kLimit ||
      layer.ci * e * kk >= kLimit || layer.co * (layer.ci / layer.groups) * e >= kLimit) {
    return "a tensor has 2^31 elements or more, which the CUDA kernels do not index";
  }
  if (layer.k > 101) return "kernel sizes above 101 are not supported by the CUDA kernels";
  return nullptr;
}

}  // namespace squeeze
}  // namespace repkern
