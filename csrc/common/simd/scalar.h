// Vectors for CPUs without AVX2: 16 bytes of the compiler's portable vectors, no intrinsics.
#pragma once
#include <cstdint>

#include "common/simd/half.h"

namespace repkern {
namespace scalar {

template <class T>
struct Vec {
  using Scalar = T;
  typedef T Reg __attribute__((vector_size(16)));
  static constexpr int width = 16 / sizeof(T);
  static constexpr int panel = 2;                                             // most vectors in a panel
  static constexpr int columns(int vectors) { return vectors == 1 ? 9 : 5; }  // of a micro-tile that wide
  static constexpr int lane_rows = 2, lane_columns = 4;                       // of a lane product

  static Reg zero() { return Reg{}; }
  static Reg set1(T x) { return Reg{} + x; }
  static Reg load(const T* p) {
    Reg r;
    __builtin_memcpy(&r, p, sizeof(r));
    return r;
  }
  static Reg load_n(const T* p, int64_t n) {
    Reg r{};
    for (int j = 0; j < width && j < n; ++j) r[j] = p[j];
    return r;
  }
  static void store(T* p, Reg r) { __builtin_memcpy(p, &r, sizeof(r)); }
  static void store_n(T* p, Reg r, int64_t n) {
    for (int j = 0; j < width && j < n; ++j) p[j] = r[j];
  }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static T sum(Reg r) {
    T total = r[0];
    for (int j = 1; j < width; ++j) total += r[j];
    return total;
  }
};

// No quads here: the row helpers fall back to element copies.
template <class T>
struct Quads {
  static constexpr int size = 0;
  static void split(const T*, int64_t, T*, int64_t) {}
  static void join(const T*, int64_t, T*, int64_t) {}
};

static inline void store_f16(uint16_t* out, const float* in, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = half_bits(in[j]);
}

}  // namespace scalar
}  // namespace repkern
