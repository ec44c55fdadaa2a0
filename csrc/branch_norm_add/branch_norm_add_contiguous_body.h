// Contiguous maps, one channel at a time: its statistics, its sums, and the elementwise work on its runs.
#pragma once
#include "branch_norm_add/branch_norm_add_elements_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// Sums along runs in several vectors, for the latency of an addition.
template <class T>
struct Lanes {
  using V = Vec<T>;
  static constexpr int kCount = 4;
  typename V::Reg part[kCount];

  Lanes() {
    for (auto& r : part) r = V::zero();
  }
  double total() const { return V::sum(V::add(V::add(part[0], part[1]), V::add(part[2], part[3]))); }
};

template <class X>
struct Contiguous {
  using T = typename View<X>::T;
  using V = Vec<T>;
  using M = Math<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width;
  static constexpr int kLines = 4 * W * sizeof(X) > 64 ? 4 * W * sizeof(X) / 64 : 1;  // cache lines of four vectors

  const View<X>& in;
  Chunks cut;

  explicit Contiguous(const View<X>& view)
      : in(view), cut(view.n, view.plane, kChunkBytes / static_cast<int64_t>(sizeof(T))) {}

  Chunk chunk(int64_t index) const { return Chunk(cut, index, in.n, in.plane); }
  int64_t offset(int64_t image, int64_t channel, const Chunk& of) const {
    return (image * in.c + channel) * in.plane + of.begin;
  }

  // body(offset of a run)
  template <class Body>
  void over_runs(int64_t channel, const Chunk& of, const Body& body) const {
    for (int64_t image = of.image; image < of.image + of.images; ++image) body(offset(image, channel, of));
  }

  static void add_run(const X* y, int64_t length, Lanes<T>& sum) {
    int64_t j = 0;
    for (; j + 4 * W <= length; j += 4 * W) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) sum.part[u] = V::add(sum.part[u], Io<X>::load(y + j + u * W));
    }
    for (; j < length; j += W) sum.part[0] = V::add(sum.part[0], Io<X>::load_n(y + j, length - j));
  }

  // Asks for what the next chunk will read (`next`) while this one's second reading leaves memory idle.
  static void add_centred_run(const X* y, const X* next, int64_t length, T centre, Lanes<T>& sum, Lanes<T>& square) {
    const Reg middle = V::set1(centre);
    int64_t j = 0;
    for (; j + 4 * W <= length; j += 4 * W) {
#pragma GCC unroll 4
      for (int line = 0; line < kLines; ++line) __builtin_prefetch(next + j + line * (64 / sizeof(X)));
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const Reg d = M::sub(Io<X>::load(y + j + u * W), middle);
        sum.part[u] = V::add(sum.part[u], d);
        square.part[u] = V::fma(d, d, square.part[u]);
      }
    }
    for (; j < length; j += W) {
      const Reg d = M::keep(M::sub(Io<X>::load_n(y + j, length - j), middle), length - j);
      sum.part[0] = V::add(sum.part[0], d);
      square.part[0] = V::fma(d, d, square.part[0]);
    }
  }

  // From a run of this chunk to that of the next; of the next channel behind the last chunk.
  int64_t distance_to_next(int64_t channel, int64_t index, const Chunk& here) const {
    if (index + 1 == cut.count)
      return channel + 1 == in.c ? 0 : offset(0, channel + 1, chunk(0)) - offset(here.image, channel, here);
    const Chunk next = chunk(index + 1);
    return offset(next.image, channel, next) - offset(here.image, channel, here);
  }

  // A chunk's mean and its sum of squared differences from that: [2].
  void statistics(int b, int64_t channel, int64_t index, double* to) const {
    const Chunk here = chunk(index);
    const double size = static_cast<double>(here.size());
    Lanes<T> sum, off, square;
    over_runs(channel, here, [&](int64_t at) { add_run(in.y[b] + at, here.length, sum); });
    const T centre = static_cast<T>(sum.total() / size);
    const int64_t ahead = distance_to_next(channel, index, here);
    over_runs(channel, here, [&](int64_t at) {
      const X* y = in.y[b] + at;
      add_centred_run(y, y + ahead, here.length, centre, off, square);
    });
    const double d = off.total();
    to[0] = centre + d / size;
    to[1] = square.total() - d * d / size;
  }

  Run<OneChannel<T>> run_of(const Terms<X>& terms, int64_t channel) const {
    Run<OneChannel<T>> run;
    run.scale = OneChannel<T>(terms.rows, 0, in.branches, channel);
    run.mean = OneChannel<T>(terms.rows, in.branches, in.branches, channel);
    run.shift = OneChannel<T>(terms.rows, 2 * in.branches, 1, channel);
    return run;
  }

  template <Known K>
  void forward(const Run<OneChannel<T>>& run, int64_t channel, int64_t index, X* out, bool stream) const {
    const Chunk here = chunk(index);
    over_runs(channel, here,
              [&](int64_t at) { Elements<X, K, OneChannel<T>>{in, run, at}.forward(out, here.length, stream); });
  }

  template <Known K>
  void backward(const Run<OneChannel<T>>& run, const GradRun<X, OneChannel<T>>& to, int64_t channel, int64_t index,
                bool stream) const {
    const Chunk here = chunk(index);
    over_runs(channel, here,
              [&](int64_t at) { Elements<X, K, OneChannel<T>>{in, run, at}.backward(to, here.length, stream); });
  }

  // A chunk's sum of dz, and of dz (y_b - mean_b) for every branch with a norm: [1 + Bn].
  template <Known K>
  void sums(const Run<OneChannel<T>>& run, int64_t channel, int64_t index, const X* grad, double* to) const {
    const Chunk here = chunk(index);
    Reg plain[2] = {V::zero(), V::zero()}, product[kMostNormBranches][2];
    for (auto& pair : product) pair[0] = pair[1] = V::zero();
    over_runs(channel, here, [&](int64_t at) {
      const Elements<X, K, OneChannel<T>> elements{in, run, at};
      int64_t j = 0;
      for (; j + 4 * W <= here.length; j += 4 * W) sums_step<K, 4, false>(elements, grad, j, 0, plain, product);
      for (; j + W <= here.length; j += W) sums_step<K, 1, false>(elements, grad, j, 0, plain, product);
      if (j < here.length) sums_step<K, 1, true>(elements, grad, j, here.length - j, plain, product);
    });
    *to++ = V::sum(V::add(plain[0], plain[1]));
    for (int b = 0; b < in.branches; ++b) {
      if (in.normed(b)) *to++ = V::sum(V::add(product[b][0], product[b][1]));
    }
  }

  template <Known K, int N, bool kPart>
  void sums_step(const Elements<X, K, OneChannel<T>>& elements, const X* grad, int64_t j, int64_t left, Reg (&plain)[2],
                 Reg (&product)[kMostNormBranches][2]) const {
    using E = Elements<X, K, OneChannel<T>>;
    Reg dz[N];
    elements.template grad_of_sum<N, kPart>(grad, j, left, dz);
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) plain[u % 2] = V::add(plain[u % 2], dz[u]);
    for (int b = 0; b < in.branches; ++b) {
      if (!in.normed(b)) continue;
      const Reg mean = elements.run.mean.at(b, j);
      const X* y = in.y[b] + elements.start + j;
#pragma GCC unroll 4
      for (int u = 0; u < N; ++u) {
        const Reg centred = M::sub(E::template load<kPart>(y + u * W, left), mean);
        product[b][u % 2] = V::fma(dz[u], centred, product[b][u % 2]);
      }
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
