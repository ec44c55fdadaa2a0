// What the kernels of branch_norm_add share: how a block walks over its channels, and values as vectors.
#pragma once
#include <cmath>

#include "branch_norm_add/branch_norm_add.h"
#include "common/cuda/index.cuh"
#include "common/cuda/store.cuh"

namespace repkern {
namespace norm {

constexpr int kThreads = 256;

// Shared memory in pieces that any vector may start at.
__host__ __device__ constexpr size_t rounded(size_t bytes) { return (bytes + 127) / 128 * 128; }

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

// What values of type T are computed in.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(double v, double& to) { to = v; }
__device__ __forceinline__ void narrow(float v, __half& to) { to = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

// Without the subroutines of the exact ones, around which registers spill. Last bits may differ, the scale of a result
// that is off by them may not: both are for weights of averages and for coefficients that are rounded afterwards.
#ifdef __CUDACC__
__device__ __forceinline__ float quick_quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double inverse_root(double v) { return rsqrt(v); }
#else
inline float quick_quotient(float a, float b) { return a / b; }
inline double inverse_root(double v) { return 1.0 / std::sqrt(v); }
#endif
__device__ __forceinline__ double quick_quotient(double a, double b) { return a / b; }

// One value of a type known at run time.
template <class A>
__device__ __forceinline__ A load_as(const void* from, int64_t at, DType dtype) {
  switch (dtype) {
    case DType::f32:
      return static_cast<A>(static_cast<const float*>(from)[at]);
    case DType::f64:
      return static_cast<A>(static_cast<const double*>(from)[at]);
    case DType::bf16:
      return static_cast<A>(widen(static_cast<const __nv_bfloat16*>(from)[at]));
    default:
      return static_cast<A>(widen(static_cast<const __half*>(from)[at]));
  }
}

// What a channel's values are counted from in its statistics: the first of them.
template <class T>
__device__ __forceinline__ Wide<T> origin_of(const void* map, int64_t channel, int64_t stride) {
  return widen(static_cast<const T*>(map)[channel * stride]);
}

// blockDim is (lanes, rows). A position is a vector of one channel's map (contiguous), or a row of all channels
// (channels_last), of which a thread has one vector. Block (x, y) has the x-th lanes' worth of channels (contiguous:
// one) and the y-th per_split positions.
struct Grid {
  int64_t channels, plane, channel_stride;
  unsigned positions, per_split;
  int splits;
  WideDivisor per_plane;  // positions in a plane; unused by channels_last
};

template <class T_, int kVector_, bool kChannelsLast_>
struct Kind {
  using T = T_;
  using A = Wide<T_>;
  static constexpr int kVector = kVector_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kChannels = kChannelsLast_ ? kVector_ : 1;         // of a thread
  static constexpr int kShare = kChannelsLast_ ? 1 : kVector_;            // values of a vector in one channel
  static constexpr int kUnroll = kVector_ >= 8 ? 2 : 4;                   // vectors of a map in flight
  static constexpr int channel(int j) { return kChannelsLast_ ? j : 0; }  // of the vector's j-th value
  using Values = Pack<T_, kVector_>;
  using PerChannel = Pack<A, kChannels>;
};

template <class K>
class Walk {
 public:
  using Values = typename K::Values;

  __device__ explicit Walk(const Grid& grid) : grid_(grid), width_(blockDim.x * K::kChannels) {
    first_channel_ = static_cast<int64_t>(blockIdx.x) * width_;
    const int64_t channel = first_channel_ + threadIdx.x * K::kChannels;
    base_ = channel * grid.channel_stride;
    begin_ = blockIdx.y * grid.per_split + threadIdx.y;
    end_ = channel < grid.channels ? min(grid.positions, (blockIdx.y + 1) * grid.per_split) : 0u;
  }

  __device__ __forceinline__ unsigned begin() const { return begin_; }
  __device__ __forceinline__ unsigned end() const { return end_; }
  __device__ __forceinline__ unsigned step() const { return blockDim.y; }

  // Of the block: how many channels it covers, the first of them, and whether the w-th exists.
  __device__ __forceinline__ int width() const { return width_; }
  __device__ __forceinline__ int64_t channel(int w) const { return first_channel_ + w; }
  __device__ __forceinline__ bool has(int w) const { return first_channel_ + w < grid_.channels; }

  // Of the w-th channel; 0 where there is none.
  __device__ __forceinline__ typename K::A origin(const void* map, int w) const {
    return has(w) ? origin_of<typename K::T>(map, channel(w), grid_.channel_stride) : typename K::A(0);
  }

  // A thread's place among the block's, and its coefficients in a row of them.
  __device__ __forceinline__ int thread() const { return threadIdx.y * blockDim.x + threadIdx.x; }
  __device__ __forceinline__ int threads() const { return blockDim.x * blockDim.y; }
  __device__ __forceinline__ typename K::PerChannel own(const typename K::A* row) const {
    return reinterpret_cast<const typename K::PerChannel*>(row)[K::kChannelsLast ? threadIdx.x : 0];
  }

  __device__ __forceinline__ int64_t at(unsigned position) const {
    if constexpr (K::kChannelsLast) return base_ + static_cast<int64_t>(position) * grid_.channels;
    const unsigned n = grid_.per_plane.divide(position), in_plane = position - n * grid_.per_plane.value;
    return base_ + n * grid_.channels * grid_.plane + static_cast<int64_t>(in_plane) * K::kVector;
  }
  __device__ __forceinline__ Values load(const void* map, int64_t at) const {
    return *reinterpret_cast<const Values*>(static_cast<const typename K::T*>(map) + at);
  }
  __device__ __forceinline__ void store(void* map, int64_t at, const typename K::A (&values)[K::kVector]) const {
    Values narrowed;
#pragma unroll
    for (int j = 0; j < K::kVector; ++j) narrow(values[j], narrowed.at[j]);
    *reinterpret_cast<Values*>(static_cast<typename K::T*>(map) + at) = narrowed;
  }

 private:
  const Grid& grid_;
  int width_;
  int64_t first_channel_, base_;
  unsigned begin_, end_;
};

// Per channel of the block, in shared memory: [branches][width] each, and shift [width].
template <class A>
struct Coefficients {
  A *scale, *mean, *shift;
};

// As branch_norm_add.h defines them. `scratch`: [branches][width] doubles. Ends past a barrier.
template <class K>
__device__ void make_coefficients(const NormParams& p, const Walk<K>& walk, const Coefficients<typename K::A>& to,
                                  double* scratch) {
  using A = typename K::A;
  const int width = walk.width(), branches = static_cast<int>(p.branches);
  for (int item = walk.thread(); item < branches * width; item += walk.threads()) {
    const int w = item % width;
    const NormBranch& branch = p.branch[item / width];
    const NormMode mode = NormMode(branch.mode);
    A scale = A(1), mean = A(0);
    double term = 0.0;
    if (mode != NormMode::as_is && walk.has(w)) {
      const int64_t c = walk.channel(w);
      const DType statistics = p.dtype == DType::f64 ? DType::f64 : DType::f32;
      const DType held = mode == NormMode::batch ? statistics : p.param_dtype;
      mean = load_as<A>(branch.mean, c, held);
      scale = static_cast<A>(load_as<double>(branch.weight, c, p.param_dtype) *
                             inverse_root(load_as<double>(branch.var, c, held) + branch.eps));
      term = load_as<double>(branch.bias, c, p.param_dtype) - static_cast<double>(mean) * static_cast<double>(scale);
    }
    to.scale[item] = scale;
    if (to.mean != nullptr) to.mean[item] = mean;
    scratch[item] = term;
  }
  __syncthreads();
  for (int w = walk.thread(); w < width; w += walk.threads()) {
    double shift = 0.0;
    for (int b = 0; b < branches; ++b) shift += scratch[b * width + w];
    to.shift[w] = static_cast<A>(shift);
  }
  __syncthreads();
}

// z += scale * y in the one order and rounding that every pass shares.
template <class K>
__device__ __forceinline__ void add_term(typename K::A (&z)[K::kVector], const typename K::Values& y,
                                         const typename K::PerChannel& scale, bool is_scaled) {
#pragma unroll
  for (int j = 0; j < K::kVector; ++j) {
    const typename K::A value = widen(y.at[j]);
    z[j] = is_scaled ? std::fma(value, scale.at[K::channel(j)], z[j]) : z[j] + value;
  }
}

// NaN stays NaN.
template <class A, int kCount>
__device__ __forceinline__ void activate(A (&z)[kCount], NormActivation which) {
  const auto each = [&](auto function) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) z[j] = function(z[j]);
  };
  switch (which) {
    case NormActivation::none:
      return;
    case NormActivation::relu:
      return each([](A v) { return v <= A(0) ? A(0) : v; });
    case NormActivation::relu6:
      return each([](A v) { return v <= A(0) ? A(0) : v >= A(6) ? A(6) : v; });
    case NormActivation::silu:
      return each([](A v) { return v / (A(1) + std::exp(-v)); });
    case NormActivation::hardswish:
      return each([](A v) { return v <= A(-3) ? A(0) : v >= A(3) ? v : v * (v + A(3)) / A(6); });
  }
}

// grad *= activation'(z), with torch's choice at the corners.
template <class A, int kCount>
__device__ __forceinline__ void activate_backward(A (&grad)[kCount], const A (&z)[kCount], NormActivation which) {
  const auto each = [&](auto function) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) grad[j] = function(grad[j], z[j]);
  };
  switch (which) {
    case NormActivation::none:
      return;
    case NormActivation::relu:
      return each([](A g, A v) { return v <= A(0) ? A(0) : g; });
    case NormActivation::relu6:
      return each([](A g, A v) { return v <= A(0) || v >= A(6) ? A(0) : g; });
    case NormActivation::silu:
      return each([](A g, A v) {
        const A gate = A(1) / (A(1) + std::exp(-v));
        return g * gate * (A(1) + v * (A(1) - gate));
      });
    case NormActivation::hardswish:
      return each([](A g, A v) { return v <= A(-3) ? A(0) : v < A(3) ? g * (v / A(3) + A(0.5)) : g; });
  }
}

}  // namespace norm
}  // namespace repkern
