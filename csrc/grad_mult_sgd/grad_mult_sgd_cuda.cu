// All tensors in one launch, one block a chunk.
#include "common/cuda/grad_mult.cuh"
#include "grad_mult_sgd/grad_mult_sgd.h"

namespace repkern {
namespace {

template <class X>
__global__ void __launch_bounds__(kGradMultThreads) sgd_step(const GradMultTable table, const SgdParams p) {
  using T = typename GradMultStorage<X>::Type;
  if (grad_mult_skips(table)) return;
  const GradMultChunk chunk(table, static_cast<int>(blockIdx.x));
  const GradMultTensor& t = chunk.tensor;
  X* param = static_cast<X*>(t.param);
  const X* grad = static_cast<const X*>(t.grad);
  T* buffer = static_cast<T*>(t.state[0]);
  const T common = static_cast<T>(grad_mult_common(table, p.maximize)), lr = static_cast<T>(t.lr);
  const T decay = static_cast<T>(t.weight_decay), momentum = static_cast<T>(p.momentum);
  const T share = static_cast<T>(1 - p.dampening);
  const bool moves = p.momentum != 0, reads = moves && !t.first_step,
             aligned =
                 GradMultFour<X>::aligned(param) && GradMultFour<X>::aligned(grad) && GradMultFour<T>::aligned(buffer);
  const auto update = [&](int64_t at, int count, bool vector, const T(&m)[kGradMultVector]) {
    GradMultFour<X> value{}, g{};
    GradMultFour<T> moved{};
    value.load(param + at, count, vector);
    g.load(grad + at, count, vector);
    if (reads) moved.load(buffer + at, count, vector);
#pragma unroll
    for (int i = 0; i < kGradMultVector; ++i) {
      if (i >= count) break;
      const T old = widened(value.at[i]);
      T step = widened(g.at[i]) * common * m[i];
      if (decay != T(0)) step += decay * old;
      if (moves) {
        moved.at[i] = reads ? momentum * moved.at[i] + share * step : step;
        step = p.nesterov ? step + momentum * moved.at[i] : moved.at[i];
      }
      narrow(value.at[i], old - lr * step);
    }
    value.store(param + at, count, vector);
    if (moves) moved.store(buffer + at, count, vector);
  };
  grad_mult_walk<T>(chunk, aligned, update);
}

}  // namespace

Status grad_mult_sgd_cuda(const GradMultTable& table, const SgdParams& p, DType dtype, void* stream) {
  const dim3 grid(static_cast<unsigned>(table.chunk_count));
  return with_grad_mult_storage(dtype, [&](auto storage) {
    return RK_LAUNCH((sgd_step<decltype(storage)>), grid, dim3(kGradMultThreads), 0, stream, table, p);
  });
}

}  // namespace repkern
