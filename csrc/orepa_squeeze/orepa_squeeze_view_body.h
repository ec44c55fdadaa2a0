// One layer with typed pointers and the sizes the loops use.
#pragma once
#include "common/parallel.h"
#include "common/simd/rows_body.h"
#include "common/workspace.h"
#include "orepa_squeeze/orepa_squeeze.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// The rows of `scale`.
enum Branch { kOrigin, kAvg, kPrior, kExpand, kPointwise, kProject };

template <class T>
struct View {
  int64_t co, groups, kk, e;  // kk = K * K
  int64_t cog, cig, cmg;      // channels of one group
  bool identity;
  const T* origin;
  const T* avg;
  const T* prior;
  const T* pointwise;
  const T* reduce;
  const T* expand;
  const T* depthwise;
  const T* project;
  const T* filter;
  const T* scales[kSqueezeBranches];

  explicit View(const SqueezeLayer& layer)
      : co(layer.co),
        groups(layer.groups),
        kk(layer.k * layer.k),
        e(layer.expansion),
        cog(layer.co / layer.groups),
        cig(layer.ci / layer.groups),
        cmg(layer.cm / layer.groups),
        identity(layer.identity_reduce != 0),
        origin(static_cast<const T*>(layer.origin)),
        avg(static_cast<const T*>(layer.avg)),
        prior(static_cast<const T*>(layer.prior)),
        pointwise(static_cast<const T*>(layer.pointwise)),
        reduce(static_cast<const T*>(layer.reduce)),
        expand(static_cast<const T*>(layer.expand)),
        depthwise(static_cast<const T*>(layer.depthwise)),
        project(static_cast<const T*>(layer.project)),
        filter(static_cast<const T*>(layer.prior_filter)) {
    for (int b = 0; b < kSqueezeBranches; ++b) scales[b] = static_cast<const T*>(layer.scale[b]);
  }

  T scale(Branch b, int64_t o) const { return scales[b] == nullptr ? T(1) : scales[b][o]; }
  int64_t centre() const { return kk / 2; }
  int64_t group_of(int64_t o) const { return o / cog; }
  // reduce[t, i] of group g, the identity included.
  T reduce_at(int64_t g, int64_t t, int64_t i) const {
    return reduce[(g * cmg + t) * cig + i] + (identity && t % cig == i ? T(1) : T(0));
  }
};

template <class T>
struct GradView {
  const T* out;
  T* origin;
  T* avg;
  T* prior;
  T* pointwise;
  T* reduce;
  T* expand;
  T* depthwise;
  T* project;
  T* scales[kSqueezeBranches];

  explicit GradView(const SqueezeGrads& grads)
      : out(static_cast<const T*>(grads.grad_out)),
        origin(static_cast<T*>(grads.origin)),
        avg(static_cast<T*>(grads.avg)),
        prior(static_cast<T*>(grads.prior)),
        pointwise(static_cast<T*>(grads.pointwise)),
        reduce(static_cast<T*>(grads.reduce)),
        expand(static_cast<T*>(grads.expand)),
        depthwise(static_cast<T*>(grads.depthwise)),
        project(static_cast<T*>(grads.project)) {
    for (int b = 0; b < kSqueezeBranches; ++b) scales[b] = static_cast<T*>(grads.scale[b]);
  }

  void set_scale(Branch b, int64_t o, T value) const {
    if (scales[b] != nullptr) scales[b][o] = value;
  }
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
