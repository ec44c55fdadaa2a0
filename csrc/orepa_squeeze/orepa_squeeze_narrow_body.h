// Groups of few channels: nothing is transposed, the vectors run over the K * K positions.
#pragma once
#include "orepa_squeeze/orepa_squeeze_view_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class T>
struct Narrow {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  using R = Rows<T>;
  static constexpr int W = V::width;

  static int64_t forward_scratch(const View<T>& in) { return 2 * in.cig * in.kk; }

  // sum_t reduce[t, i] expand[o, t, j ..], n lanes.
  static Reg reduced(const View<T>& in, int64_t g, int64_t o, int64_t i, int64_t j, int64_t n) {
    const T* column = in.reduce + g * in.cmg * in.cig + i;
    const T* expand = in.expand + o * in.cmg * in.kk + j;
    Reg total = V::zero();
    for (int64_t t = 0; t < in.cmg; ++t)
      total = V::fma(V::set1(column[t * in.cig]), V::load_n(expand + t * in.kk, n), total);
    if (in.identity) {
      for (int64_t t = i; t < in.cmg; t += in.cig) total = V::add(V::load_n(expand + t * in.kk, n), total);
    }
    return total;
  }

  static Reg projected(const View<T>& in, int64_t g, int64_t o, int64_t i, int64_t j, int64_t n) {
    const T* depthwise = in.depthwise + (g * in.cig + i) * in.e * in.kk + j;
    const T* project = in.project + (o * in.cig + i) * in.e;
    Reg total = V::zero();
    for (int64_t q = 0; q < in.e; ++q) total = V::fma(V::set1(project[q]), V::load_n(depthwise + q * in.kk, n), total);
    return total;
  }

  // The kernel of output channel `o`, [Ci/g, K, K], into `row`.
  static void forward_row(const View<T>& in, int64_t o, T* row) {
    const int64_t g = in.group_of(o), kk = in.kk;
    const T s_origin = in.scale(kOrigin, o), s_avg = in.scale(kAvg, o) / static_cast<T>(kk),
            s_prior = in.scale(kPrior, o);
    const Reg s_expand = V::set1(in.scale(kExpand, o)), s_project = V::set1(in.scale(kProject, o));
    for (int64_t i = 0; i < in.cig; ++i) {
      const int64_t at = o * in.cig + i;
      for (int64_t j = 0; j < kk; j += W) {
        const int64_t n = R::lesser(W, kk - j);
        Reg sum = V::zero();
        if (in.expand != nullptr) sum = V::fma(s_expand, reduced(in, g, o, i, j, n), sum);
        if (in.project != nullptr) sum = V::fma(s_project, projected(in, g, o, i, j, n), sum);
        if (in.avg != nullptr) sum = V::add(V::set1(s_avg * in.avg[at]), sum);
        if (in.prior != nullptr)
          sum = V::fma(V::set1(s_prior * in.prior[at]), V::load_n(in.filter + o * kk + j, n), sum);
        if (in.origin != nullptr) sum = V::fma(V::set1(s_origin), V::load_n(in.origin + at * kk + j, n), sum);
        V::store_n(row + i * kk + j, sum, n);
      }
      if (in.pointwise != nullptr) row[i * kk + in.centre()] += in.scale(kPointwise, o) * in.pointwise[at];
    }
  }

  static void forward(const View<T>& in, int64_t o, void* out, DType out_dtype, bool channels_last, T* scratch) {
    const int64_t size = in.cig * in.kk;
    forward_row(in, o, scratch);
    if (channels_last) {
      for (int64_t j = 0; j < in.kk; ++j)
        for (int64_t i = 0; i < in.cig; ++i) scratch[size + j * in.cig + i] = scratch[i * in.kk + j];
      scratch += size;
    }
    R::store_as(out, o * size, out_dtype, scratch, size);
  }

