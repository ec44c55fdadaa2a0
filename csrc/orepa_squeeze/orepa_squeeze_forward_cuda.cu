// Forward: one tile product for the 1x1-KxK branch, the five other branches in its epilogue, all layers in one launch.
#include <algorithm>
#include <vector>

#include "common/cuda/math.cuh"
#include "common/cuda/store.cuh"
#include "orepa_squeeze/orepa_squeeze_tile.cuh"

namespace repkern {
namespace {

using namespace squeeze;

struct ForwardLayer {
  void* out;
  const void *origin, *avg, *prior, *pointwise, *reduce, *expand, *depthwise, *project, *prior_filter;
  const void* scale[kSqueezeBranches];
  int first_tile, co_g, ci_g, cm_g, kk, expansion;
  bool identity_reduce, aligned;
};

constexpr int kLayersPerLaunch = 24;
struct ForwardTable {
  int count;
  DType out_dtype;
  bool channels_last;
  ForwardLayer layers[kLayersPerLaunch];
};
static_assert(sizeof(ForwardTable) <= 4096, "kernel parameters hold 4 KB");

template <class T>
__device__ __forceinline__ T scale_of(const ForwardLayer& layer, int branch, int o) {
  return layer.scale[branch] == nullptr ? T(1) : static_cast<const T*>(layer.scale[branch])[o];
}

// What one thread adds to the product for output channel o: scales read once a channel.
template <class T>
class Epilogue {
 public:
  __device__ Epilogue(const ForwardLayer& layer, int o) : layer_(layer), o_(o) {
#pragma unroll
    for (int branch = 0; branch < 5; ++branch) scale_[branch] = scale_of<T>(layer, branch, o);
    scale_[1] /= static_cast<T>(layer.kk);
  }

  // `staged`: the 1x1-KxK branch without its identity, and scaled already where Separable was at work.
  __device__ __forceinline__ T value(T staged, int i, int p) const {
    const int channel = o_ * layer_.ci_g + i, at = channel * layer_.kk + p;
    T sum = layer_.project != nullptr ? staged : scale_[3] * staged;
    if (layer_.identity_reduce && layer_.expand != nullptr) {
      const T* expand = static_cast<const T*>(layer_.expand) + static_cast<int64_t>(o_) * layer_.cm_g * layer_.kk + p;
      T identity = T(0);
      for (int t = i; t < layer_.cm_g; t += layer_.ci_g) identity += expand[t * layer_.kk];
      sum += scale_[3] * identity;
    }
    if (layer_.origin != nullptr) sum += scale_[0] * static_cast<const T*>(layer_.origin)[at];
    if (layer_.avg != nullptr) sum += scale_[1] * static_cast<const T*>(layer_.avg)[channel];
    if (layer_.prior != nullptr) {
      const T filter = static_cast<const T*>(layer_.prior_filter)[o_ * layer_.kk + p];
      sum += scale_[2] * (static_cast<const T*>(layer_.prior)[channel] * filter);
    }
    if (layer_.pointwise != nullptr && p == layer_.kk / 2) {
      sum += scale_[4] * static_cast<const T*>(layer_.pointwise)[channel];
    }
    return sum;
  }

 private:
  const ForwardLayer& layer_;
  int o_;
  T scale_[5];  // all but the separable branch
};

constexpr int kPiece = 9;  // positions of the separable branch that are worked on at once
// Filters held in shared memory at once, as [m][filter][position] in rows of odd length: lanes read different banks.
template <class T>
constexpr int kFilters = sizeof(T) == 4 ? 8 : 4;
template <class T>
constexpr int kFilterRow = kFilters<T> * kPiece + (kFilters<T> % 2 == 0);
template <class T>
constexpr size_t kForwardShared = kSharedBytes<T> > sizeof(T) * kTileM*(kRowC + kFilterRow<T>)
                                      ? kSharedBytes<T>
                                      : sizeof(T) * kTileM * (kRowC + kFilterRow<T>);

// staged = s3 staged + s5 (project · depthwise), piece by piece. A thread keeps one input i and several channels o in
// registers, so that a filter is read once for all of them.
template <class T>
class Separable {
 public:
  __device__ Separable(const ForwardLayer& layer, const Columns& columns, const Place& place, T* shared)
      : layer_(layer),
        place_(place),
        chunk_(columns.chunk),
        rows_(min(kTileM, layer.ci_g - place.m0)),
        staged_(shared + threadIdx.x % kTileM * kRowC),
        filters_(shared + kTileM * kRowC) {}

