// All tensors in one launch, one block a chunk; the last block to arrive counts the steps.
#include <cmath>

#include "common/cuda/grad_mult.cuh"
#include "grad_mult_adamw/grad_mult_adamw.h"

namespace repkern {
namespace {

// pow() needs a stack, and its exponent here is a count.
__device__ __forceinline__ double power(double base, unsigned exponent) {
  double answer = 1;
  for (; exponent != 0; exponent >>= 1, base *= base) {
    if (exponent & 1) answer *= base;
  }
  return answer;
}

// 1 / sqrt(1 - beta2^t) and lr / (1 - beta1^t), worked out by one thread of the block.
__device__ __forceinline__ void bias_corrections(const GradMultTensor& t, const AdamwParams& p, double* shared) {
  if (threadIdx.x == 0) {
    const unsigned taken = static_cast<unsigned>(*t.step) + 1;
    shared[0] = 1 / sqrt(1 - power(p.beta2, taken));
    shared[1] = t.lr / (1 - power(p.beta1, taken));
  }
  __syncthreads();
}

// Every block has read its step when the last one arrives here.
__device__ __forceinline__ void count_steps(const GradMultTable& table, unsigned* arrived) {
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(arrived, 1u) != gridDim.x - 1) return;
  for (int64_t chunk = 0; chunk < table.chunk_count; ++chunk) {
    if (table.chunks[2 * chunk + 1] == 0) *grad_mult_tensor(table, table.chunks[2 * chunk]).step += 1;
  }
  *arrived = 0;
}

template <class X, bool kAmsgrad>
__global__ void __launch_bounds__(kGradMultThreads, sizeof(X) == 8 ? 2 : 3)
    adamw_step(const GradMultTable table, const AdamwParams p, unsigned* arrived) {
  using T = typename GradMultStorage<X>::Type;
  RK_DYN_SMEM(double, shared);
  if (grad_mult_skips(table)) return;
  const GradMultChunk chunk(table, static_cast<int>(blockIdx.x));
  const GradMultTensor& t = chunk.tensor;
  bias_corrections(t, p, shared);
  X* param = static_cast<X*>(t.param);
  const X* grad = static_cast<const X*>(t.grad);
  T *mean = static_cast<T*>(t.state[0]), *square = static_cast<T*>(t.state[1]), *most = static_cast<T*>(t.state[2]);
  const T common = static_cast<T>(grad_mult_common(table, p.maximize));
  const T root_factor = static_cast<T>(shared[0]), rate = static_cast<T>(shared[1]);
  const T keep = static_cast<T>(p.decoupled ? 1 - t.lr * t.weight_decay : 1.0);
  const T decay = static_cast<T>(p.decoupled ? 0.0 : t.weight_decay);
  const T share1 = static_cast<T>(1 - p.beta1), beta2 = static_cast<T>(p.beta2);
  const T share2 = static_cast<T>(1 - p.beta2), eps = static_cast<T>(p.eps);
  const bool aligned = GradMultFour<X>::aligned(param) && GradMultFour<X>::aligned(grad) &&
                       GradMultFour<T>::aligned(mean) && GradMultFour<T>::aligned(square) &&
                       GradMultFour<T>::aligned(most);
  const auto update = [&](int64_t at, int count, bool vector, const T(&factor)[kGradMultVector]) {
    GradMultFour<X> value{}, g{};
    GradMultFour<T> m{}, v{}, largest{};
    value.load(param + at, count, vector);
    g.load(grad + at, count, vector);
    m.load(mean + at, count, vector);
    v.load(square + at, count, vector);
    if constexpr (kAmsgrad) largest.load(most + at, count, vector);
#pragma unroll
    for (int i = 0; i < kGradMultVector; ++i) {
      if (i >= count) break;
      const T old = widened(value.at[i]);
      T step = widened(g.at[i]) * common * factor[i];
      if (decay != T(0)) step += decay * old;
      m.at[i] += share1 * (step - m.at[i]);
      v.at[i] = beta2 * v.at[i] + share2 * step * step;
      T used = v.at[i];
      // Not max(): a NaN must stay one.
      if constexpr (kAmsgrad) used = largest.at[i] = largest.at[i] > used ? largest.at[i] : used;
      const T numerator = rate * (p.multiply_update ? factor[i] * m.at[i] : m.at[i]);
      narrow(value.at[i], old * keep - numerator / (sqrt(used) * root_factor + eps));
    }
    value.store(param + at, count, vector);
    m.store(mean + at, count, vector);
    v.store(square + at, count, vector);
    if constexpr (kAmsgrad) largest.store(most + at, count, vector);
  };
  grad_mult_walk<T>(chunk, aligned, update);
  count_steps(table, arrived);
}

}  // namespace

Status grad_mult_adamw_cuda(const GradMultTable& table, const AdamwParams& p, DType dtype, unsigned* arrived,
                            void* stream) {
  const dim3 grid(static_cast<unsigned>(table.chunk_count)), block(kGradMultThreads);
  const size_t shared = 2 * sizeof(double);
  return with_grad_mult_storage(dtype, [&](auto storage) {
    using X = decltype(storage);
    if (p.amsgrad) return RK_LAUNCH((adamw_step<X, true>), grid, block, shared, stream, table, p, arrived);
    return RK_LAUNCH((adamw_step<X, false>), grid, block, shared, stream, table, p, arrived);
  });
}

}  // namespace repkern
