// One input and one output channel a group: vectors of channels instead of outputs, each a sum over the taps.
#pragma once
#include "common/parallel.h"
#include "common/workspace.h"
#include "direct_conv2d/direct_conv2d_maps_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

namespace {  // as Workspace

template <class T>
class Depthwise {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width;
  static constexpr int64_t kBandBytes = 1 << 18;  // of padded rows
  static constexpr int kPixels = 4;               // that share a load of weights

 public:
  static bool takes(const DirectParams& p) { return p.groups > 1 && p.groups == p.c && p.groups == p.k; }

  Depthwise(const DirectParams& p, void* workspace, int threads)
      : p_(p), s_(p), in_{p, p.c}, out_(p, s_), space_(workspace), threads_(threads) {
    pitch_ = ceil_div(p.c, W) * W;
    columns_ = (s_.ow - 1) * p.sw + (p.kw - 1) * p.dw + 1;
    row_ = columns_ * pitch_;
    reach_ = (p.kh - 1) * p.dh + 1;
    const int64_t fit = (kBandBytes / (row_ * static_cast<int64_t>(sizeof(T))) - reach_) / p.sh + 1;
    const int64_t fair = ceil_div(s_.oh, ceil_div(threads, p.n));
    rows_ = most_of(least(least(fit, fair), s_.oh), 1);
    weights_ = space_.template take<T>(s_.taps * pitch_);
    const size_t before = space_.used();
    planes_ = space_.template take<T>(((rows_ - 1) * p.sh + reach_) * row_);
    sums_ = space_.template take<T>(s_.ow * pitch_);
    own_bytes_ = space_.used() - before;
    bytes_ = before + own_bytes_ * static_cast<size_t>(threads);
  }

  size_t bytes() const { return bytes_; }

  void run() {
    for (int64_t tap = 0; tap < s_.taps; ++tap) {
      const T* packed = static_cast<const T*>(p_.packed) + tap * kWinogradLanes;
      for (int64_t c = 0; c < pitch_; ++c)
        weights_[tap * pitch_ + c] = c < p_.c ? packed[c * s_.taps * kWinogradLanes] : T(0);
    }
    const int64_t bands = ceil_div(s_.oh, rows_);
    parallel_for(p_.n * bands, threads_, [&](int64_t unit, int thread) {
      const int64_t n = unit / bands, first = unit % bands * rows_, count = least(rows_, s_.oh - first);
      const int64_t step = static_cast<int64_t>(own_bytes_ / sizeof(T)) * thread;
      T *planes = planes_ + step, *sums = sums_ + step;
      for (int64_t i = 0; i < (count - 1) * p_.sh + reach_; ++i)
        in_.row(n, 0, first * p_.sh + i - p_.ph, columns_, pitch_, planes + i * row_);
      for (int64_t i = 0; i < count; ++i) {
        sum_up(planes + i * p_.sh * row_, sums);
        out_.positions({n, 1, first + i, 1}, 0, s_.ow, 0, s_.ow, 0, p_.c, sums, pitch_);
      }
    });
  }

 private:
  // sums [ow][pitch] of one row of outputs.
  void sum_up(const T* from, T* sums) const {
    for (int64_t l = 0; l < pitch_; l += W) {
      int64_t w = 0;
      for (; w + kPixels <= s_.ow; w += kPixels) pixels<kPixels>(from + l, w, l, sums);
      for (; w < s_.ow; ++w) pixels<1>(from + l, w, l, sums);
    }
  }

  template <int kCount>
  void pixels(const T* from, int64_t w, int64_t l, T* sums) const {
    Reg sum[kCount];
    for (int j = 0; j < kCount; ++j) sum[j] = V::zero();
    const T* weight = weights_ + l;
    for (int64_t r = 0; r < p_.kh; ++r) {
      const T* line = from + r * p_.dh * row_ + w * p_.sw * pitch_;
      for (int64_t t = 0; t < p_.kw; ++t, weight += pitch_, line += p_.dw * pitch_) {
        const Reg right = V::load(weight);
        for (int j = 0; j < kCount; ++j) sum[j] = V::fma(V::load(line + j * p_.sw * pitch_), right, sum[j]);
      }
    }
    for (int j = 0; j < kCount; ++j) V::store(sums + (w + j) * pitch_ + l, sum[j]);
  }

  const DirectParams& p_;
  const DirectShape s_;
  const Input<T> in_;
  const Output<T> out_;
  Workspace space_;
  const int threads_;
  int64_t pitch_, columns_, row_, reach_, rows_;  // of padded rows: elements, pixels; rows a kernel reads; in a band
  T *weights_, *planes_, *sums_;                  // [kh kw][pitch]; [rows][columns][pitch]; [OW][pitch]
  size_t own_bytes_, bytes_;
};

}  // namespace

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
