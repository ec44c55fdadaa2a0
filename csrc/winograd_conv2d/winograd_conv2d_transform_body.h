// B d B^T and A m A^T on vectors whose lanes are channels.
#pragma once
#include "common/always_inline.h"
#include "winograd_conv2d/winograd_conv2d_points_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class T, int M, int kStride>
struct Transform {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  using OneSide = Side<M, kStride>;
  static constexpr int N = OneSide::kPoints, R = OneSide::kPatch;
  static constexpr int H = PointCounts<N>::kPairs, Z = PointCounts<N>::kZeros;
  static constexpr Polynomials<N> kPoly{};

  // B along one side of the patch: d[0], d[S], ... in place. As a call, the patch would go through memory twice (F4 on
  // AVX-512: 310 cycles of the time stamp counter a patch instead of 138, 225 instead of 68 for the output).
  template <int S>
  REPKERN_ALWAYS_INLINE static void input_line(Reg* d) {
    if constexpr (kStride == 1) return points_of<S>(d);
    Reg even[N], odd[M];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) even[i] = d[2 * i * S];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) odd[i] = d[(2 * i + 1) * S];
    points_of<1>(even);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) d[i * S] = even[i];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) d[(N + i) * S] = odd[i];
  }

  // The N inputs d[0], d[S], ... at the N points, in place.
  template <int S>
  REPKERN_ALWAYS_INLINE static void points_of(Reg* d) {
    Reg even[H], odd[H], first = d[(N - 2) * S], last = d[(N - 1) * S];
#pragma GCC unroll 8
    for (int k = 1; k <= H; ++k) {
      const Reg c = V::set1(T(kPoly.others[H][k]));
      if constexpr (Z == 1) first = V::fma(c, d[(N - 2 - 2 * k) * S], first);
      last = V::fma(c, d[(N - 1 - 2 * k) * S], last);
    }
#pragma GCC unroll 8
    for (int p = 0; p < H; ++p) {
      even[p] = d[(N - 2) * S];
      odd[p] = d[(N - 3) * S];
#pragma GCC unroll 8
      for (int k = 1; k < H; ++k) {
        const Reg c = V::set1(T(kPoly.others[p][k]));
        even[p] = V::fma(c, d[(N - 2 - 2 * k) * S], even[p]);
        odd[p] = V::fma(c, d[(N - 3 - 2 * k) * S], odd[p]);
      }
    }
    if constexpr (Z == 1) d[0] = first;
    d[(N - 1) * S] = last;
#pragma GCC unroll 8
    for (int p = 0; p < H; ++p) {
      d[(2 * p + Z) * S] = V::fma(V::set1(T(kPoly.powers[p][1])), odd[p], even[p]);
      d[(2 * p + Z + 1) * S] = V::fma(V::set1(T(-kPoly.powers[p][1])), odd[p], even[p]);
    }
  }

  // A along one side: the first M of m[0], m[S], ... are the result.
  template <int S>
  REPKERN_ALWAYS_INLINE static void output_line(Reg* m) {
    Reg sum[H], difference[H];
    const Reg first = m[0], last = m[(N - 1) * S];
#pragma GCC unroll 8
    for (int p = 0; p < H; ++p) {
      sum[p] = V::add(m[(2 * p + Z) * S], m[(2 * p + Z + 1) * S]);
      difference[p] = Math<T>::sub(m[(2 * p + Z) * S], m[(2 * p + Z + 1) * S]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      Reg total = i == 0 ? first : last;
#pragma GCC unroll 8
      for (int p = 0; p < H; ++p) {
        const Reg term = i % 2 == 0 ? sum[p] : difference[p];
        if (p == 0 && (i == 0 ? Z == 0 : i < M - 1)) {
          total = i == 0 ? term : V::mul(V::set1(T(kPoly.powers[p][i])), term);
        } else {
          total = i == 0 ? V::add(total, term) : V::fma(V::set1(T(kPoly.powers[p][i])), term, total);
        }
      }
      if constexpr (kStride == 2) total = V::add(total, m[(N + i) * S]);
      m[i * S] = total;
    }
  }

  // v[p] of stride `stride` from the patch whose vector (i, j) is at(i, j).
  template <class At>
  static inline void input(const At& at, T* v, int64_t stride) {
    Reg d[R * R];
#pragma GCC unroll 16
    for (int j = 0; j < R; ++j) {
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) d[i * R + j] = at(i, j);
      input_line<R>(d + j);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      input_line<1>(d + i * R);
#pragma GCC unroll 16
      for (int j = 0; j < R; ++j) V::store(v + (i * R + j) * stride, d[i * R + j]);
    }
  }

  // Calls emit(i, row) for each of the M rows of M vectors made from m[p] of stride `stride`.
  template <class Emit>
  static inline void output(const T* m, int64_t stride, const Emit& emit) {
    Reg d[R * R];
#pragma GCC unroll 16
    for (int j = 0; j < R; ++j) {
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) d[i * R + j] = V::load(m + (i * R + j) * stride);
      output_line<R>(d + j);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      output_line<1>(d + i * R);
      emit(i, d + i * R);
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
