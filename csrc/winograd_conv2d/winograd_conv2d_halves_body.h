// The products of few tiles with weights of which only one side is transformed in memory: both points of a pair get
// their weights in registers. Three entries a row of U go through memory instead of all, and few tiles hide no stores.
#pragma once
#include "common/always_inline.h"
#include "winograd_conv2d/winograd_conv2d_expand_body.h"
#include "winograd_conv2d/winograd_conv2d_rows_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// What the products of a pair of points read and write: `depth` channels; rows of v from tile to tile and the step to
// the pair's second point; the same of m, whose rows are of 16 outputs. add: m holds the channels before.
template <class T>
struct PairJob {
  int64_t depth, v_row, v_point, m_point;
  bool add;
  const T* v;
  T* m;
  const T* ahead;  // one line a channel is asked for
};

// kZeros, kStride: as in Expand, whose arithmetic this is: the weights have the same bits.
template <class T, int kZeros, int kStride>
struct Halves {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width, kMostTiles = 12;

  // h: the three columns of a row, `column` elements apart.
  template <int NT>
  static void micro(const PairJob<T>& job, const PairRow& row, const T* h, int64_t column) {
    const T* ahead = job.ahead;
    TileRows<T, NT> first(job.v, job.v_row), second(job.v + job.v_point, job.v_row);
    Reg plus[NT], minus[NT];
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) plus[t] = minus[t] = V::zero();
    for (int64_t c = 0; c < job.depth; ++c, h += W, ahead += W, first.advance(), second.advance()) {
      const Reg w[3] = {V::load(h), V::load(h + column), V::load(h + 2 * column)};
      Reg u[2];
      pair_weights<T, kZeros, kStride>(row, w, u);
      __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 16
      for (int t = 0; t < NT; ++t) plus[t] = V::fma(V::set1(first[t]), u[0], plus[t]);
#pragma GCC unroll 16
      for (int t = 0; t < NT; ++t) minus[t] = V::fma(V::set1(second[t]), u[1], minus[t]);
    }
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) {
      T *m0 = job.m + t * W, *m1 = m0 + job.m_point;
      V::store(m0, job.add ? V::add(V::load(m0), plus[t]) : plus[t]);
      V::store(m1, job.add ? V::add(V::load(m1), minus[t]) : minus[t]);
    }
  }

  template <int NT = kMostTiles>
  static void run(int64_t tiles, const PairJob<T>& job, const PairRow& row, const T* h, int64_t column) {
    if (tiles == NT) return micro<NT>(job, row, h, column);
    if constexpr (NT > 1) run<NT - 1>(tiles, job, row, h, column);
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
