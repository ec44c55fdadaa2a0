// The products of one point: m[tile][output] = sum over c of v[tile][c] u[c][output]. Every sum is cut after each kChain
// channels, whatever the blocking, so that results depend on nothing else.
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
  // Longer chains lose accuracy (at 2048 channels 4e-6 of F4 instead of 1e-6); 8 KiB of weights a block stay in the
  // first cache while all tiles pass.
  static constexpr int64_t kChain = 128;
  static constexpr int kAhead = 64;                                          // input channels to prefetch ahead

  static constexpr int most_tiles(int blocks) {
    const int most = kSums / (blocks * kVectors);
    return most < 1 ? 1 : most > 12 ? 12 : most;
  }

  template <int NB, int NT, int NF>
  static void micro(int64_t depth, const T* v, int64_t v_row, const T* u, int64_t u_block, const T* ahead, T* m, bool add) {
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
      }
#pragma GCC unroll 16
      for (int b = 0; b < NF; ++b) __builtin_prefetch(ahead + b * u_block + c * kWinogradLanes, 0, 2);
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
      for (int n = 0; n < NV; ++n) {
        T* to = m + t * NB * kWinogradLanes + n * W;
        V::store(to, add ? V::add(V::load(to), sum[t][n]) : sum[t][n]);
      }
    }
  }

  template <int NB, int NT, int NF>
  static void pick(int tiles, int64_t depth, const T* v, int64_t v_row, const T* u, int64_t u_block, const T* ahead, T* m, bool add) {
    if (tiles == NT) return micro<NB, NT, NF>(depth, v, v_row, u, u_block, ahead, m, add);
    if constexpr (NT > 1) pick<NB, NT - 1, NF>(tiles, depth, v, v_row, u, u_block, ahead, m, add);
  }

  template <int NB>
  static void run_blocks(int64_t tiles, int64_t depth, const T* v, int64_t v_row, const T* u, int64_t u_block, T* m, bool add) {
    if constexpr (NB <= kMostBlocks) {
      constexpr int most = most_tiles(NB), half = (NB + 1) / 2;
      const int64_t parts = (tiles + most - 1) / most;
      for (int64_t part = 0, left = tiles; part < parts; ++part) {
        const int now = static_cast<int>((left + parts - part - 1) / (parts - part));
        const T* ahead = u + depth * kWinogradLanes;
        if (parts == 1) {
          pick<NB, most, NB>(now, depth, v, v_row, u, u_block, ahead, m, add);
        } else if (part < 2) {
          pick<NB, most, half>(now, depth, v, v_row, u, u_block, ahead + part * (NB - half) * u_block, m, add);
        } else {
          pick<NB, most, 0>(now, depth, v, v_row, u, u_block, ahead, m, add);
        }
        v += now * v_row;
        m += now * NB * kWinogradLanes;
        left -= now;
      }
    }
  }

  // u: `blocks` blocks [depth][16], u_block apart; v: rows v_row apart; m [tiles][blocks][16].
  static void run(int64_t blocks, int64_t tiles, int64_t depth, const T* v, int64_t v_row, const T* u,
                  int64_t u_block, T* m) {
    for (int64_t c = 0; c < depth; c += kChain) {
      const int64_t now = depth - c < kChain ? depth - c : kChain;
      run_chain(blocks, tiles, now, v + c, v_row, u + c * kWinogradLanes, u_block, m, c > 0);
    }
  }

  static void run_chain(int64_t blocks, int64_t tiles, int64_t depth, const T* v, int64_t v_row, const T* u,
                        int64_t u_block, T* m, bool add) {
    switch (blocks) {
      case 1:
        return run_blocks<1>(tiles, depth, v, v_row, u, u_block, m, add);
      case 2:
        return run_blocks<2>(tiles, depth, v, v_row, u, u_block, m, add);
      case 3:
        return run_blocks<3>(tiles, depth, v, v_row, u, u_block, m, add);
      default:
        return run_blocks<4>(tiles, depth, v, v_row, u, u_block, m, add);
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
