// The gradients of the five branches without a product over channels, in one pass over grad; and the kernel that adds
// up partial sums. A block holds grad[o, i, :] for a tile of outputs and inputs in shared memory.
#pragma once
#include "orepa_squeeze/orepa_squeeze_backward_plan.h"

namespace repkern {
namespace squeeze {

struct BranchLayer {
  const void *grad, *origin, *avg, *prior, *pointwise, *depthwise, *project, *prior_filter;
  const void* scale[kSqueezeBranches];
  void *grad_origin, *grad_avg, *grad_prior, *grad_pointwise, *grad_project;
  void *depthwise_partial, *scale_partial;  // [output tiles][Ci*e, K, K]; [input tiles][6][Co]
  int first_tile, co, co_g, ci_g, groups, kk, expansion, inputs, outputs;
};

constexpr int kBranchLayers = 18;
struct BranchTable {
  int count;
  BranchLayer layers[kBranchLayers];
};
static_assert(sizeof(BranchTable) <= 4096, "kernel parameters hold 4 KB");

constexpr int kPiece = 9;  // positions a thread keeps in registers

template <class T>
class BranchTile {
 public:
  __device__ BranchTile(const BranchLayer& layer, T* shared) : layer_(layer), grad_(shared) {
    const int input_tiles = ceil_div(layer.ci_g, layer.inputs), output_tiles = ceil_div(layer.co_g, layer.outputs);
    int index = blockIdx.x - layer.first_tile;
    input_tile_ = index % input_tiles;
    index /= input_tiles;
    output_tile_ = index % output_tiles;
    group_ = index / output_tiles;
    i0_ = input_tile_ * layer.inputs;
    o0_ = group_ * layer.co_g + output_tile_ * layer.outputs;
    inputs_ = min(layer.inputs, layer.ci_g - i0_);
    outputs_ = min(layer.outputs, layer.co_g - output_tile_ * layer.outputs);
    row_ = layer.inputs * layer.kk;
    sums_ = shared + layer.outputs * row_;
  }

