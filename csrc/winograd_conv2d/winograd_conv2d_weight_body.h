// U = G w G^T in double, into blocks of 16 output channels.
#pragma once
#include "common/parallel.h"
#include "common/simd/storage.h"
#include "winograd_conv2d/winograd_conv2d.h"
#include "winograd_conv2d/winograd_conv2d_points_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class S, int M>
static void transform_weight_of(const WinogradWeight& w, int threads) {
  constexpr int P = Filter<M>::P;
  const Filter<M> filter;
  const int64_t kg = w.k / w.groups, blocks = (kg + kWinogradLanes - 1) / kWinogradLanes;
  parallel_for(w.groups * blocks, threads, [&](int64_t unit, int) {
    const int64_t g = unit / blocks, first = unit % blocks * kWinogradLanes;
    S* packed = static_cast<S*>(w.packed) + unit * P * w.c * kWinogradLanes;
    for (int64_t c = 0; c < w.c; ++c) {
      S lanes[P][kWinogradLanes] = {};
      for (int64_t lane = 0; lane < kWinogradLanes && first + lane < kg; ++lane) {
        double kernel[9], u[P];
        const int64_t at = ((g * kg + first + lane) * w.c + c) * 9;
        for (int i = 0; i < 9; ++i) kernel[i] = value_at(w.weight, w.dtype, at + i);
        filter.transform(kernel, u);
        for (int i = 0; i < P; ++i) lanes[i][lane] = static_cast<S>(u[i]);
      }
      for (int i = 0; i < P; ++i) __builtin_memcpy(packed + (i * w.c + c) * kWinogradLanes, lanes[i], sizeof(lanes[i]));
    }
  });
}

template <class S>
static void transform_weight_to(const WinogradWeight& w, int threads) {
  if (w.tile == 2) return transform_weight_of<S, 2>(w, threads);
  if (w.tile == 4) return transform_weight_of<S, 4>(w, threads);
  if (w.tile == 5) return transform_weight_of<S, 5>(w, threads);
  transform_weight_of<S, 6>(w, threads);
}

static Status transform_weight(const WinogradWeight& w, int threads) {
  w.dtype == DType::f64 ? transform_weight_to<double>(w, threads) : transform_weight_to<float>(w, threads);
  return nullptr;
}

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
