// Statistics and sums of a block's channels. Orders of summation follow from the launch alone: no atomics.
#pragma once
#include "branch_norm_add/branch_norm_add_walk.cuh"

namespace repkern {
namespace norm {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Count, mean and sum of squared deviations (Welford's), merged as by Chan, Golub and LeVeque.
template <class A>
struct Moments {
  A n = A(0), mean = A(0), squares = A(0);

  __device__ __forceinline__ void merge(const Moments& other) {
    const A total = n + other.n, part = other.n == A(0) ? A(0) : quick_quotient(other.n, total),
            apart = other.mean - mean;
    mean = std::fma(apart, part, mean);
    squares += other.squares + apart * apart * n * part;
    n = total;
  }
};

// A thread's share of a map, less the channel's origin: with values that count from one of their own, a mean far above
// the deviation costs no accuracy. Every tile of kUnroll vectors is centred on its own mean.
template <class K>
__device__ void thread_moments(const Walk<K>& walk, const void* map, Moments<typename K::A> (&found)[K::kChannels]) {
  using A = typename K::A;
  A origin[K::kChannels];
#pragma unroll
  for (int s = 0; s < K::kChannels; ++s) origin[s] = walk.origin(map, threadIdx.x * K::kChannels + s);
  for (unsigned i = walk.begin(); i < walk.end(); i += K::kUnroll * walk.step()) {
    typename K::Values raw[K::kUnroll];
    int vectors = 0;
#pragma unroll
    for (int u = 0; u < K::kUnroll; ++u) {
      const unsigned position = i + u * walk.step();
      raw[u] = {};
      if (position < walk.end()) {
        raw[u] = walk.load(map, walk.at(position));
        ++vectors;
      }
    }
    Moments<A> tile[K::kChannels];
#pragma unroll
    for (int u = 0; u < K::kUnroll; ++u)
#pragma unroll
      for (int j = 0; j < K::kVector; ++j) {
        if (u < vectors) tile[K::channel(j)].mean += widen(raw[u].at[j]) - origin[K::channel(j)];
      }
    const A count = static_cast<A>(vectors * K::kShare), inverse = quick_quotient(A(1), count);
#pragma unroll
    for (int s = 0; s < K::kChannels; ++s) {
      tile[s].n = count;
      tile[s].mean *= inverse;
    }
#pragma unroll
    for (int u = 0; u < K::kUnroll; ++u)
#pragma unroll
      for (int j = 0; j < K::kVector; ++j) {
        const A apart = widen(raw[u].at[j]) - origin[K::channel(j)] - tile[K::channel(j)].mean;
        if (u < vectors) tile[K::channel(j)].squares += apart * apart;
      }
#pragma unroll
    for (int s = 0; s < K::kChannels; ++s) found[s].merge(tile[s]);
  }
}

// Where a warp leaves its results for the others: [values][warps][width].
template <class K>
class Exchange {
 public:
  using A = typename K::A;

  __device__ Exchange(const Walk<K>& walk, A* shared)
      : shared_(shared), width_(walk.width()), warp_(walk.thread() / 32), warps_(walk.threads() / 32) {}

  // Whether this thread stands for all lanes of its warp that have the same channels.
  __device__ __forceinline__ bool leads(const Walk<K>& walk) const {
    return walk.thread() % 32 < static_cast<int>(blockDim.x);
  }
  __device__ __forceinline__ void put(int value, int s, A v) const {
    shared_[(value * warps_ + warp_) * width_ + threadIdx.x * K::kChannels + s] = v;
  }
  __device__ __forceinline__ A get(int value, int warp, int w) const {
    return shared_[(value * warps_ + warp) * width_ + w];
  }
  __device__ __forceinline__ int warps() const { return warps_; }

 private:
  A* shared_;
  int width_, warp_, warps_;
};

// finish(w, moments of the block's w-th channel less its origin), by one thread each. Ends past a barrier.
template <class K, class Finish>
__device__ void block_moments(const Walk<K>& walk, const void* map, typename K::A* shared, Finish finish) {
  using A = typename K::A;
  Moments<A> own[K::kChannels];
  thread_moments(walk, map, own);
  const Exchange<K> exchange(walk, shared);
  for (int lanes = 16; lanes >= static_cast<int>(blockDim.x); lanes /= 2) {
#pragma unroll
    for (int s = 0; s < K::kChannels; ++s) {
      Moments<A> other;
      other.n = __shfl_xor_sync(kAllLanes, own[s].n, lanes);
      other.mean = __shfl_xor_sync(kAllLanes, own[s].mean, lanes);
      other.squares = __shfl_xor_sync(kAllLanes, own[s].squares, lanes);
      own[s].merge(other);
    }
  }
  if (exchange.leads(walk)) {
#pragma unroll
    for (int s = 0; s < K::kChannels; ++s) {
      exchange.put(0, s, own[s].n);
      exchange.put(1, s, own[s].mean);
      exchange.put(2, s, own[s].squares);
    }
  }
  __syncthreads();
  for (int w = walk.thread(); w < walk.width(); w += walk.threads()) {
    Moments<A> all;
    for (int warp = 0; warp < exchange.warps(); ++warp) {
      all.merge({exchange.get(0, warp, w), exchange.get(1, warp, w), exchange.get(2, warp, w)});
    }
    if (walk.has(w)) finish(w, all);
  }
  __syncthreads();
}

// The threads' sums [kMost][channels], `count` of them in use. finish(value, w, sum over the block), by one thread
// each. Ends past a barrier.
template <class K, int kMost, class Finish>
__device__ void block_sums(const Walk<K>& walk, typename K::A (&own)[kMost][K::kChannels], int count,
                           typename K::A* shared, Finish finish) {
  using A = typename K::A;
  const Exchange<K> exchange(walk, shared);
#pragma unroll
  for (int value = 0; value < kMost; ++value) {
    if (value >= count) break;
#pragma unroll
    for (int s = 0; s < K::kChannels; ++s) {
      A sum = own[value][s];
      for (int lanes = 16; lanes >= static_cast<int>(blockDim.x); lanes /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      }
      if (exchange.leads(walk)) exchange.put(value, s, sum);
    }
  }
  __syncthreads();
  for (int item = walk.thread(); item < count * walk.width(); item += walk.threads()) {
    const int value = item / walk.width(), w = item % walk.width();
    A sum = A(0);
    for (int warp = 0; warp < exchange.warps(); ++warp) sum += exchange.get(value, warp, w);
    if (walk.has(w)) finish(value, w, sum);
  }
  __syncthreads();
}

// The parts of all splits -> the whole. A block (32, rows) has 32 channels of the blockIdx.y-th value; rows: a power of
// two, at most kMergeRows.
constexpr int kMergeRows = 32;

// from(split) -> a part of this thread's channel; together(total, part) adds one. The whole, in the threads of row 0.
template <class Part, class From, class Together>
__device__ __forceinline__ Part merge_splits(int splits, bool there, Part* shared, From from, Together together) {
  Part total{};
  if (there) {
#pragma unroll 4
    for (int split = threadIdx.y; split < splits; split += blockDim.y) together(total, from(split));
  }
  Part* own = shared + threadIdx.y * 32 + threadIdx.x;
  *own = total;
  for (unsigned rows = blockDim.y / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (threadIdx.y < rows) {
      together(total, own[rows * 32]);
      *own = total;
    }
  }
  return total;
}

}  // namespace norm
}  // namespace repkern
