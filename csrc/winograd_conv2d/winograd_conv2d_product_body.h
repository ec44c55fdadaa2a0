// The products of one point: m[tile][output] = sum over c of v[tile][c] u[c][output]. Every sum is cut after each
// kChain channels, whatever the blocking, so that results depend on nothing else.
#pragma once
#include "winograd_conv2d/winograd_conv2d.h"
#include "winograd_conv2d/winograd_conv2d_rows_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class T>
struct Product {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width;
  static constexpr int kVectors = kWinogradLanes / W;  // in a block of 16 outputs
  static constexpr int kBytes = W * static_cast<int>(sizeof(T));
  static constexpr int kSums = kBytes == 64 ? 24 : kBytes == 32 ? 12 : 8;  // that stay in registers
  static constexpr int kMostBlocks = kBytes == 64 ? 4 / kVectors : 1;      // side by side
  // Longer chains lose accuracy (at 2048 channels 4e-6 of F4 instead of 1e-6); 8 KiB of weights a block stay in the
  // first cache while all tiles pass.
  static constexpr int64_t kChain = 128;

  // One chain: the strides of v from tile to tile and of u from block to block, and whether m holds the chains before.
  // The first `streams` passes over the weights ask for the memory from `ahead`, ahead_step apart; with none, for u of
  // the next chain.
  struct Chain {
    int64_t depth, v_row, u_block;
    bool add;
    int64_t streams = 0, ahead_step = 0;
    const T* ahead = nullptr;
  };

  static constexpr int most_tiles(int blocks) {
    const int most = kSums / (blocks * kVectors);
    return most < 1 ? 1 : most > 12 ? 12 : most;
  }

  // NB blocks for NT tiles; prefetches NF blocks of the weights at `ahead`.
  template <int NB, int NT, int NF>
  static void micro(const Chain& chain, const T* v, const T* u, const T* ahead, T* m) {
    const int64_t depth = chain.depth, u_block = chain.u_block;
    constexpr int NV = NB * kVectors;
    Reg sum[NT][NV];
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) {
#pragma GCC unroll 16
      for (int n = 0; n < NV; ++n) sum[t][n] = V::zero();
    }
    TileRows<T, NT> rows(v, chain.v_row);
    for (int64_t c = 0; c < depth; ++c, u += kWinogradLanes, rows.advance()) {
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
        const Reg left = V::set1(rows[t]);
#pragma GCC unroll 16
        for (int n = 0; n < NV; ++n) sum[t][n] = V::fma(left, right[n], sum[t][n]);
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) {
#pragma GCC unroll 16
      for (int n = 0; n < NV; ++n) {
        T* to = m + t * NB * kWinogradLanes + n * W;
        V::store(to, chain.add ? V::add(V::load(to), sum[t][n]) : sum[t][n]);
      }
    }
  }

  // How often run_chain goes over the weights.
  static int64_t passes_of(int64_t blocks, int64_t tiles) {
    const int most = most_tiles(static_cast<int>(blocks));
    return (tiles + most - 1) / most;
  }

  template <int NB, int NT, int NF>
  static void pick(int tiles, const Chain& chain, const T* v, const T* u, const T* ahead, T* m) {
    if (tiles == NT) return micro<NB, NT, NF>(chain, v, u, ahead, m);
    if constexpr (NT > 1) pick<NB, NT - 1, NF>(tiles, chain, v, u, ahead, m);
  }

  // Calls between() after each pass over the weights.
  template <int NB, class Between>
  static void run_blocks(int64_t tiles, const Chain& chain, const T* v, const T* u, T* m, const Between& between) {
    if constexpr (NB <= kMostBlocks) {
      constexpr int most = most_tiles(NB), half = (NB + 1) / 2;
      // The weights of the next chain come while the first two passes compute: asked for in one pass, they would be
      // waited for (256 channels, 14x14: 0.72 instead of 0.61 ms).
      const T* next = u + chain.depth * kWinogradLanes;
      const int64_t passes = (tiles + most - 1) / most;
      for (int64_t pass = 0, left = tiles; pass < passes; ++pass) {
        const int now = static_cast<int>((left + passes - pass - 1) / (passes - pass));
        if (chain.streams > 0) {
          if (pass < chain.streams) {
            pick<NB, most, 1>(now, chain, v, u, chain.ahead + pass * chain.ahead_step, m);
          } else {
            pick<NB, most, 0>(now, chain, v, u, u, m);
          }
        } else if (passes == 1) {
          pick<NB, most, NB>(now, chain, v, u, next, m);
        } else if (pass < 2) {
          pick<NB, most, half>(now, chain, v, u, next + pass * (NB - half) * chain.u_block, m);
        } else {
          pick<NB, most, 0>(now, chain, v, u, next, m);
        }
        between();
        v += now * chain.v_row;
        m += now * NB * kWinogradLanes;
        left -= now;
      }
    }
  }

  template <class Between>
  static void run_chain(int64_t blocks, int64_t tiles, const Chain& chain, const T* v, const T* u, T* m,
                        const Between& between) {
    switch (blocks) {
      case 1:
        return run_blocks<1>(tiles, chain, v, u, m, between);
      case 2:
        return run_blocks<2>(tiles, chain, v, u, m, between);
      case 3:
        return run_blocks<3>(tiles, chain, v, u, m, between);
      default:
        return run_blocks<4>(tiles, chain, v, u, m, between);
    }
  }

  static void run_chain(int64_t blocks, int64_t tiles, const Chain& chain, const T* v, const T* u, T* m) {
    run_chain(blocks, tiles, chain, v, u, m, [] {});
  }

  // u: `blocks` blocks [depth][16], u_block apart; v: rows v_row apart; m [tiles][blocks][16].
  static void run(int64_t blocks, int64_t tiles, int64_t depth, const T* v, int64_t v_row, const T* u, int64_t u_block,
                  T* m) {
    for (int64_t c = 0; c < depth; c += kChain) {
      const Chain chain{depth - c < kChain ? depth - c : kChain, v_row, u_block, c > 0};
      run_chain(blocks, tiles, chain, v + c, u + c * kWinogradLanes, m);
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