  // All threads of the block; they are past a barrier before and after.
  __device__ __forceinline__ void add() const {
    for (int p0 = 0; p0 < place_.positions; p0 += kPiece)
      for (int q0 = 0; q0 < layer_.expansion; q0 += kFilters<T>) {
        const int positions = min(kPiece, place_.positions - p0), count = min(kFilters<T>, layer_.expansion - q0);
        load(p0, positions, q0, count);
        __syncthreads();
        if (static_cast<int>(threadIdx.x) % kTileM < rows_) {
          for (int c0 = threadIdx.x / kTileM; c0 < place_.channels; c0 += kSides * kChannels)
            multiply_add(c0, p0, positions, q0, count);
        }
        __syncthreads();
      }
  }

 private:
  static constexpr int kChannels = 4, kSides = kTileThreads / kTileM;

  __device__ __forceinline__ void load(int p0, int positions, int q0, int count) const {
    const int e = layer_.expansion, row = count * positions;
    const Divisor by_row(row), by_position(positions);
    const T* depthwise = static_cast<const T*>(layer_.depthwise) + place_.p0 + p0;
    const int64_t first = static_cast<int64_t>(place_.group * layer_.ci_g + place_.m0) * e + q0;
    for (int x = threadIdx.x; x < rows_ * row; x += kTileThreads) {
      const int i = by_row.divide(x), rest = x - i * row, q = by_position.divide(rest), p = rest - q * positions;
      filters_[i * kFilterRow<T> + q * kPiece + p] = depthwise[(first + i * e + q) * layer_.kk + p];
    }
  }

  __device__ __forceinline__ void multiply_add(int c0, int p0, int positions, int q0, int count) const {
    const int e = layer_.expansion, m = threadIdx.x % kTileM, o0 = place_.group * layer_.co_g + place_.o0 + c0;
    const T* project =
        static_cast<const T*>(layer_.project) + (static_cast<int64_t>(o0) * layer_.ci_g + place_.m0 + m) * e + q0;
    T sum[kChannels][kPiece] = {};
    for (int q = 0; q < count; ++q) {
      T filter[kPiece];
#pragma unroll
      for (int p = 0; p < kPiece; ++p) filter[p] = p < positions ? filters_[m * kFilterRow<T> + q * kPiece + p] : T(0);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c0 + c * kSides >= place_.channels) break;
        const T weight = project[static_cast<int64_t>(c * kSides) * layer_.ci_g * e + q];
#pragma unroll
        for (int p = 0; p < kPiece; ++p) sum[c][p] += weight * filter[p];
      }
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c0 + c * kSides >= place_.channels) break;
      const T scale = scale_of<T>(layer_, 5, o0 + c * kSides);
      const T before = q0 > 0 ? T(1) : scale_of<T>(layer_, 3, o0 + c * kSides);
      const bool there = q0 > 0 || layer_.expand != nullptr;
      T* to = staged_ + (c0 + c * kSides) * chunk_ + p0;
#pragma unroll
      for (int p = 0; p < kPiece; ++p) {
        if (p < positions) to[p] = (there ? before * to[p] : T(0)) + scale * sum[c][p];
      }
    }
  }

  const ForwardLayer& layer_;
  const Place& place_;
  int chunk_, rows_;
  T *staged_, *filters_;
};

// kPositions: 9 when every layer is 3x3, else 0.
template <class Tile, int kPositions>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerSm<typename Tile::Scalar, kPositions>)
    squeeze_forward(const __grid_constant__ ForwardTable table) {
  using T = typename Tile::Scalar;
  RK_DYN_SMEM(T, shared);
  int which = 0;
  while (which + 1 < table.count && static_cast<int>(blockIdx.x) >= table.layers[which + 1].first_tile) ++which;
  const ForwardLayer& layer = table.layers[which];
  const Columns columns(kPositions != 0 ? kPositions : layer.kk);
  const Place place(blockIdx.x - layer.first_tile, layer.ci_g, layer.co_g, columns);

  if (layer.expand != nullptr) {
    const int64_t kernel = static_cast<int64_t>(layer.co_g) * layer.cm_g * layer.kk;
    const ColumnCopy<T, kPositions> right(static_cast<const T*>(layer.expand) + place.group * kernel, layer.cm_g,
                                          columns, place);
    const T* reduce = static_cast<const T*>(layer.reduce) + static_cast<int64_t>(place.group) * layer.cm_g * layer.ci_g;
    multiply<Tile, false>(shared, reduce, layer.cm_g, layer.ci_g, layer.aligned, right, layer.cm_g, place.m0);
  }

  if (layer.project != nullptr) Separable<T>(layer, columns, place, shared).add();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = kTileThreads / 32;
  const int rows = min(kTileM, layer.ci_g - place.m0);
  const Divisor by_position(place.positions);
  for (int c = warp; c < place.channels; c += warps) {
    const int o = place.group * layer.co_g + place.o0 + c;
    const Epilogue<T> epilogue(layer, o);
    for (int e = lane; e < rows * place.positions; e += 32) {
      const int m = by_position.divide(e), q = e - m * place.positions, p = place.p0 + q, i = place.m0 + m;
      T* staged = shared + m * kRowC + c * columns.chunk + q;
      const T value = epilogue.value(layer.expand != nullptr || layer.project != nullptr ? *staged : T(0), i, p);
      if (table.channels_last) {
        *staged = value;
      } else {
        store_as(layer.out, static_cast<size_t>(o * layer.ci_g + i) * layer.kk + p, value, table.out_dtype);
      }
    }
  }
  if (!table.channels_last) return;

  __syncthreads();
  const Divisor by_row(rows);
  const int count = place.channels * place.positions * rows;
  for (int e = threadIdx.x; e < count; e += kTileThreads) {
    const int n = by_row.divide(e), m = e - n * rows, c = by_position.divide(n), q = n - c * place.positions;
    const int o = place.group * layer.co_g + place.o0 + c;
    store_as(layer.out, static_cast<size_t>(o * layer.kk + place.p0 + q) * layer.ci_g + place.m0 + m,
             shared[m * kRowC + c * columns.chunk + q], table.out_dtype);
  }
}

