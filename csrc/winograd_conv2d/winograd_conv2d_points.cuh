// One-dimensional transforms of F(m x m, 3x3). The points are those of repkern/ops/winograd_conv2d/matrices.py, in its
// order: 0, then pairs +q, -q, then infinity. A pair shares all products but one.
#pragma once
#include "common/cuda/launch.cuh"

namespace repkern {
namespace winograd {

// pair(p): q_p. others(p, k): the coefficient of x^2k in the product of (x^2 - q^2) over all pairs but p; p = m / 2:
// over all pairs.
template <int M>
struct Points;
template <>
struct Points<2> {
  static __host__ __device__ constexpr double pair(int) { return 1; }
  static __host__ __device__ constexpr double others(int p, int k) { return p == 1 && k == 0 ? -1 : 1; }
};
template <>
struct Points<4> {
  static __host__ __device__ constexpr double pair(int p) { return p == 0 ? 0.625 : 1.5; }
  static __host__ __device__ constexpr double others(int p, int k) {
    if (k == (p == 2 ? 2 : 1)) return 1;
    return p == 0 ? -2.25 : p == 1 ? -0.390625 : k == 0 ? 0.87890625 : -2.640625;
  }
};
template <>
struct Points<6> {
  static __host__ __device__ constexpr double pair(int p) { return p == 0 ? 1 : p == 1 ? 2 : 0.5; }
  static __host__ __device__ constexpr double others(int p, int k) {
    if (p == 3) return k == 0 ? -1 : k == 1 ? 5.25 : k == 2 ? -5.25 : 1;
    if (k == 2) return 1;
    return p == 0 ? (k == 0 ? 1 : -4.25) : p == 1 ? (k == 0 ? 0.25 : -1.25) : (k == 0 ? 4 : -5);
  }
};

// v = B d.
template <int M, class S>
__device__ __forceinline__ void to_points(const S (&d)[M + 2], S (&v)[M + 2]) {
  using At = Points<M>;
  constexpr int kPairs = M / 2;
  v[0] = v[M + 1] = S(0);
#pragma unroll
  for (int k = 0; k <= kPairs; ++k) {
    v[0] += S(At::others(kPairs, k)) * d[2 * k];
    v[M + 1] += S(At::others(kPairs, k)) * d[2 * k + 1];
  }
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    S even = S(0), odd = S(0);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      even += S(At::others(p, k)) * d[2 * k + 2];
      odd += S(At::others(p, k) * At::pair(p)) * d[2 * k + 1];
    }
    v[2 * p + 1] = even + odd;
    v[2 * p + 2] = even - odd;
  }
}

// out = A v.
template <int M, class S>
__device__ __forceinline__ void from_points(const S (&v)[M + 2], S (&out)[M]) {
#pragma unroll
  for (int row = 0; row < M; ++row) out[row] = row == 0 ? v[0] : row == M - 1 ? v[M + 1] : S(0);
#pragma unroll
  for (int p = 0; p < M / 2; ++p) {
    const S even = v[2 * p + 1] + v[2 * p + 2], odd = v[2 * p + 1] - v[2 * p + 2];
    double power = 1;
#pragma unroll
    for (int row = 0; row < M; ++row) {
      out[row] += S(power) * (row % 2 == 0 ? even : odd);
      power *= Points<M>::pair(p);
    }
  }
}

// G [r, 3]; made on the host.
struct FilterMatrix {
  double g[8][3];

  template <int M>
  static FilterMatrix make() {
    double points[M + 1] = {0};
    for (int p = 0; p < M / 2; ++p) {
      points[2 * p + 1] = Points<M>::pair(p);
      points[2 * p + 2] = -Points<M>::pair(p);
    }
    FilterMatrix made{};
    for (int p = 0; p <= M; ++p) {
      double scale = 1;
      for (int q = 0; q <= M; ++q) {
        if (q != p) scale *= points[p] - points[q];
      }
      for (int i = 0; i < 3; ++i) made.g[p][i] = (i == 0 ? 1 : i == 1 ? points[p] : points[p] * points[p]) / scale;
    }
    made.g[M + 1][2] = 1;
    return made;
  }
};

}  // namespace winograd
}  // namespace repkern
