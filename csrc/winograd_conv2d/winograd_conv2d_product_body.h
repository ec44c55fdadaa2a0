// The products of one point: m[tile][output] = sum over c of v[tile][c] u[c][output]. Every sum is one chain over c,
// whatever the blocking, so that results depend on nothing else.
#pragma once
#include "winograd_conv2d/winograd_conv2d.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class T>
struct Product {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width;
  static constexpr int kVectors = kWinogradLanes / W;                        // in a block of 16 outputs
  static constexpr int kBytes = W * static_cast<int>(sizeof(T));
  static constexpr int kSums = kBytes == 64 ? 24 : kBytes == 32 ? 12 : 8;    // that stay in registers
  static constexpr int kMostBlocks = kBytes == 64 ? 4 / kVectors : 1;        // side by side
  static constexpr int kAhead = 64;                                          // input channels to prefetch ahead

  static constexpr int most_tiles(int blocks) {
    const int most = kSums / (blocks * kVectors);
    return most < 1 ? 1 : most > 12 ? 12 : most;
  }

  template <int NB, int NT>
  static void micro(int64_t depth, const T* v, int64_t v_row, const T* u, int64_t u_block, T* m) {
    constexpr int NV = NB * kVectors;
    Reg sum[NT][NV];
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) {
#pragma GCC unroll 16
      for (int n = 0; n < NV; ++n) sum[t][n] = V::zero();
    }
    for (int64_t c = 0; c < depth; ++c, u += kWinogradLanes) {
      Reg right[NV];
#pragma GCC unroll 16
      for (int b = 0; b < NB; ++b) {
#pragma GCC unroll 16
        for (int n = 0; n < kVectors; ++n) right[b * kVectors + n] = V::load(u + b * u_block + n * W);
        __builtin_prefetch(u + b * u_block + kAhead * kWinogradLanes);
      }
#pragma GCC unroll 16
      for (int t = 0; t < NT; ++t) {
        const Reg left = V::set1(v[t * v_row + c]);
#pragma GCC unroll 16
        for (int n = 0; n < NV; ++n) sum[t][n] = V::fma(left, right[n], sum[t][n]);
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) {
#pragma GCC unroll 16
      for (int n = 0; n < NV; ++n) V::store(m + t * NB * kWinogradLanes + n * W, sum[t][n]);
    }
  }

  template <int NB, int NT>
  static void pick(int tiles, int64_t depth, const T* v, int64_t v_row, const T* u, int64_t u_block, T* m) {
    if (tiles == NT) return micro<NB, NT>(depth, v, v_row, u, u_block, m);
    if constexpr (NT > 1) pick<NB, NT - 1>(tiles, depth, v, v_row, u, u_block, m);
  }

  template <int NB>
  static void run_blocks(int64_t tiles, int64_t depth, const T* v, int64_t v_row, const T* u, int64_t u_block, T* m) {
    if constexpr (NB <= kMostBlocks) {
      constexpr int most = most_tiles(NB);
      for (int64_t parts = (tiles + most - 1) / most, left = tiles; parts > 0; --parts) {
        const int now = static_cast<int>((left + parts - 1) / parts);
        pick<NB, most>(now, depth, v, v_row, u, u_block, m);
        v += now * v_row;
        m += now * NB * kWinogradLanes;
        left -= now;
      }
    }
  }

  // u: `blocks` blocks [depth][16], u_block apart; v: rows v_row apart; m [tiles][blocks][16].
  static void run(int64_t blocks, int64_t tiles, int64_t depth, const T* v, int64_t v_row, const T* u,
                  int64_t u_block, T* m) {
    switch (blocks) {
      case 1:
        return run_blocks<1>(tiles, depth, v, v_row, u, u_block, m);
      case 2:
        return run_blocks<2>(tiles, depth, v, v_row, u, u_block, m);
      case 3:
        return run_blocks<3>(tiles, depth, v, v_row, u, u_block, m);
      default:
        return run_blocks<4>(tiles, depth, v, v_row, u, u_block, m);
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
