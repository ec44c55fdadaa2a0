// exp of a vector of M::V within 2 units in the last place: x = n ln 2 + r, |r| <= ln(2)/2, a polynomial or quotient in
// r. Coefficients: Cephes (expf, exp). Arguments beyond the type's range are moved to its ends; NaN stays NaN.
#pragma once
#include <initializer_list>

namespace repkern {

template <class M>
typename M::Reg exp_of(typename M::Reg x, float) {
  using V = typename M::V;
  x = M::min(V::set1(88.0f), M::max(V::set1(-87.0f), x));
  const auto n = M::round(V::mul(x, V::set1(1.44269504088896341f)));
  auto r = V::fma(n, V::set1(-0.693359375f), x);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  auto sum = V::set1(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = V::fma(sum, r, V::set1(c));
  sum = V::fma(V::mul(r, r), sum, V::add(r, V::set1(1.0f)));
  return M::scale_by_power(sum, n);
}

template <class M>
typename M::Reg exp_of(typename M::Reg x, double) {
  using V = typename M::V;
  x = M::min(V::set1(709.0), M::max(V::set1(-708.0), x));
  const auto n = M::round(V::mul(x, V::set1(1.4426950408889634073599)));
  auto r = V::fma(n, V::set1(-6.93145751953125e-1), x);
  r = V::fma(n, V::set1(-1.42860682030941723212e-6), r);
  const auto square = V::mul(r, r);
  auto p = V::fma(V::set1(1.26177193074810590878e-4), square, V::set1(3.02994407707441961300e-2));
  p = V::mul(r, V::fma(p, square, V::set1(9.99999999999999999910e-1)));
  auto q = V::fma(V::set1(3.00198505138664455042e-6), square, V::set1(2.52448340349684104192e-3));
  q = V::fma(q, square, V::set1(2.27265548208155028766e-1));
  q = V::fma(q, square, V::set1(2.0));
  const auto sum = V::fma(V::set1(2.0), M::div(p, M::sub(q, p)), V::set1(1.0));
  return M::scale_by_power(sum, n);
}

}  // namespace repkern
