// B d B^T and A m A^T on vectors whose lanes are channels.
#pragma once
#include "common/always_inline.h"
#include "winograd_conv2d/winograd_conv2d_points_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class T, int M>
struct Transform {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  static constexpr int R = M + 2, P = R * R, H = M / 2;
  static constexpr Polynomials<M> kPoly{};

  // B along one side of the patch: d[0], d[S], ... in place. As a call, the patch would go through memory twice (F4 on
  // AVX-512: 310 cycles of the time stamp counter a patch instead of 138, 225 instead of 68 for the output).
  template <int S>
  REPKERN_ALWAYS_INLINE static void input_line(Reg* d) {
    Reg even[H], odd[H], first = d[M * S], last = d[(M + 1) * S];
#pragma GCC unroll 8
    for (int k = 1; k <= H; ++k) {
      const Reg c = V::set1(T(kPoly.others[H][k]));
      first = V::fma(c, d[(M - 2 * k) * S], first);
      last = V::fma(c, d[(M + 1 - 2 * k) * S], last);
    }
#pragma GCC unroll 8
    for (int p = 0; p < H; ++p) {
      even[p] = d[M * S];
      odd[p] = d[(M - 1) * S];
#pragma GCC unroll 8
      for (int k = 1; k < H; ++k) {
        const Reg c = V::set1(T(kPoly.others[p][k]));
        even[p] = V::fma(c, d[(M - 2 * k) * S], even[p]);
        odd[p] = V::fma(c, d[(M - 1 - 2 * k) * S], odd[p]);
      }
    }
    d[0] = first;
    d[(M + 1) * S] = last;
#pragma GCC unroll 8
    for (int p = 0; p < H; ++p) {
      d[(2 * p + 1) * S] = V::fma(V::set1(T(kPoly.powers[p][1])), odd[p], even[p]);
      d[(2 * p + 2) * S] = V::fma(V::set1(T(-kPoly.powers[p][1])), odd[p], even[p]);
    }
  }

  // A along one side: the first M of m[0], m[S], ... are the result.
  template <int S>
  REPKERN_ALWAYS_INLINE static void output_line(Reg* m) {
    Reg sum[H], difference[H];
    const Reg last = m[(M + 1) * S];
#pragma GCC unroll 8
    for (int p = 0; p < H; ++p) {
      sum[p] = V::add(m[(2 * p + 1) * S], m[(2 * p + 2) * S]);
      difference[p] = Math<T>::sub(m[(2 * p + 1) * S], m[(2 * p + 2) * S]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      Reg total = i == 0 ? m[0] : V::zero();
      if (i == M - 1) total = last;
#pragma GCC unroll 8
      for (int p = 0; p < H; ++p) {
        const Reg term = i % 2 == 0 ? sum[p] : difference[p];
        if (p == 0 && i > 0 && i < M - 1) {
          total = V::mul(V::set1(T(kPoly.powers[p][i])), term);
        } else {
          total = i == 0 ? V::add(total, term) : V::fma(V::set1(T(kPoly.powers[p][i])), term, total);
        }
      }
      m[i * S] = total;
    }
  }

  // v[p] of stride `stride` from the patch whose vector (i, j) is at(i, j).
  template <class At>
  static inline void input(const At& at, T* v, int64_t stride) {
    Reg d[P];
#pragma GCC unroll 8
    for (int j = 0; j < R; ++j) {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) d[i * R + j] = at(i, j);
      input_line<R>(d + j);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      input_line<1>(d + i * R);
#pragma GCC unroll 8
      for (int j = 0; j < R; ++j) V::store(v + (i * R + j) * stride, d[i * R + j]);
    }
  }

  // Calls emit(i, row) for each of the M rows of M vectors made from m[p] of stride `stride`.
  template <class Emit>
  static inline void output(const T* m, int64_t stride, const Emit& emit) {
    Reg d[P];
#pragma GCC unroll 8
    for (int j = 0; j < R; ++j) {
#pragma GCC unroll 8
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
