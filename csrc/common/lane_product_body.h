// A matrix product whose elements are vectors: C[r][n] (+)= sum over k of A[r][k] B[k][n], each lane on its own.
#pragma once
#include "common/gemm_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// Strides in vectors: of A from row to row and along k, of B along k and from column to column, of C likewise.
struct LaneStrides {
  int64_t a_row, a_k, b_k, b_column, c_row, c_column;
};

template <class T>
struct LaneProduct {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width;

  template <int NR, int NC>
  static void micro(int64_t depth, const LaneStrides& s, const T* a, const T* b, T* c, bool add) {
    Reg sum[NR][NC];
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 16
      for (int n = 0; n < NC; ++n) sum[r][n] = add ? V::load(c + (r * s.c_row + n * s.c_column) * W) : V::zero();
    }
    for (int64_t k = 0; k < depth; ++k) {
      Reg left[NR];
#pragma GCC unroll 16
      for (int r = 0; r < NR; ++r) left[r] = V::load(a + (r * s.a_row + k * s.a_k) * W);
#pragma GCC unroll 16
      for (int n = 0; n < NC; ++n) {
        const Reg right = V::load(b + (k * s.b_k + n * s.b_column) * W);
#pragma GCC unroll 16
        for (int r = 0; r < NR; ++r) sum[r][n] = V::fma(left[r], right, sum[r][n]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 16
      for (int n = 0; n < NC; ++n) V::store(c + (r * s.c_row + n * s.c_column) * W, sum[r][n]);
    }
  }

  template <int NR>
  static void run_rows(int64_t columns, int64_t depth, const LaneStrides& s, const T* a, const T* b, T* c, bool add) {
    constexpr int most = V::lane_columns;
    for (int64_t tiles = (columns + most - 1) / most, left = columns, width; tiles > 0; --tiles, left -= width) {
      width = (left + tiles - 1) / tiles;
      switch (width) {
        case 1:
          micro<NR, 1>(depth, s, a, b, c, add);
          break;
        case 2:
          micro<NR, 2>(depth, s, a, b, c, add);
          break;
        case 3:
          micro<NR, 3>(depth, s, a, b, c, add);
          break;
        case 4:
          micro<NR, 4>(depth, s, a, b, c, add);
          break;
        case 5:
          micro < NR, most<5 ? 1 : 5>(depth, s, a, b, c, add);
          break;
        case 6:
          micro < NR, most<6 ? 1 : 6>(depth, s, a, b, c, add);
          break;
        case 7:
          micro < NR, most<7 ? 1 : 7>(depth, s, a, b, c, add);
          break;
        case 8:
          micro < NR, most<8 ? 1 : 8>(depth, s, a, b, c, add);
          break;
        default:
          micro < NR, most<9 ? 1 : 9>(depth, s, a, b, c, add);
          break;
      }
      b += width * s.b_column * W;
      c += width * s.c_column * W;
    }
  }

  static void run(int64_t rows, int64_t columns, int64_t depth, const LaneStrides& s, const T* a, const T* b, T* c,
                  bool add) {
    constexpr int most = V::lane_rows;
    for (int64_t tiles = (rows + most - 1) / most, left = rows, height; tiles > 0; --tiles, left -= height) {
      height = (left + tiles - 1) / tiles;
      switch (height) {
        case 1:
          run_rows<1>(columns, depth, s, a, b, c, add);
          break;
        case 2:
          run_rows<2>(columns, depth, s, a, b, c, add);
          break;
        default:
          run_rows < most<3 ? 1 : 3>(columns, depth, s, a, b, c, add);
          break;
      }
      a += height * s.a_row * W;
      c += height * s.c_row * W;
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
