// channels_last maps, in blocks of rows: a lane is a channel, a row the channels of one position.
#pragma once
#include "branch_norm_add/branch_norm_add_elements_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class X>
struct ChannelsLast {
  using T = typename View<X>::T;
  using V = Vec<T>;
  using M = Math<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width;
  static constexpr int kStatisticsRows = 3;  // of a block: the centre, the sum of differences from it, of their squares

  const View<X>& in;
  RowBlocks cut;

  explicit ChannelsLast(const View<X>& view) : in(view), cut(view.count(), view.c) {}

  // body<N, kPart>(first lane, lanes left) over the channels
  template <class Body>
  void over_lanes(const Body& body) const {
    int64_t j = 0;
    for (; j + 4 * W <= in.c; j += 4 * W) body.template run<4, false>(j, 0);
    for (; j + 2 * W <= in.c; j += 2 * W) body.template run<2, false>(j, 0);
    for (; j + W <= in.c; j += W) body.template run<1, false>(j, 0);
    if (j < in.c) body.template run<1, true>(j, in.c - j);
  }

  template <bool kPart>
  static Reg load(const X* from, int64_t left) {
    return kPart ? Io<X>::load_n(from, left) : Io<X>::load(from);
  }

  struct Statistics {
    const X* y;  // the block's first row
    int64_t rows, pitch;
    T* to;  // kStatisticsRows rows, `lanes` apart
    int64_t lanes;

    template <int N, bool kPart>
    void run(int64_t j, int64_t left) const {
      Reg sum[N], off[N], square[N];
      for (int u = 0; u < N; ++u) sum[u] = off[u] = square[u] = V::zero();
      for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) sum[u] = V::add(sum[u], load<kPart>(y + r * pitch + j + u * W, left));
      }
      const Reg share = V::set1(T(1) / static_cast<T>(rows));
      for (int u = 0; u < N; ++u) sum[u] = V::mul(sum[u], share);
      for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) {
          const Reg d = M::sub(load<kPart>(y + r * pitch + j + u * W, left), sum[u]);
          off[u] = V::add(off[u], d);
          square[u] = V::fma(d, d, square[u]);
        }
      }
      for (int u = 0; u < N; ++u) {
        V::store(to + j + u * W, sum[u]);
        V::store(to + lanes + j + u * W, off[u]);
        V::store(to + 2 * lanes + j + u * W, square[u]);
      }
    }
  };

  void statistics(int b, int64_t block, T* to) const {
    over_lanes(Statistics{in.y[b] + cut.begin(block) * in.c, cut.size(block), in.c, to, in.lanes});
  }

  Run<EachChannel<T>> run_of(const Terms<X>& terms) const {
    return {EachChannel<T>(terms.rows, 0), EachChannel<T>(terms.rows, in.branches),
            EachChannel<T>(terms.rows, 2 * in.branches)};
  }

  template <Known K>
  void forward(const Run<EachChannel<T>>& run, int64_t block, X* out, bool stream) const {
    const int64_t begin = cut.begin(block), end = begin + cut.size(block);
    for (int64_t r = begin; r < end; ++r) Elements<X, K, EachChannel<T>>{in, run, r * in.c}.forward(out, in.c, stream);
  }

  template <Known K>
  void backward(const Run<EachChannel<T>>& run, const GradRun<X, EachChannel<T>>& to, int64_t block,
                bool stream) const {
    const int64_t begin = cut.begin(block), end = begin + cut.size(block);
    for (int64_t r = begin; r < end; ++r) Elements<X, K, EachChannel<T>>{in, run, r * in.c}.backward(to, in.c, stream);
  }

  template <Known K>
  struct Sums {
    const View<X>& in;
    const Run<EachChannel<T>>& numbers;
    const X* grad;
    int64_t begin, rows;
    T* to;

    template <int N, bool kPart>
    void run(int64_t j, int64_t left) const {
      Reg plain[N], product[kMostNormBranches][N];
      for (int u = 0; u < N; ++u) plain[u] = V::zero();
      for (int b = 0; b < in.branches; ++b) {
        for (int u = 0; u < N; ++u) product[b][u] = V::zero();
      }
      for (int64_t at = begin * in.c; at < (begin + rows) * in.c; at += in.c) {
        Reg dz[N];
        Elements<X, K, EachChannel<T>>{in, numbers, at}.template grad_of_sum<N, kPart>(grad, j, left, dz);
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) plain[u] = V::add(plain[u], dz[u]);
        for (int b = 0; b < in.branches; ++b) {
          if (!in.normed(b)) continue;
#pragma GCC unroll 4
          for (int u = 0; u < N; ++u) {
            const Reg y = load<kPart>(in.y[b] + at + j + u * W, left);
            product[b][u] = V::fma(dz[u], M::sub(y, numbers.mean.at(b, j + u * W)), product[b][u]);
          }
        }
      }
      for (int u = 0; u < N; ++u) V::store(to + j + u * W, plain[u]);
      T* next = to + in.lanes + j;
      for (int b = 0; b < in.branches; ++b) {
        if (!in.normed(b)) continue;
        for (int u = 0; u < N; ++u) V::store(next + u * W, product[b][u]);
        next += in.lanes;
      }
    }
  };

  // A block's sum of dz, and of dz (y_b - mean_b) for every branch with a norm: 1 + Bn rows of numbers per channel.
  template <Known K>
  void sums(const Run<EachChannel<T>>& numbers, int64_t block, const X* grad, T* to) const {
    over_lanes(Sums<K>{in, numbers, grad, cut.begin(block), cut.size(block), to});
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
