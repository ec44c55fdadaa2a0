// The update of one vector, for one instruction set; common/grad_mult_body.h walks.
#pragma once
#include "common/grad_mult_body.h"
#include "grad_mult_sgd/grad_mult_sgd_isa.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

enum class Momentum { none, plain, nesterov, first, first_nesterov };

template <class X, Momentum kMomentum>
struct SgdUpdate {
  using T = typename Computing<X>::Type;
  using V = Vec<T>;
  using Reg = typename V::Reg;
  static constexpr bool kNesterov = kMomentum == Momentum::nesterov || kMomentum == Momentum::first_nesterov;
  static constexpr bool kFirst = kMomentum == Momentum::first || kMomentum == Momentum::first_nesterov;
  static constexpr bool kBuffer = kMomentum != Momentum::none;

  X* param;
  const X* grad;
  T* buffer;
  bool decays;
  Reg unscale, decay, momentum, share, minus_lr;

  SgdUpdate(const GradMultTensor& t, const SgdParams& p, double grad_factor)
      : param(static_cast<X*>(t.param)),
        grad(static_cast<const X*>(t.grad)),
        buffer(static_cast<T*>(t.state[0])),
        decays(t.weight_decay != 0),
        unscale(V::set1(static_cast<T>(grad_factor))),
        decay(V::set1(static_cast<T>(t.weight_decay))),
        momentum(V::set1(static_cast<T>(p.momentum))),
        share(V::set1(static_cast<T>(1 - p.dampening))),
        minus_lr(V::set1(static_cast<T>(-t.lr))) {}

  Reg step(Reg value, Reg g, Reg& moved, Reg m) const {
    g = V::mul(V::mul(g, unscale), m);
    if (decays) g = V::fma(decay, value, g);
    if constexpr (kBuffer) {
      moved = kFirst ? g : V::fma(momentum, moved, V::mul(share, g));
      g = kNesterov ? V::fma(momentum, moved, g) : moved;
    }
    return V::fma(minus_lr, g, value);
  }
  void full(int64_t at, Reg m) const {
    Reg moved = kBuffer && !kFirst ? V::load(buffer + at) : V::zero();
    Io<X>::store(param + at, step(Io<X>::load(param + at), Io<X>::load(grad + at), moved, m));
    if constexpr (kBuffer) V::store(buffer + at, moved);
  }
  void part(int64_t at, int64_t n, Reg m) const {
    Reg moved = kBuffer && !kFirst ? V::load_n(buffer + at, n) : V::zero();
    Io<X>::store_n(param + at, step(Io<X>::load_n(param + at, n), Io<X>::load_n(grad + at, n), moved, m), n);
    if constexpr (kBuffer) V::store_n(buffer + at, moved, n);
  }
};

Status grad_mult_sgd(const GradMultTable& table, const SgdParams& p, int threads) {
  if (table.found_inf != nullptr && *table.found_inf != 0) return nullptr;
  const double factor = (p.maximize ? -1.0 : 1.0) / (table.grad_scale == nullptr ? 1.0 : *table.grad_scale);
  for_each_chunk(table, threads, [&](auto storage, const GradMultTensor& t, int64_t begin, int64_t end) {
    using X = decltype(storage);
    using T = typename Computing<X>::Type;
    const auto with = [&](auto update) { grad_mult_chunk<T>(t, begin, end, update); };
    if (p.momentum == 0) return with(SgdUpdate<X, Momentum::none>(t, p, factor));
    if (t.first_step) {
      return p.nesterov ? with(SgdUpdate<X, Momentum::first_nesterov>(t, p, factor))
                        : with(SgdUpdate<X, Momentum::first>(t, p, factor));
    }
    return p.nesterov ? with(SgdUpdate<X, Momentum::nesterov>(t, p, factor))
                      : with(SgdUpdate<X, Momentum::plain>(t, p, factor));
  });
  return nullptr;
}

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
