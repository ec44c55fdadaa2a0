// U = G w G^T on vectors of output channels, in the precision of the products.
#pragma once
#include "common/always_inline.h"
#include "winograd_conv2d/winograd_conv2d.h"
#include "winograd_conv2d/winograd_conv2d_points_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class T, int M>
class Expand {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width, R = M + 2, P = R * R, H = M / 2;
  static constexpr FilterRows<M> kRows{};

 public:
  // Where kernels [blocks][9][depth][16] lie, and where their transforms [blocks][P][depth][16] go: the elements from
  // point to point, and of the transforms from block to block.
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

 private:
  static inline void vector(const T* w, int64_t w_point, T* u, int64_t u_point) {
    Reg half[3][R];  // [column of the kernel][row of U]
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const Reg column[3] = {V::load(w + j * w_point), V::load(w + (3 + j) * w_point), V::load(w + (6 + j) * w_point)};
      line(column, half[j]);
    }
#pragma GCC unroll 8
    for (int a = 0; a < R; ++a) {
      const Reg row[3] = {half[0][a], half[1][a], half[2][a]};
      Reg out[R];
      line(row, out);
#pragma GCC unroll 8
      for (int k = 0; k < R; ++k) V::store(u + (a * R + k) * u_point, out[k]);
    }
  }

  // G along one side of the kernel: out [R] from w [3].
  REPKERN_ALWAYS_INLINE static void line(const Reg* w, Reg* out) {
    out[0] = V::mul(V::set1(T(kRows.zero)), w[0]);
#pragma GCC unroll 8
    for (int p = 0; p < H; ++p) {
      const Reg odd = V::mul(V::set1(T(kRows.row[p][1])), w[1]);
      const Reg even = V::fma(V::set1(T(kRows.row[p][2])), w[2], V::mul(V::set1(T(kRows.row[p][0])), w[0]));
      out[2 * p + 1] = V::add(even, odd);
      out[2 * p + 2] = Math<T>::sub(even, odd);
    }
    out[R - 1] = w[2];
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
