// What elementwise kernels need besides Vec, in portable vectors; Io loads and stores a storage type.
#pragma once
#include <cmath>

#include "common/simd/scalar.h"
#include "common/simd/storage.h"

namespace repkern {
namespace scalar {

template <class T>
struct Math {
  using V = Vec<T>;
  using Reg = typename V::Reg;

  template <class Function>
  static Reg each(const Function& function) {
    Reg r{};
    for (int j = 0; j < V::width; ++j) r[j] = function(j);
    return r;
  }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg sqrt(Reg a) {
    return each([&](int j) { return std::sqrt(a[j]); });
  }
  // The second operand where one is NaN, as the x86 instructions.
  static Reg max(Reg a, Reg b) {
    return each([&](int j) { return a[j] > b[j] ? a[j] : b[j]; });
  }
  static Reg min(Reg a, Reg b) {
    return each([&](int j) { return a[j] < b[j] ? a[j] : b[j]; });
  }
  // a <= b ? x : y and a < b ? x : y
  static Reg select_le(Reg a, Reg b, Reg x, Reg y) {
    return each([&](int j) { return a[j] <= b[j] ? x[j] : y[j]; });
  }
  static Reg select_lt(Reg a, Reg b, Reg x, Reg y) {
    return each([&](int j) { return a[j] < b[j] ? x[j] : y[j]; });
  }
  // The first n lanes; zero beyond.
  static Reg keep(Reg a, int64_t n) {
    return each([&](int j) { return j < n ? a[j] : T(0); });
  }
  static Reg exp(Reg a) {
    return each([&](int j) { return std::exp(a[j]); });
  }
  // After streaming stores, before another thread may read what they wrote.
  static void fence() {}
};

// `stream` stores past the caches, `p` aligned to kStreamAlignment bytes.
template <class X>
struct Io : Vec<X> {
  static constexpr int kStreamAlignment = 1;
  static void stream(X* p, typename Vec<X>::Reg r) { Vec<X>::store(p, r); }
};

template <class X>
struct HalfIo {
  using V = Vec<float>;
  using Reg = V::Reg;

  static float value(Bf16 x) { return bfloat16_value(x.bits); }
  static float value(F16 x) { return half_value(x.bits); }
  static uint16_t bits(float x, Bf16) { return bfloat16_bits(x); }
  static uint16_t bits(float x, F16) { return half_bits(x); }

  static Reg load(const X* p) { return load_n(p, V::width); }
  static Reg load_n(const X* p, int64_t n) {
    Reg r{};
    for (int j = 0; j < V::width && j < n; ++j) r[j] = value(p[j]);
    return r;
  }
  static constexpr int kStreamAlignment = 1;
  static void store(X* p, Reg r) { store_n(p, r, V::width); }
  static void stream(X* p, Reg r) { store(p, r); }
  static void store_n(X* p, Reg r, int64_t n) {
    for (int j = 0; j < V::width && j < n; ++j) p[j].bits = bits(r[j], X{});
  }
};

template <>
struct Io<Bf16> : HalfIo<Bf16> {};
template <>
struct Io<F16> : HalfIo<F16> {};

}  // namespace scalar
}  // namespace repkern
