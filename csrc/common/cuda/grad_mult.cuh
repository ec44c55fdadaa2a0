// The walk of an optimizer step on a GPU: one block a chunk, four neighbouring numbers a thread. M is worked out on the
// way, with two short divisions for four numbers.
#pragma once
#include "common/cuda/launch.cuh"
#include "common/grad_mult.h"

namespace repkern {

constexpr int kGradMultThreads = 256;
constexpr int kGradMultVector = 4;

template <class X>
struct GradMultStorage {
  using Type = float;
};
template <>
struct GradMultStorage<double> {
  using Type = double;
};

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float& to, float x) { to = x; }
__device__ __forceinline__ void narrow(double& to, double x) { to = x; }
__device__ __forceinline__ void narrow(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// Four numbers that move in one or two accesses; `aligned` says whether their address allows it.
template <class X>
struct alignas(sizeof(X) >= 4 ? 16 : 8) GradMultFour {
  X at[kGradMultVector];

  __device__ __forceinline__ static bool aligned(const void* p) {
    return reinterpret_cast<uintptr_t>(p) % alignof(GradMultFour) == 0;
  }
  __device__ __forceinline__ void load(const X* p, int count, bool vector) {
    if (vector) {
      *this = *reinterpret_cast<const GradMultFour*>(p);
    } else {
#pragma unroll
      for (int i = 0; i < kGradMultVector; ++i) {
        if (i < count) at[i] = p[i];
      }
    }
  }
  __device__ __forceinline__ void store(X* p, int count, bool vector) const {
    if (vector) {
      *reinterpret_cast<GradMultFour*>(p) = *this;
    } else {
#pragma unroll
      for (int i = 0; i < kGradMultVector; ++i) {
        if (i < count) p[i] = at[i];
      }
    }
  }
};

// M at a few neighbouring places of one tensor.
template <class T>
class GradMultFactor {
 public:
  __device__ GradMultFactor(const GradMultTensor& t, int64_t begin)
      : vector_(static_cast<const T*>(t.multiplier)),
        centre_(t.kind == GradMultKind::centre ? static_cast<const T*>(t.centre) : nullptr),
        kind_(t.kind),
        first_(t.kind == GradMultKind::dense ? begin : begin / t.row),
        offset_(static_cast<unsigned>(begin % t.row)),
        row_(static_cast<unsigned>(t.row)),
        cut_(static_cast<unsigned>(t.inner == 1 ? t.taps : t.inner)),
        middle_(static_cast<unsigned>(t.taps / 2)),
        diagonal_(t.diagonal),
        last_(t.inner != 1),
        identity_(static_cast<T>(t.identity)) {}

  // For `count` numbers from `j` on, counted from `begin`.
  __device__ __forceinline__ void read(int j, int count, T (&m)[kGradMultVector]) const {
#pragma unroll
    for (int i = 0; i < kGradMultVector; ++i) m[i] = T(1);
    if (kind_ == GradMultKind::none) return;
    if (kind_ == GradMultKind::dense) {
#pragma unroll
      for (int i = 0; i < kGradMultVector; ++i) {
        if (i < count) m[i] = vector_[first_ + j + i];
      }
      return;
    }
    const unsigned from = offset_ + static_cast<unsigned>(j), skipped = from / row_;
    unsigned r = from - skipped * row_, high = r / cut_, low = r - high * cut_;
    int64_t o = first_ + skipped;
    T scale = vector_[o], added = centre_ != nullptr ? centre_[o] : T(0);
#pragma unroll
    for (int i = 0; i < kGradMultVector; ++i) {
      if (i >= count) break;
      if (r == row_) {
        r = high = low = 0;
        ++o;
        scale = vector_[o];
        added = centre_ != nullptr ? centre_[o] : T(0);
      }
      m[i] = scale;
      if ((last_ ? high : low) == middle_) {
        m[i] += added;
        if (identity_ != T(0) && (last_ ? low : high) == static_cast<unsigned>(o % diagonal_)) m[i] += identity_;
      }
      ++r;
      if (++low == cut_) low = 0, ++high;
    }
  }

 private:
  const T *vector_, *centre_;
  GradMultKind kind_;
  int64_t first_;
  unsigned offset_, row_, cut_, middle_;
  int64_t diagonal_;
  bool last_;
  T identity_;
};

struct GradMultChunk {
  GradMultTensor tensor;
  int64_t begin;
  int count;

  __device__ GradMultChunk(const GradMultTable& table, int block)
      : tensor(grad_mult_tensor(table, table.chunks[2 * block])),
        begin(table.chunks[2 * block + 1] * table.chunk_size),
        count(static_cast<int>(tensor.size - begin < table.chunk_size ? tensor.size - begin : table.chunk_size)) {}
};

// What every gradient is multiplied with besides M.
__device__ __forceinline__ double grad_mult_common(const GradMultTable& table, bool maximize) {
  const double sign = maximize ? -1.0 : 1.0;
  return table.grad_scale == nullptr ? sign : sign / static_cast<double>(*table.grad_scale);
}

__device__ __forceinline__ bool grad_mult_skips(const GradMultTable& table) {
  return table.found_inf != nullptr && *table.found_inf != 0.0f;
}

// update(place, count, vector, M) for this thread's part of a chunk.
template <class T, class Update>
__device__ __forceinline__ void grad_mult_walk(const GradMultChunk& chunk, bool aligned, const Update& update) {
  const GradMultFactor<T> factor(chunk.tensor, chunk.begin);
  for (int j = static_cast<int>(threadIdx.x) * kGradMultVector; j < chunk.count;
       j += kGradMultThreads * kGradMultVector) {
    const int count = min(kGradMultVector, chunk.count - j);
    T m[kGradMultVector];
    factor.read(j, count, m);
    update(chunk.begin + j, count, aligned && count == kGradMultVector, m);
  }
}

// call(number of the storage type) for the dtype of a launch.
template <class Call>
Status with_grad_mult_storage(DType dtype, Call call) {
  switch (dtype) {
    case DType::f32:
      return call(float());
    case DType::f64:
      return call(double());
    case DType::bf16:
      return call(__nv_bfloat16());
    default:
      return call(__half());
  }
}

}  // namespace repkern
