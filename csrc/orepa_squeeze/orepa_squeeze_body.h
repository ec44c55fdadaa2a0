// The kernels for one instruction set. Included by one file per set, which names it in REPKERN_ISA_NAMESPACE.
#include "orepa_squeeze/orepa_squeeze_narrow_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {
namespace {

template <class T>
size_t forward_workspace(const SqueezeLayer* layers, int count, int threads) {
  int64_t scratch = 0;
  for (int l = 0; l < count; ++l) scratch = larger(scratch, Narrow<T>::forward_scratch(View<T>(layers[l])));
  return static_cast<size_t>(threads) * round_up(scratch, 16) * sizeof(T);
}

template <class T>
void forward(const SqueezeLayer* layers, void* const* out, int count, DType out_dtype, bool channels_last,
             void* workspace, int threads) {
  for (int l = 0; l < count; ++l) {
    const View<T> in(layers[l]);
    const int64_t scratch = round_up(Narrow<T>::forward_scratch(in), 16);
    parallel_for(in.co, threads, [&](int64_t o, int thread) {
      Narrow<T>::forward(in, o, out[l], out_dtype, channels_last, static_cast<T*>(workspace) + thread * scratch);
    });
  }
}

template <class T>
void backward(const SqueezeLayer* layers, const SqueezeGrads* grads, int count, int threads) {
  for (int l = 0; l < count; ++l) {
    const View<T> in(layers[l]);
    const GradView<T> to(grads[l]);
    parallel_for(in.co, threads, [&](int64_t o, int) { Narrow<T>::backward_output(in, to, o); });
    if (in.depthwise != nullptr)
      parallel_for(in.cig * in.groups, threads, [&](int64_t i, int) { Narrow<T>::backward_depthwise(in, to, i); });
    if (in.expand != nullptr)
      parallel_for(in.cmg * in.groups, threads, [&](int64_t t, int) { Narrow<T>::backward_reduce(in, to, t); });
  }
}

}  // namespace

size_t squeeze_forward_workspace(const SqueezeLayer* layers, int count, DType dtype, int threads) {
  return dtype == DType::f64 ? forward_workspace<double>(layers, count, threads)
                             : forward_workspace<float>(layers, count, threads);
}

Status squeeze_forward(const SqueezeLayer* layers, void* const* out, int count, DType dtype, DType out_dtype,
                       bool channels_last, void* workspace, int threads) {
  if (dtype == DType::f64) {
    forward<double>(layers, out, count, out_dtype, channels_last, workspace, threads);
  } else {
    forward<float>(layers, out, count, out_dtype, channels_last, workspace, threads);
  }
  return nullptr;
}

size_t squeeze_backward_workspace(const SqueezeLayer*, int, DType, int) { return 0; }

Status squeeze_backward(const SqueezeLayer* layers, const SqueezeGrads* grads, int count, DType dtype, void*, int threads) {
  if (dtype == DType::f64) {
    backward<double>(layers, grads, count, threads);
  } else {
    backward<float>(layers, grads, count, threads);
  }
  return nullptr;
}

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
