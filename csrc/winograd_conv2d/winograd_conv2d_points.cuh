// One-dimensional transforms of F(m x m, 3x3). The points are those of repkern/ops/winograd_conv2d/matrices.py, in its
// order: 0 where m is even, then pairs +q, -q, then infinity. A pair shares all products but one.
#pragma once
#include "common/cuda/launch.cuh"

namespace repkern {
namespace winograd {

template <int M>
struct PointCounts {
  static constexpr int kZeros = M % 2 == 0 ? 1 : 0, kPairs = (M + 1) / 2;
};

// pair(p): q_p. others(p, k): the coefficient of x^2k in the product of (x^2 - q^2) over all pairs but p; p = kPairs:
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
struct Points<5> {
  static __host__ __device__ constexpr double pair(int p) { return p == 0 ? 0.375 : p == 1 ? 0.875 : 1.75; }
  static __host__ __device__ constexpr double others(int p, int k) {
    if (k == (p == 3 ? 3 : 2)) return 1;
    if (p == 3) return k == 0 ? -0.3297271728515625 : k == 1 ? 2.883056640625 : -3.96875;
    if (p == 0) return k == 0 ? 2.3447265625 : -3.828125;
    return p == 1 ? (k == 0 ? 0.4306640625 : -3.203125) : (k == 0 ? 0.107666015625 : -0.90625);
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
  constexpr int kPairs = PointCounts<M>::kPairs, kZeros = PointCounts<M>::kZeros;
  v[0] = v[M + 1] = S(0);
#pragma unroll
  for (int k = 0; k <= kPairs; ++k) {
    if constexpr (kZeros == 1) v[0] += S(At::others(kPairs, k)) * d[2 * k];
    v[M + 1] += S(At::others(kPairs, k)) * d[2 * k + kZeros];
  }
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    S even = S(0), odd = S(0);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      even += S(At::others(p, k)) * d[2 * k + 1 + kZeros];
      odd += S(At::others(p, k) * At::pair(p)) * d[2 * k + kZeros];
    }
    v[2 * p + kZeros] = even + odd;
    v[2 * p + kZeros + 1] = even - odd;
  }
}

// out = A v.
template <int M, class S>
__device__ __forceinline__ void from_points(const S (&v)[M + 2], S (&out)[M]) {
  constexpr int kZeros = PointCounts<M>::kZeros;
#pragma unroll
  for (int row = 0; row < M; ++row) out[row] = row == 0 && kZeros == 1 ? v[0] : row == M - 1 ? v[M + 1] : S(0);
#pragma unroll
  for (int p = 0; p < PointCounts<M>::kPairs; ++p) {
    const S one = v[2 * p + kZeros], other = v[2 * p + kZeros + 1], even = one + other, odd = one - other;
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
    constexpr int kZeros = PointCounts<M>::kZeros;
    double points[M + 1] = {0};
    for (int p = 0; p < PointCounts<M>::kPairs; ++p) {
      points[2 * p + kZeros] = Points<M>::pair(p);
      points[2 * p + kZeros + 1] = -Points<M>::pair(p);
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