ForwardLayer describe(const SqueezeLayer& in, void* out, size_t element) {
  ForwardLayer layer{};
  layer.out = out;
  layer.origin = in.origin;
  layer.avg = in.avg;
  layer.prior = in.prior;
  layer.pointwise = in.pointwise;
  layer.reduce = in.reduce;
  layer.expand = in.expand;
  layer.depthwise = in.depthwise;
  layer.project = in.project;
  layer.prior_filter = in.prior_filter;
  for (int branch = 0; branch < kSqueezeBranches; ++branch) layer.scale[branch] = in.scale[branch];
  layer.co_g = static_cast<int>(in.co / in.groups);
  layer.ci_g = static_cast<int>(in.ci / in.groups);
  layer.cm_g = static_cast<int>(in.cm / in.groups);
  layer.kk = static_cast<int>(in.k * in.k);
  layer.expansion = static_cast<int>(in.expansion);
  layer.identity_reduce = in.identity_reduce != 0;
  layer.aligned = is_aligned(in.reduce, layer.ci_g * static_cast<int64_t>(element));
  return layer;
}

struct Call {
  const SqueezeLayer* layers;
  void* const* out;
  DType dtype, out_dtype;
  bool channels_last;
  void* stream;
};

using Indices = std::vector<int>::const_iterator;

template <class Tile, int kPositions>
Status launch_all(const Call& call, Indices first, Indices last) {
  while (first != last) {
    ForwardTable table{};
    table.count = static_cast<int>(std::min<std::ptrdiff_t>(kLayersPerLaunch, last - first));
    table.out_dtype = call.out_dtype;
    table.channels_last = call.channels_last;
    int tiles = 0;
    for (int i = 0; i < table.count; ++i) {
      const SqueezeLayer& in = call.layers[first[i]];
      ForwardLayer& layer = table.layers[i];
      layer = describe(in, call.out[first[i]], size_of(call.dtype));
      layer.first_tile = tiles;
      tiles += static_cast<int>(in.groups) * ceil_div(layer.ci_g, kTileM) * Columns(layer.kk).tiles(layer.co_g);
    }
    const Status status = RK_LAUNCH((squeeze_forward<Tile, kPositions>), dim3(tiles), dim3(kTileThreads),
                                    kForwardShared<typename Tile::Scalar>, call.stream, table);
    if (status != nullptr) return status;
    first += table.count;
  }
  return nullptr;
}

}  // namespace

size_t orepa_squeeze_forward_cuda_workspace(const SqueezeLayer*, int, DType) { return 0; }

Status orepa_squeeze_forward_cuda(const SqueezeLayer* layers, void* const* out, int count, DType dtype, DType out_dtype,
                                  bool channels_last, int math, void*, void* stream) {
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) {
    if (Status problem = check_sizes(layers[i])) return problem;
    order[i] = i;
  }
  // The deepest products first: the short tiles of the others fill the last wave.
  auto depth = [&](int i) { return layers[i].expand == nullptr ? 0 : layers[i].cm / layers[i].groups; };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return depth(a) > depth(b); });

  const auto middle = std::stable_partition(order.begin(), order.end(), [&](int i) { return layers[i].k == 3; });

  return with_tile(dtype, math, [&](auto tile) -> Status {
    using Tile = decltype(tile);
    const Call call{layers, out, dtype, out_dtype, channels_last, stream};
    constexpr int kFast = sizeof(typename Tile::Scalar) == 4 ? 9 : 0;
    if (Status status = launch_all<Tile, kFast>(call, order.begin(), middle)) return status;
    return launch_all<Tile, 0>(call, middle, order.end());
  });
}

}  // namespace repkern
