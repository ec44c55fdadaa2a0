// The kernels for one instruction set. Included by one file per set, which names it in REPKERN_ISA_NAMESPACE.
#pragma once
#include "compose_sequential/compose_sequential_narrow_body.h"
#include "compose_sequential/compose_sequential_wide_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {
namespace {

// Groups so small that packing costs more than empty lanes.
template <class T>
bool is_narrow(const ComposeParams& p) {
  const int64_t cig = p.ci / p.groups, cmg = p.cm / p.groups;
  return 2 * cig <= Vec<T>::width && cig * cmg <= Vec<T>::width;
}

template <class T>
struct ForwardSpace {
  T* packed;
  T* scratch;
  int64_t scratch_size;

  ForwardSpace(Workspace& space, const WideCompose<T>& wide, int threads)
      : packed(space.take<T>(wide.forward_packed())),
        scratch(nullptr),
        scratch_size((wide.forward_scratch() + 63) / 64 * 64) {
    scratch = space.take<T>(scratch_size * threads);
  }
};

template <class T>
struct BackwardSpace {
  T* first;
  T* outer;
  T* scratch;
  int64_t scratch_size;

  BackwardSpace(Workspace& space, const WideCompose<T>& wide, int threads)
      : first(space.take<T>(wide.first_packed())), outer(space.take<T>(wide.outer_packed())), scratch(nullptr) {
    scratch_size = WideCompose<T>::larger(wide.second_scratch(), wide.first_scratch(threads));
    scratch_size = (scratch_size + 63) / 64 * 64;
    scratch = space.take<T>(scratch_size * threads);
  }
};

template <class T>
void forward(const ComposeParams& p, void* out, void* workspace, int threads) {
  const WideCompose<T> wide(p);
  T* to = static_cast<T*>(out);
  if (is_narrow<T>(p)) {
    parallel_for(p.co, threads,
                 [&](int64_t o, int) { NarrowCompose<T>::forward(wide.c, wide.first, wide.second, o, to); });
    return;
  }
  Workspace space(workspace);
  const ForwardSpace<T> at(space, wide, threads);
  parallel_for(wide.forward_pack_units(), threads, [&](int64_t unit, int) { wide.pack_forward(unit, at.packed); });
  parallel_for(wide.block_units(), threads, [&](int64_t unit, int thread) {
    wide.forward(unit, at.packed, to, at.scratch + thread * at.scratch_size);
  });
}

template <class T>
void backward(const ComposeParams& p, const void* grad_out, void* grad_first, void* grad_second, void* workspace,
              int threads) {
  const WideCompose<T> wide(p);
  const T* grad = static_cast<const T*>(grad_out);
  T* to_first = static_cast<T*>(grad_first);
  T* to_second = static_cast<T*>(grad_second);
  if (is_narrow<T>(p)) {
    parallel_for(p.co, threads,
                 [&](int64_t o, int) { NarrowCompose<T>::backward_second(wide.c, grad, wide.first, o, to_second); });
    parallel_for(p.cm, threads,
                 [&](int64_t t, int) { NarrowCompose<T>::backward_first(wide.c, grad, wide.second, t, to_first); });
    return;
  }
  Workspace space(workspace);
  const BackwardSpace<T> at(space, wide, threads);
  parallel_for(wide.backward_pack_units(), threads,
               [&](int64_t unit, int) { wide.pack_backward(unit, grad, at.first, at.outer); });
  parallel_for(wide.block_units(), threads, [&](int64_t unit, int thread) {
    wide.backward_second(unit, grad, at.first, to_second, at.scratch + thread * at.scratch_size);
  });
  const int64_t ranges = wide.ranges(threads);
  parallel_for(wide.c.groups * ranges, threads, [&](int64_t unit, int thread) {
    wide.backward_first(unit, ranges, at.outer, to_first, at.scratch + thread * at.scratch_size);
  });
}

template <class T, template <class> class Space>
size_t space_of(const ComposeParams& p, int threads) {
  if (is_narrow<T>(p)) return 0;
  Workspace space(nullptr);
  const Space<T> at(space, WideCompose<T>(p), threads);
  (void)at;
  return space.used();
}

}  // namespace

size_t compose_forward_workspace(const ComposeParams& p, DType dtype, int threads) {
  return dtype == DType::f64 ? space_of<double, ForwardSpace>(p, threads) : space_of<float, ForwardSpace>(p, threads);
}

Status compose_forward(const ComposeParams& p, void* out, DType dtype, void* workspace, int threads) {
  if (dtype == DType::f64) {
    forward<double>(p, out, workspace, threads);
  } else {
    forward<float>(p, out, workspace, threads);
  }
  return nullptr;
}

size_t compose_backward_workspace(const ComposeParams& p, DType dtype, int threads) {
  return dtype == DType::f64 ? space_of<double, BackwardSpace>(p, threads) : space_of<float, BackwardSpace>(p, threads);
}

Status compose_backward(const ComposeParams& p, const void* grad_out, void* grad_first, void* grad_second, DType dtype,
                        void* workspace, int threads) {
  if (dtype == DType::f64) {
    backward<double>(p, grad_out, grad_first, grad_second, workspace, threads);
  } else {
    backward<float>(p, grad_out, grad_first, grad_second, workspace, threads);
  }
  return nullptr;
}

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