  // All gradients that belong to one output channel.
  static void backward_output(const View<T>& in, const GradView<T>& to, int64_t o) {
    const int64_t g = in.group_of(o), kk = in.kk, size = in.cig * kk;
    const T* grad = to.out + o * size;
    if (in.origin != nullptr)
      to.set_scale(kOrigin, o,
                   R::scale_dot(to.origin + o * size, grad, in.origin + o * size, in.scale(kOrigin, o), size));
    T d_avg = 0, d_prior = 0, d_pointwise = 0, d_project = 0;
    for (int64_t i = 0; i < in.cig; ++i, grad += kk) {
      const int64_t at = o * in.cig + i;
      if (in.avg != nullptr) {
        const T mean = R::sum(grad, kk) / static_cast<T>(kk);
        to.avg[at] = in.scale(kAvg, o) * mean;
        d_avg += in.avg[at] * mean;
      }
      if (in.prior != nullptr) {
        const T inner = R::dot(grad, in.filter + o * kk, kk);
        to.prior[at] = in.scale(kPrior, o) * inner;
        d_prior += in.prior[at] * inner;
      }
      if (in.pointwise != nullptr) {
        to.pointwise[at] = in.scale(kPointwise, o) * grad[in.centre()];
        d_pointwise += in.pointwise[at] * grad[in.centre()];
      }
      for (int64_t q = 0; in.project != nullptr && q < in.e; ++q) {
        const T inner = R::dot(grad, in.depthwise + ((g * in.cig + i) * in.e + q) * kk, kk);
        to.project[at * in.e + q] = in.scale(kProject, o) * inner;
        d_project += in.project[at * in.e + q] * inner;
      }
    }
    if (in.avg != nullptr) to.set_scale(kAvg, o, d_avg);
    if (in.prior != nullptr) to.set_scale(kPrior, o, d_prior);
    if (in.pointwise != nullptr) to.set_scale(kPointwise, o, d_pointwise);
    if (in.project != nullptr) to.set_scale(kProject, o, d_project);
    if (in.expand != nullptr) backward_expand(in, to, g, o);
  }

  static void backward_expand(const View<T>& in, const GradView<T>& to, int64_t g, int64_t o) {
    const T* grad = to.out + o * in.cig * in.kk;
    const Reg scale = V::set1(in.scale(kExpand, o));
    Reg d_scale = V::zero();
    for (int64_t t = 0; t < in.cmg; ++t) {
      const int64_t row = (o * in.cmg + t) * in.kk;
      for (int64_t j = 0; j < in.kk; j += W) {
        const int64_t n = R::lesser(W, in.kk - j);
        Reg sum = V::zero();
        for (int64_t i = 0; i < in.cig; ++i)
          sum = V::fma(V::set1(in.reduce_at(g, t, i)), V::load_n(grad + i * in.kk + j, n), sum);
        d_scale = V::fma(V::load_n(in.expand + row + j, n), sum, d_scale);
        V::store_n(to.expand + row + j, V::mul(scale, sum), n);
      }
    }
    to.set_scale(kExpand, o, V::sum(d_scale));
  }

  // grad depthwise of one input channel.
  static void backward_depthwise(const View<T>& in, const GradView<T>& to, int64_t channel) {
    const int64_t g = channel / in.cig, i = channel % in.cig;
    for (int64_t q = 0; q < in.e; ++q) {
      for (int64_t j = 0; j < in.kk; j += W) {
        const int64_t n = R::lesser(W, in.kk - j);
        Reg sum = V::zero();
        for (int64_t o = g * in.cog; o < (g + 1) * in.cog; ++o) {
          const T factor = in.scale(kProject, o) * in.project[(o * in.cig + i) * in.e + q];
          sum = V::fma(V::set1(factor), V::load_n(to.out + (o * in.cig + i) * in.kk + j, n), sum);
        }
        V::store_n(to.depthwise + (channel * in.e + q) * in.kk + j, sum, n);
      }
    }
  }

  // grad reduce of one internal channel.
  static void backward_reduce(const View<T>& in, const GradView<T>& to, int64_t channel) {
    const int64_t g = channel / in.cmg, t = channel % in.cmg;
    for (int64_t i = 0; i < in.cig; ++i) {
      Reg sum = V::zero();
      for (int64_t o = g * in.cog; o < (g + 1) * in.cog; ++o) {
        const Reg scale = V::set1(in.scale(kExpand, o));
        const T* expand = in.expand + (o * in.cmg + t) * in.kk;
        const T* grad = to.out + (o * in.cig + i) * in.kk;
        for (int64_t j = 0; j < in.kk; j += W) {
          const int64_t n = R::lesser(W, in.kk - j);
          sum = V::fma(V::mul(scale, V::load_n(expand + j, n)), V::load_n(grad + j, n), sum);
        }
      }
      to.reduce[channel * in.cig + i] = V::sum(sum);
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
