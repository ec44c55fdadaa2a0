// The update of one vector, for one instruction set; common/grad_mult_body.h walks.
#pragma once
#include <cmath>

#include "common/grad_mult_body.h"
#include "grad_mult_adamw/grad_mult_adamw_isa.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class X, bool kAmsgrad>
struct AdamwUpdate {
  using T = typename Computing<X>::Type;
  using V = Vec<T>;
  using Reg = typename V::Reg;

  X* param;
  const X* grad;
  T *mean, *square, *largest;
  bool couples, multiply_update;
  Reg unscale, keep, decay, share1, beta2, share2, root_factor, eps, minus_rate;

  AdamwUpdate(const GradMultTensor& t, const AdamwParams& p, double grad_factor)
      : param(static_cast<X*>(t.param)),
        grad(static_cast<const X*>(t.grad)),
        mean(static_cast<T*>(t.state[0])),
        square(static_cast<T*>(t.state[1])),
        largest(static_cast<T*>(t.state[2])),
        couples(!p.decoupled && t.weight_decay != 0),
        multiply_update(p.multiply_update),
        unscale(set(grad_factor)),
        keep(set(p.decoupled ? 1 - t.lr * t.weight_decay : 1.0)),
        decay(set(t.weight_decay)),
        share1(set(1 - p.beta1)),
        beta2(set(p.beta2)),
        share2(set(1 - p.beta2)),
        eps(set(p.eps)) {
    const double taken = static_cast<double>(*t.step) + 1;
    root_factor = set(1 / std::sqrt(1 - std::pow(p.beta2, taken)));
    minus_rate = set(-t.lr / (1 - std::pow(p.beta1, taken)));
  }

  static Reg set(double x) { return V::set1(static_cast<T>(x)); }

  Reg step(Reg value, Reg g, Reg& m, Reg& v, Reg& most, Reg factor) const {
    g = V::mul(V::mul(g, unscale), factor);
    if (couples) g = V::fma(decay, value, g);
    m = V::fma(share1, Math<T>::sub(g, m), m);
    v = V::fma(share2, V::mul(g, g), V::mul(beta2, v));
    if constexpr (kAmsgrad) most = Math<T>::max(most, v);
    const Reg denominator = V::fma(Math<T>::sqrt(kAmsgrad ? most : v), root_factor, eps);
    const Reg numerator = V::mul(minus_rate, multiply_update ? V::mul(factor, m) : m);
    return V::fma(value, keep, Math<T>::div(numerator, denominator));
  }
  void full(int64_t at, Reg factor) const {
    Reg m = V::load(mean + at), v = V::load(square + at);
    Reg most = kAmsgrad ? V::load(largest + at) : V::zero();
    Io<X>::store(param + at, step(Io<X>::load(param + at), Io<X>::load(grad + at), m, v, most, factor));
    V::store(mean + at, m);
    V::store(square + at, v);
    if constexpr (kAmsgrad) V::store(largest + at, most);
  }
  void part(int64_t at, int64_t n, Reg factor) const {
    Reg m = V::load_n(mean + at, n), v = V::load_n(square + at, n);
    Reg most = kAmsgrad ? V::load_n(largest + at, n) : V::zero();
    const Reg value = step(Io<X>::load_n(param + at, n), Io<X>::load_n(grad + at, n), m, v, most, factor);
    Io<X>::store_n(param + at, value, n);
    V::store_n(mean + at, m, n);
    V::store_n(square + at, v, n);
    if constexpr (kAmsgrad) V::store_n(largest + at, most, n);
  }
};

Status grad_mult_adamw(const GradMultTable& table, const AdamwParams& p, int threads) {
  if (table.found_inf != nullptr && *table.found_inf != 0) return nullptr;
  const double factor = (p.maximize ? -1.0 : 1.0) / (table.grad_scale == nullptr ? 1.0 : *table.grad_scale);
  for_each_chunk(table, threads, [&](auto storage, const GradMultTensor& t, int64_t begin, int64_t end) {
    using X = decltype(storage);
    using T = typename Computing<X>::Type;
    if (p.amsgrad) return grad_mult_chunk<T>(t, begin, end, AdamwUpdate<X, true>(t, p, factor));
    grad_mult_chunk<T>(t, begin, end, AdamwUpdate<X, false>(t, p, factor));
  });
  for (int64_t at = 0; at < table.tensors; ++at) *grad_mult_tensor(table, at).step += 1;
  return nullptr;
}

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