  __device__ void load() const {
    const T* from = static_cast<const T*>(layer_.grad) + tile_at(0) * layer_.kk;
    for (int c = warp(); c < outputs_; c += kWarps) {
      const T* row = from + static_cast<int64_t>(c) * layer_.ci_g * layer_.kk;
      for (int e = lane(); e < inputs_ * layer_.kk; e += 32) copy_async<sizeof(T)>(grad_ + c * row_ + e, row + e, true);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
  }

  __device__ void origin() const {
    if (layer_.origin == nullptr) return;
    for (int c = warp(); c < outputs_; c += kWarps) {
      const int64_t start = tile_at(c) * layer_.kk;
      const T* value = static_cast<const T*>(layer_.origin) + start;
      T* gradient = static_cast<T*>(layer_.grad_origin) + start;
      const T scale = scale_of(0, o0_ + c);
      T sum = T(0);
      for (int e = lane(); e < inputs_ * layer_.kk; e += 32) {
        const T g = grad_[c * row_ + e];
        if (layer_.grad_origin != nullptr) gradient[e] = scale * g;
        sum += g * value[e];
      }
      sum = warp_sum(sum);
      if (lane() == 0) write_scale(0, o0_ + c, sum);
    }
  }

  // avg, prior and pointwise: one thread per (o, i); neighbouring lanes share o.
  __device__ void pointwise() const {
    const int pairs = layer_.inputs * layer_.outputs;
    const bool any = layer_.avg != nullptr || layer_.prior != nullptr || layer_.pointwise != nullptr;
    for (int first = 0; any && first < pairs; first += kTileThreads) {
      const int pair = first + threadIdx.x, c = pair / layer_.inputs, i = pair % layer_.inputs;
      const bool there = c < outputs_ && i < inputs_;
      const int o = o0_ + c;
      const int64_t at = tile_at(c) + i;
      const T* grad = grad_ + c * row_ + i * layer_.kk;
      T total = T(0), filtered = T(0);
      if (there) {
        const T* filter = static_cast<const T*>(layer_.prior_filter) + static_cast<int64_t>(o) * layer_.kk;
        for (int p = 0; p < layer_.kk; ++p) {
          total += grad[p];
          if (layer_.prior != nullptr) filtered += grad[p] * filter[p];
        }
      }
      const bool leads = there && i == 0;
      const T centre = there ? grad[layer_.kk / 2] : T(0);
      one_value(1, layer_.avg, layer_.grad_avg, total / static_cast<T>(layer_.kk), at, o, there, leads);
      one_value(2, layer_.prior, layer_.grad_prior, filtered, at, o, there, leads);
      one_value(4, layer_.pointwise, layer_.grad_pointwise, centre, at, o, there, leads);
    }
  }

  // depthwise and project: one thread per column (i, q), over all outputs of the tile.
  __device__ void separable() const {
    if (layer_.project == nullptr) return;
    const int e = layer_.expansion, columns = inputs_ * e;
    for (int c = 0; c < outputs_; ++c) sums_[c * kTileThreads + threadIdx.x] = T(0);
    for (int column = threadIdx.x; column < columns; column += kTileThreads) {
      for (int p0 = 0; p0 < layer_.kk; p0 += kPiece) separable_piece(column, column / e, p0);
    }
    __syncthreads();
    for (int c = warp(); c < outputs_; c += kWarps) {
      T sum = T(0);
      for (int thread = lane(); thread < kTileThreads; thread += 32) sum += sums_[c * kTileThreads + thread];
      sum = warp_sum(sum);
      if (lane() == 0) write_scale(5, o0_ + c, sum);
    }
  }

 private:
  static constexpr int kWarps = kTileThreads / 32;
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  // The index of (o0 + c, i0) in a [Co, Ci/g] tensor.
  __device__ __forceinline__ int64_t tile_at(int c) const { return static_cast<int64_t>(o0_ + c) * layer_.ci_g + i0_; }

  __device__ __forceinline__ T scale_of(int branch, int o) const {
    return layer_.scale[branch] == nullptr ? T(1) : static_cast<const T*>(layer_.scale[branch])[o];
  }

  __device__ __forceinline__ void write_scale(int branch, int o, T value) const {
    static_cast<T*>(layer_.scale_partial)[(input_tile_ * kSqueezeBranches + branch) * layer_.co + o] = value;
  }

  // One parameter per (o, i) whose unscaled gradient is `gradient`.
  __device__ __forceinline__ void one_value(int branch, const void* parameter, void* to, T gradient, int64_t at, int o,
                                            bool there, bool leads) const {
    if (parameter == nullptr) return;
    T product = T(0);
    if (there) {
      product = gradient * static_cast<const T*>(parameter)[at];
      if (to != nullptr) static_cast<T*>(to)[at] = scale_of(branch, o) * gradient;
    }
    product = warp_sum(product, layer_.inputs);
    if (leads) write_scale(branch, o, product);
  }

  __device__ __forceinline__ void separable_piece(int column, int i, int p0) const {
    const int e = layer_.expansion, kk = layer_.kk;
    const int64_t channel = static_cast<int64_t>(group_ * layer_.ci_g + i0_) * e + column;
    const T* depthwise = static_cast<const T*>(layer_.depthwise) + channel * kk + p0;
    T filter[kPiece], sum[kPiece];
#pragma unroll
    for (int p = 0; p < kPiece; ++p) {
      filter[p] = p0 + p < kk ? depthwise[p] : T(0);
      sum[p] = T(0);
    }
    for (int c = 0; c < outputs_; ++c) {
      const int64_t at = tile_at(c) * e + column;
      const T weight = static_cast<const T*>(layer_.project)[at], scale = scale_of(5, o0_ + c), scaled = scale * weight;
      const T* grad = grad_ + c * row_ + i * kk + p0;
      T product = T(0);
#pragma unroll
      for (int p = 0; p < kPiece; ++p) {
        const T g = p0 + p < kk ? grad[p] : T(0);
        product += g * filter[p];
        sum[p] += g * scaled;
      }
      if (layer_.grad_project != nullptr) {
        T* to = static_cast<T*>(layer_.grad_project) + at;
        *to = p0 == 0 ? scale * product : *to + scale * product;
      }
      sums_[c * kTileThreads + threadIdx.x] += product * weight;
    }
    if (layer_.depthwise_partial == nullptr) return;
    const int64_t all = static_cast<int64_t>(layer_.groups) * layer_.ci_g * e;
    T* to = static_cast<T*>(layer_.depthwise_partial) + (output_tile_ * all + channel) * kk + p0;
#pragma unroll
    for (int p = 0; p < kPiece; ++p) {
      if (p0 + p < kk) to[p] = sum[p];
    }
  }

  const BranchLayer& layer_;
  T *grad_, *sums_;  // [outputs][inputs * kk]; [outputs][threads]
  int input_tile_, output_tile_, group_, i0_, o0_, inputs_, outputs_, row_;
};

template <class T>
__global__ void __launch_bounds__(kTileThreads, 4) squeeze_grad_branches(const __grid_constant__ BranchTable table) {
  RK_DYN_SMEM(T, shared);
  int which = 0;
  while (which + 1 < table.count && static_cast<int>(blockIdx.x) >= table.layers[which + 1].first_tile) ++which;
  const BranchTile<T> tile(table.layers[which], shared);
  tile.load();
  tile.origin();
  tile.pointwise();
  tile.separable();
}

// to[n] = sum over slices of from[slice * stride + n], in the order of the slices.
struct SumJob {
  const void* from;
  void* to;
  int64_t stride;
  int slices, count, first_block;
};

constexpr int kSumJobs = 96;
constexpr int kSumThreads = 256;
struct SumTable {
  int count;
  SumJob jobs[kSumJobs];
};
static_assert(sizeof(SumTable) <= 4096, "kernel parameters hold 4 KB");

template <class T>
__global__ void __launch_bounds__(kSumThreads) squeeze_sum_slices(const __grid_constant__ SumTable table) {
  int which = 0;
  while (which + 1 < table.count && static_cast<int>(blockIdx.x) >= table.jobs[which + 1].first_block) ++which;
  const SumJob& job = table.jobs[which];
  const int at = (blockIdx.x - job.first_block) * kSumThreads + threadIdx.x;
  if (at >= job.count) return;
  const T* from = static_cast<const T*>(job.from) + at;
  T sum = T(0);
#pragma unroll 4
  for (int slice = 0; slice < job.slices; ++slice) sum += from[slice * job.stride];
  static_cast<T*>(job.to)[at] = sum;
}

}  // namespace squeeze
}  // namespace repkern
