// Elementwise work on a run of memory, for both layouts: a run is positions of one channel, whose numbers are then the
// same in every lane, or the channels of one position.
#pragma once
#include "branch_norm_add/branch_norm_add_activation_body.h"
#include "branch_norm_add/branch_norm_add_view_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// A number per channel, for a run within one channel.
template <class T>
struct OneChannel {
  T value[kMostNormBranches] = {};

  OneChannel() = default;
  OneChannel(const ChannelRows<T>& rows, int64_t first, int count, int64_t channel) {
    for (int r = 0; r < count; ++r) value[r] = rows.at(first + r, channel);
  }
  typename Vec<T>::Reg at(int r, int64_t) const { return Vec<T>::set1(value[r]); }
};

// The same for a run over channels. Rows are padded, so that the last vector may be loaded whole.
template <class T>
struct EachChannel {
  const T* data;
  int64_t lanes;

  EachChannel(const ChannelRows<T>& rows, int64_t first) : data(rows.row(first)), lanes(rows.lanes) {}
  typename Vec<T>::Reg at(int r, int64_t lane) const { return Vec<T>::load(data + r * lanes + lane); }
};

// What makes z of the branches' maps.
template <class Numbers>
struct Run {
  Numbers scale, mean, shift;
};

// What turns dz into gradients: grad_b = scale_b dz + slope_b (y_b - mean_b) + offset_b; the whole maps. Null: not
// wanted.
template <class X, class Numbers>
struct GradRun {
  Numbers slope, offset;
  const X* out;
  X* y[kMostNormBranches];
  X* as_is;
};

template <class X, Known K, class Numbers>
struct Elements {
  using T = typename View<X>::T;
  using V = Vec<T>;
  using M = Math<T>;
  using Reg = typename V::Reg;
  using A = Activation<T, K>;
  static constexpr int W = V::width;
  static constexpr int kWide = 4;  // vectors in registers at once

  const View<X>& in;
  const Run<Numbers>& run;
  int64_t start;  // of the run, in every map

  // With kPart the last, incomplete vector of a run: `left` elements.
  template <bool kPart>
  static Reg load(const X* from, int64_t left) {
    return kPart ? Io<X>::load_n(from, left) : Io<X>::load(from);
  }
  template <bool kPart, bool kStream>
  static void store(X* to, Reg r, int64_t left) {
    if (kPart) {
      Io<X>::store_n(to, r, left);
    } else if (kStream) {
      Io<X>::stream(to, r);
    } else {
      Io<X>::store(to, r);
    }
  }
  // Of a map whose first element is: see Job::streams.
  bool aligned() const { return start * static_cast<int64_t>(sizeof(X)) % Io<X>::kStreamAlignment == 0; }

  template <int N, bool kPart>
  void sum_branches(int64_t j, int64_t left, Reg (&z)[N]) const {
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) z[u] = run.shift.at(0, j + u * W);
    for (int b = 0; b < in.branches; ++b) {
      const X* y = in.y[b] + start + j;
#pragma GCC unroll 4
      for (int u = 0; u < N; ++u) z[u] = V::fma(load<kPart>(y + u * W, left), run.scale.at(b, j + u * W), z[u]);
    }
  }

  template <int N, bool kPart>
  void grad_of_sum(const X* grad, int64_t j, int64_t left, Reg (&dz)[N]) const {
    Reg z[N];
    if (K != Known::none) sum_branches<N, kPart>(j, left, z);
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
      const Reg g = load<kPart>(grad + start + j + u * W, left);
      dz[u] = K == Known::none ? g : A::backward(g, z[u], in.activation);
    }
  }

  template <int N, bool kPart, bool kStream>
  void forward_step(X* out, int64_t j, int64_t left) const {
    Reg z[N];
    sum_branches<N, kPart>(j, left, z);
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) store<kPart, kStream>(out + start + j + u * W, A::value(z[u], in.activation), left);
  }

  template <int N, bool kPart, bool kStream>
  void backward_step(const GradRun<X, Numbers>& to, int64_t j, int64_t left) const {
    Reg dz[N];
    grad_of_sum<N, kPart>(to.out, j, left, dz);
    for (int b = 0; b < in.branches; ++b) {
      if (to.y[b] == nullptr) continue;
      const bool batch = in.mode[b] == NormMode::batch;
#pragma GCC unroll 4
      for (int u = 0; u < N; ++u) {
        const int64_t at = j + u * W;
        Reg grad = V::mul(dz[u], run.scale.at(b, at));
        if (batch) {
          const Reg centred = M::sub(load<kPart>(in.y[b] + start + at, left), run.mean.at(b, at));
          grad = V::fma(dz[u], run.scale.at(b, at), V::fma(centred, to.slope.at(b, at), to.offset.at(b, at)));
        }
        store<kPart, kStream>(to.y[b] + start + at, grad, left);
      }
    }
    if (to.as_is == nullptr) return;
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) store<kPart, kStream>(to.as_is + start + j + u * W, dz[u], left);
  }

  template <bool kStream>
  void forward_run(X* out, int64_t length) const {
    int64_t j = 0;
    for (; j + kWide * W <= length; j += kWide * W) forward_step<kWide, false, kStream>(out, j, 0);
    for (; j + W <= length; j += W) forward_step<1, false, kStream>(out, j, 0);
    if (j < length) forward_step<1, true, false>(out, j, length - j);
  }
  void forward(X* out, int64_t length, bool stream) const {
    stream&& aligned() ? forward_run<true>(out, length) : forward_run<false>(out, length);
  }

  template <bool kStream>
  void backward_run(const GradRun<X, Numbers>& to, int64_t length) const {
    int64_t j = 0;
    for (; j + kWide * W <= length; j += kWide * W) backward_step<kWide, false, kStream>(to, j, 0);
    for (; j + W <= length; j += W) backward_step<1, false, kStream>(to, j, 0);
    if (j < length) backward_step<1, true, false>(to, j, length - j);
  }
  void backward(const GradRun<X, Numbers>& to, int64_t length, bool stream) const {
    stream&& aligned() ? backward_run<true>(to, length) : backward_run<false>(to, length);
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
