// Rows of the input as padded rows of pixels, whatever the memory format; and finished outputs into the maps.
#pragma once
#include "direct_conv2d/direct_conv2d_shape.h"
#include "winograd_conv2d/winograd_conv2d_maps_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// The channels of one group.
template <class T>
struct Input {
  using V = Vec<T>;
  static constexpr int W = V::width;

  const DirectParams& p;
  int64_t cg;

  // to [columns][pitch] = columns of row h (which may lie outside the map) from -pw on, zeros outside.
  void row(int64_t n, int64_t g, int64_t h, int64_t columns, int64_t pitch, T* to) const {
    if (h < 0 || h >= p.h) return Rows<T>::clear(to, columns * pitch);
    const int64_t left = least(p.pw, columns), right = most_of(least(p.pw + p.w, columns), left);
    Rows<T>::clear(to, left * pitch);
    Rows<T>::clear(to + right * pitch, (columns - right) * pitch);
    const T* x = static_cast<const T*>(p.x);
    if (p.channels_last) {
      pixels(x + ((n * p.h + h) * p.w) * p.c + g * cg, right - left, pitch, to + left * pitch);
    } else {
      planes(x + ((n * p.c + g * cg) * p.h + h) * p.w, right - left, pitch, to + left * pitch);
    }
  }

 private:
  void pixels(const T* from, int64_t count, int64_t pitch, T* to) const {
    if (cg == p.c && pitch == cg) {
      __builtin_memcpy(to, from, sizeof(T) * static_cast<size_t>(count * cg));
      return;
    }
    for (int64_t j = 0; j < count; ++j, from += p.c, to += pitch) {
      int64_t c = 0;
      for (; c + W <= cg; c += W) V::store(to + c, V::load(from + c));
      if (c < cg) V::store_n(to + c, V::load_n(from + c, cg - c), cg - c);
      for (c = cg; c < pitch; ++c) to[c] = 0;
    }
  }

  void planes(const T* from, int64_t count, int64_t pitch, T* to) const {
    const int64_t plane = p.h * p.w;
    int64_t c = 0;
    for (; c + W <= cg; c += W) Rows<T>::split(from + c * plane, plane, W, count, to + c, pitch);
    for (; c < pitch; ++c) {
      const T* line = from + c * plane;
      for (int64_t j = 0; j < count; ++j) to[j * pitch + c] = c < cg ? line[j] : T(0);
    }
  }
};

// Sums of outputs next to each other in a row -> bias, residual, activation -> the map.
template <class T>
struct Output {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width;
  static constexpr int64_t kMostPixels = 64;  // of one call for NCHW maps

  const DirectParams& p;
  int64_t oh, ow;
  Activate<T> activate;

  explicit Output(const DirectParams& params, const DirectShape& s)
      : p(params), oh(s.oh), ow(s.ow), activate{static_cast<WinogradActivation>(params.activation)} {}

  // sums: rows `pitch` apart for `count` positions from q on, `width` of them in a row of a piece; those behind the
  // map's last column are nobody's.
  void positions(const DirectPiece& piece, int64_t image, int64_t width, int64_t q, int64_t count, int64_t k,
                 int64_t lanes, T* sums, int64_t pitch) const {
    for (int64_t at = q; at < q + count;) {
      const int64_t row = at / width, column = at % width, left = least(q + count - at, width - column);
      if (column < ow) {
        write(piece.image + image, piece.row + row, column, least(left, ow - column), k, lanes, sums + (at - q) * pitch,
              pitch);
      }
      at += left;
    }
  }

 private:
  // sums: `count` rows `pitch` apart of `lanes` outputs from channel k, for the pixels from (n, h, w) on.
  void write(int64_t n, int64_t h, int64_t w, int64_t count, int64_t k, int64_t lanes, T* sums, int64_t pitch) const {
    T* out = static_cast<T*>(p.out);
    const T* residual = static_cast<const T*>(p.residual);
    for (int64_t l = 0; l < lanes; l += W) {
      const int64_t some = least(W, lanes - l);
      const Reg bias = p.bias == nullptr ? V::zero() : V::load_n(static_cast<const T*>(p.bias) + k + l, some);
      if (p.channels_last) {
        const int64_t at = ((n * oh + h) * ow + w) * p.k + k + l;
        some == W ? pixels<true>(sums + l, pitch, count, bias, residual, out, at, some)
                  : pixels<false>(sums + l, pitch, count, bias, residual, out, at, some);
      } else {
        const int64_t at = ((n * p.k + k + l) * oh + h) * ow + w;
        for (int64_t j = 0; j < count; j += kMostPixels)
          planes(sums + j * pitch + l, pitch, least(kMostPixels, count - j), bias, residual, out, at + j, some);
      }
    }
  }

  template <bool kWhole>
  void pixels(const T* sums, int64_t pitch, int64_t count, Reg bias, const T* residual, T* out, int64_t at,
              int64_t lanes) const {
    for (int64_t j = 0; j < count; ++j, at += p.k) {
      Reg y = V::add(V::load(sums + j * pitch), bias);
      if (residual != nullptr) y = V::add(y, kWhole ? V::load(residual + at) : V::load_n(residual + at, lanes));
      kWhole ? V::store(out + at, activate(y)) : V::store_n(out + at, activate(y), lanes);
    }
  }

  void planes(T* sums, int64_t pitch, int64_t count, Reg bias, const T* residual, T* out, int64_t at,
              int64_t lanes) const {
    T flat[W * kMostPixels];
    for (int64_t j = 0; j < count; ++j) V::store(sums + j * pitch, V::add(V::load(sums + j * pitch), bias));
    Rows<T>::join(sums, pitch, lanes, count, flat, kMostPixels);
    for (int64_t l = 0; l < lanes; ++l, at += oh * ow) {
      for (int64_t j = 0; j < count; j += W) {
        Reg y = V::load_n(flat + l * kMostPixels + j, count - j);
        if (residual != nullptr) y = V::add(y, V::load_n(residual + at + j, count - j));
        V::store_n(out + at + j, activate(y), count - j);
      }
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
