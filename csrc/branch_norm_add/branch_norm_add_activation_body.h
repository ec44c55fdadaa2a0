// The activations and their derivatives on vectors.
#pragma once
#include "branch_norm_add/branch_norm_add.h"
#include "common/types.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// How much of the activation is known at compile time: the two that training networks are full of, or none of it.
enum class Known { none, relu, no };

template <class T, Known K>
struct Activation {
  using V = Vec<T>;
  using M = Math<T>;
  using Reg = typename V::Reg;

  static Reg relu(Reg z) { return M::max(V::zero(), z); }
  static Reg gate(Reg z) { return M::div(V::set1(1), V::add(V::set1(1), M::exp(M::sub(V::zero(), z)))); }

  static Reg value(Reg z, NormActivation activation) {
    if (K == Known::none) return z;
    if (K == Known::relu) return relu(z);
    switch (activation) {
      case NormActivation::relu6:
        return M::min(V::set1(6), relu(z));
      case NormActivation::silu:
        return V::mul(z, gate(z));
      case NormActivation::hardswish: {
        const Reg ramp = M::min(V::set1(6), relu(V::add(z, V::set1(3))));
        return V::mul(V::mul(z, ramp), V::set1(T(1) / 6));
      }
      case NormActivation::relu:
        return relu(z);
      default:
        return z;
    }
  }

  // grad * activation'(z), with torch's choice at the corners; where z is NaN the gradient passes.
  static Reg backward(Reg grad, Reg z, NormActivation activation) {
    if (K == Known::none) return grad;
    if (K == Known::relu) return M::select_le(z, V::zero(), V::zero(), grad);
    switch (activation) {
      case NormActivation::relu6: {
        const Reg below = M::select_le(V::set1(6), z, V::zero(), grad);
        return M::select_le(z, V::zero(), V::zero(), below);
      }
      case NormActivation::silu: {
        const Reg g = gate(z), rest = M::sub(V::set1(1), g);
        return V::mul(V::mul(grad, g), V::fma(z, rest, V::set1(1)));
      }
      case NormActivation::hardswish: {
        const Reg ramp = V::mul(grad, V::fma(z, V::set1(T(1) / 3), V::set1(T(0.5))));
        const Reg right = M::select_lt(z, V::set1(3), ramp, grad);
        return M::select_le(z, V::set1(-3), V::zero(), right);
      }
      case NormActivation::relu:
        return M::select_le(z, V::zero(), V::zero(), grad);
      default:
        return grad;
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
