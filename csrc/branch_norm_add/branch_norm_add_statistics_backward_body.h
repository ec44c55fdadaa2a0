// Gradients of the statistics alone: grad = (grad_mean + 2 (y - mean) grad_var) / (N P).
#pragma once
#include "branch_norm_add/branch_norm_add_view_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class X>
struct StatisticsBackward {
  using T = typename View<X>::T;
  using V = Vec<T>;
  using M = Math<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width;

  View<X> in;
  const T* grad_mean;
  const T* grad_var;
  T share;

  StatisticsBackward(const NormParams& p, const void* of_mean, const void* of_var)
      : in(p),
        grad_mean(static_cast<const T*>(of_mean)),
        grad_var(static_cast<const T*>(of_var)),
        share(T(1) / static_cast<T>(in.count())) {}

  struct Numbers {
    Reg mean, slope, offset;
  };
  Numbers scaled(Reg mean, Reg of_mean, Reg of_var) const {
    return {mean, V::mul(of_var, V::set1(2 * share)), V::mul(of_mean, V::set1(share))};
  }
  static Reg gradient(const Numbers& k, Reg y) { return V::fma(M::sub(y, k.mean), k.slope, k.offset); }

  void channel(int b, int64_t image, int64_t c) const {
    const int64_t at = b * in.c + c, start = (image * in.c + c) * in.plane;
    const T mean = static_cast<const T*>(in.p.branch[b].mean)[c];
    const Numbers k = scaled(V::set1(mean), V::set1(grad_mean[at]), V::set1(grad_var[at]));
    const X* y = in.y[b] + start;
    X* to = in.grad(b) + start;
    int64_t j = 0;
    for (; j + W <= in.plane; j += W) Io<X>::store(to + j, gradient(k, Io<X>::load(y + j)));
    if (j < in.plane) Io<X>::store_n(to + j, gradient(k, Io<X>::load_n(y + j, in.plane - j)), in.plane - j);
  }

  void row(int b, int64_t position) const {
    const T* mean = static_cast<const T*>(in.p.branch[b].mean);
    const X* y = in.y[b] + position * in.c;
    X* to = in.grad(b) + position * in.c;
    for (int64_t j = 0; j < in.c; j += W) {
      const int64_t left = in.c - j, at = b * in.c + j;
      const Numbers k =
          scaled(V::load_n(mean + j, left), V::load_n(grad_mean + at, left), V::load_n(grad_var + at, left));
      Io<X>::store_n(to + j, gradient(k, Io<X>::load_n(y + j, left)), left);
    }
  }

  void run(int threads) const {
    if (!in.channels_last) {
      const int64_t maps = in.n * in.c;
      return parallel_for(in.branches * maps, threads, [&](int64_t unit, int) {
        channel(static_cast<int>(unit / maps), unit % maps / in.c, unit % in.c);
      });
    }
    const RowBlocks cut(in.count(), in.c);
    parallel_for(in.branches * cut.count, threads, [&](int64_t unit, int) {
      const int64_t block = unit % cut.count;
      for (int64_t r = cut.begin(block); r < cut.begin(block) + cut.size(block); ++r)
        row(static_cast<int>(unit / cut.count), r);
    });
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
