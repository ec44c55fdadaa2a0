// Pieces of the maps <-> strips: vectors of channels, [row][column][lane], zeros outside the map.
#pragma once
#include "common/simd/rows_body.h"
#include "winograd_conv2d/winograd_conv2d_plan_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// One row of a map for `lanes` channels from `channel`.
template <class X>
struct Maps {
  using T = typename Computing<X>::Type;
  using V = Vec<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width;
  static constexpr bool kOwn = sizeof(X) == sizeof(T);

  int64_t channels, height, width;
  bool channels_last;

  int64_t offset(int64_t n, int64_t channel, int64_t h, int64_t w) const {
    return channels_last ? ((n * height + h) * width + w) * channels + channel
                         : ((n * channels + channel) * height + h) * width + w;
  }

  // to [count][W] = columns from w of row h; `flat` [W][count] is scratch.
  void read(const X* x, int64_t n, int64_t channel, int64_t lanes, int64_t h, int64_t w, int64_t count, T* to,
            T* flat) const {
    const X* from = x + offset(n, channel, h, w);
    if (channels_last) {
      for (int64_t j = 0; j < count; ++j) V::store(to + j * W, Io<X>::load_n(from + j * channels, lanes));
    } else if constexpr (kOwn) {
      Rows<T>::split(from, height * width, lanes, count, to, W);
    } else {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        for (int64_t j = 0; j < count; j += W)
          V::store_n(flat + lane * count + j, Io<X>::load_n(from + lane * height * width + j, count - j), count - j);
      }
      Rows<T>::split(flat, count, lanes, count, to, W);
    }
  }

  // The rows of `count` columns of lanes [count][W], finished by `activation` after the residual (or null).
  template <class Activation>
  void write(X* out, const X* residual, const Activation& activation, int64_t n, int64_t channel, int64_t lanes,
             int64_t h, int64_t w, int64_t count, const T* strip, T* flat) const {
    const int64_t at = offset(n, channel, h, w), pitch = height * width;
    Rows<T>::join(strip, W, lanes, count, flat, count);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (int64_t j = 0; j < count; j += W) {
        const int64_t here = at + lane * pitch + j;
        Reg y = V::load_n(flat + lane * count + j, count - j);
        if (residual != nullptr) y = V::add(y, Io<X>::load_n(residual + here, count - j));
        Io<X>::store_n(out + here, activation(y), count - j);
      }
    }
  }
};

template <class T>
struct Activate {
  using V = Vec<T>;
  using Reg = typename V::Reg;

  WinogradActivation kind;

  // NaN stays NaN: it is the second operand of max and min.
  Reg operator()(Reg y) const {
    using M = Math<T>;
    switch (kind) {
      case WinogradActivation::relu:
        return M::max(V::zero(), y);
      case WinogradActivation::relu6:
        return M::min(V::set1(6), M::max(V::zero(), y));
      case WinogradActivation::silu:
        return M::div(y, V::add(V::set1(1), M::exp(M::sub(V::zero(), y))));
      case WinogradActivation::hardswish: {
        const Reg gate = M::min(V::set1(6), M::max(V::zero(), V::add(y, V::set1(3))));
        return V::mul(V::mul(y, gate), V::set1(T(1) / T(6)));
      }
      default:
        return y;
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
