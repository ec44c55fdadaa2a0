// U = G w G^T on vectors of output channels, its different entries, in the precision of the products.
#pragma once
#include "common/always_inline.h"
#include "winograd_conv2d/winograd_conv2d.h"
#include "winograd_conv2d/winograd_conv2d_points_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// u = the weights of the points +q and -q of a pair from w [3], along one side.
template <class T, int kZeros, int kStride, class Reg>
REPKERN_ALWAYS_INLINE static void pair_weights(const PairRow& row, const Reg* w, Reg* u) {
  using V = Vec<T>;
  const Reg first = V::mul(V::set1(T(row.entry[0])), w[0]);
  // The taps of stride 2 are w[0] and w[2] on the even inputs, w[1] on the odd ones.
  const Reg odd = V::mul(V::set1(T(row.entry[1])), w[kStride == 1 ? 1 : 2]);
  const Reg even = kStride == 1 ? V::fma(V::set1(T(row.entry[2])), w[2], first) : first;
  u[0] = V::add(even, odd);
  u[1] = kZeros == 1 ? Math<T>::sub(even, odd) : Math<T>::sub(odd, even);
}

template <class T, int M, int kStride>
class Expand {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  using OneSide = Side<M, kStride>;
  static constexpr int W = V::width, N = OneSide::kPoints, Q = OneSide::kWeights;
  static constexpr int H = PointCounts<N>::kPairs, Z = PointCounts<N>::kZeros;

 public:
  static constexpr FilterRows<N> kRows{};
  // Vectors of a row of U whose other side is not transformed: three columns, and the first one's at the point 0.
  static constexpr int kRowVectors = 3 + Z;

  // Where kernels [blocks][9][depth][16] lie, and where their transforms [blocks][Q * Q][depth][16] go: the elements
  // from point to point, and of the transforms from block to block.
  struct Part {
    const T* w;
    T* u;
    int64_t w_point, u_point, u_block, depth;
  };

  // The transforms of kernel vectors `begin` to `end`, counted over [blocks][depth].
  static void run(const Part& part, int64_t begin, int64_t end) {
    int64_t b = begin / part.depth, c = begin - b * part.depth;
    for (int64_t i = begin; i < end; ++i) {
      const T* from = part.w + b * 9 * part.w_point + c * kWinogradLanes;
      T* to = part.u + b * part.u_block + c * kWinogradLanes;
#pragma GCC unroll 16
      for (int n = 0; n < kWinogradLanes; n += W) vector(from + n, part.w_point, to + n, part.u_point);
      if (++c == part.depth) {
        c = 0;
        ++b;
      }
    }
  }

  // Elements between two vectors of a row: an odd number of lines, so that they do not share a set of the cache.
  static int64_t row_step(int64_t depth) { return (depth | 1) * kWinogradLanes; }

  // One block with only the columns transformed: h [Q][kRowVectors][row_step].
  static void run_columns(const Part& part, T* h) {
    const int64_t point = part.w_point, vector = row_step(part.depth);
    for (int64_t c = 0; c < part.depth; ++c) {
      const T* w = part.w + c * kWinogradLanes;
      T* to = h + c * kWinogradLanes;
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        const Reg column[3] = {V::load(w + j * point), V::load(w + (3 + j) * point), V::load(w + (6 + j) * point)};
        Reg half[Q];
        line(column, half);
#pragma GCC unroll 8
        for (int a = 0; a < Q; ++a) {
          V::store(to + (a * kRowVectors + j) * vector, half[a]);
          if (Z == 1 && j == 0) {
            V::store(to + (a * kRowVectors + 3) * vector, V::mul(V::set1(T(kRows.zero)), half[a]));
          }
        }
      }
    }
  }

 private:
  static inline void vector(const T* w, int64_t w_point, T* u, int64_t u_point) {
    Reg half[3][Q];  // [column of the kernel][row of U]
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const Reg column[3] = {V::load(w + j * w_point), V::load(w + (3 + j) * w_point), V::load(w + (6 + j) * w_point)};
      line(column, half[j]);
    }
#pragma GCC unroll 8
    for (int a = 0; a < Q; ++a) {
      const Reg row[3] = {half[0][a], half[1][a], half[2][a]};
      Reg out[Q];
      line(row, out);
#pragma GCC unroll 8
      for (int k = 0; k < Q; ++k) V::store(u + (a * Q + k) * u_point, out[k]);
    }
  }

  // G along one side of the kernel: out [Q] from w [3].
  REPKERN_ALWAYS_INLINE static void line(const Reg* w, Reg* out) {
    if constexpr (Z == 1) out[0] = V::mul(V::set1(T(kRows.zero)), w[0]);
#pragma GCC unroll 8
    for (int p = 0; p < H; ++p) pair_weights<T, Z, kStride>(kRows.row[p], w, out + 2 * p + Z);
    out[N - 1] = w[2];
    if constexpr (kStride == 2) out[N] = w[1];
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
