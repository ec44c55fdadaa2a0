// The kernels for one instruction set. Included by one file per set, which names it in REPKERN_ISA_NAMESPACE.
#include "compose_sequential/compose_sequential_narrow_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {
namespace {

template <class T>
void forward(const ComposeParams& p, void* out, int threads) {
  const Composition c(p);
  parallel_for(p.co, threads, [&](int64_t o, int) {
    NarrowCompose<T>::forward(c, static_cast<const T*>(p.first), static_cast<const T*>(p.second), o, static_cast<T*>(out));
  });
}

template <class T>
void backward(const ComposeParams& p, const void* grad_out, void* grad_first, void* grad_second, int threads) {
  const Composition c(p);
  const T* grad = static_cast<const T*>(grad_out);
  parallel_for(p.co, threads, [&](int64_t o, int) {
    NarrowCompose<T>::backward_second(c, grad, static_cast<const T*>(p.first), o, static_cast<T*>(grad_second));
  });
  parallel_for(p.cm, threads, [&](int64_t t, int) {
    NarrowCompose<T>::backward_first(c, grad, static_cast<const T*>(p.second), t, static_cast<T*>(grad_first));
  });
}

}  // namespace

size_t compose_forward_workspace(const ComposeParams&, DType, int) { return 0; }

Status compose_forward(const ComposeParams& p, void* out, DType dtype, void*, int threads) {
  if (dtype == DType::f64) {
    forward<double>(p, out, threads);
  } else {
    forward<float>(p, out, threads);
  }
  return nullptr;
}

size_t compose_backward_workspace(const ComposeParams&, DType, int) { return 0; }

Status compose_backward(const ComposeParams& p, const void* grad_out, void* grad_first, void* grad_second, DType dtype,
                        void*, int threads) {
  if (dtype == DType::f64) {
    backward<double>(p, grad_out, grad_first, grad_second, threads);
  } else {
    backward<float>(p, grad_out, grad_first, grad_second, threads);
  }
  return nullptr;
}

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
