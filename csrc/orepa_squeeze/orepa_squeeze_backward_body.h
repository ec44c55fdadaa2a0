// Backward of one layer whose groups fill vectors, in four steps whose units are independent:
// pack; one pass over the output gradient; grad expand (and the last sum of grad depthwise); grad reduce.
#pragma once
#include "common/lane_product_body.h"
#include "orepa_squeeze/orepa_squeeze_forward_body.h"
#include "orepa_squeeze/orepa_squeeze_view_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class T>
struct BackwardPlan {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  using R = Rows<T>;
  static constexpr int W = V::width;
  static constexpr int64_t kTilePositions = 36;   // as in ForwardPlan
  static constexpr int64_t kPart = 16;            // fewest output channels in a unit of the pass over the gradient
  static constexpr int64_t kChunkPositions = 54;  // positions of the gradient that are in work at once there
  static constexpr int64_t kDepth = 320;          // positions summed between two visits to a tile of grad reduce
  static constexpr int64_t kRange = 144;          // most internal channels in a unit of grad reduce

  View<T> in;
  GradView<T> to;
  Panels<T> panels;     // of input channels
  Panels<T> internals;  // of internal channels
  int64_t block;        // output channels in a unit of grad expand
  int64_t parts;        // units of the pass over the output gradient in a group; not a matter of threads
  int64_t chunk;        // output channels in work at once there
  int64_t ranges;       // units of grad reduce in a group
  T* reduce;            // [g][internal panel][Ci/g][lanes]: reduce transposed
  T* depthwise;         // [g][vector][e][K * K][W]
  T* outer;             // [g][panel][Co/g][K * K][lanes]: the output gradient times the scale of the product branch
  T* sums;              // [g][part][vector][e][K * K][W]: grad depthwise, a part for each unit of the pass

  BackwardPlan(const View<T>& view, const GradView<T>& grads, int threads)
      : in(view),
        to(grads),
        panels(view.cig),
        internals(larger(view.cmg, 1)),
        block(lesser(larger(kTilePositions / view.kk, 1), 18)),
        parts(lesser(divide_up(view.cog, kPart), 8)),
        chunk(lesser(larger(kChunkPositions / view.kk, 1), 12)) {
    block = lesser(block, larger(view.co / (2 * threads), 1));
    const int64_t wanted = larger(divide_up(view.cmg, kRange), divide_up(2 * threads, view.groups));
    ranges = lesser(wanted, divide_up(view.cmg, 9));
  }

  template <class Space>
  void take(Space& space) {
    const int64_t lanes = in.groups * panels.vectors * W, inner = in.groups * internals.vectors * W;
    reduce = space.template take<T>(in.expand == nullptr ? 0 : inner * in.cig);
    depthwise = space.template take<T>(in.project == nullptr ? 0 : lanes * in.e * in.kk);
    outer = space.template take<T>(in.expand == nullptr ? 0 : lanes * in.cog * in.kk);
    sums = space.template take<T>(in.project == nullptr ? 0 : lanes * parts * in.e * in.kk);
  }

  int64_t pack_units() const { return in.groups * (panels.count + (in.expand == nullptr ? 0 : internals.count)); }
  int64_t pass_units() const { return in.groups * parts; }
  int64_t blocks_per_group() const { return in.expand == nullptr ? 0 : divide_up(in.cog, block); }
  int64_t expand_units() const {
    return in.groups * (blocks_per_group() + (in.project == nullptr ? 0 : panels.vectors));
  }
  int64_t reduce_units() const { return in.expand == nullptr ? 0 : in.groups * ranges; }

  int64_t pass_scratch() const { return larger(chunk * (in.kk + 2 * in.e + kSqueezeBranches), in.e * in.kk) * W; }
  int64_t expand_scratch() const { return (block + 1) * in.kk * panels_widest(); }
  int64_t reduce_scratch() const { return divide_up(in.cmg, larger(ranges, 1)) * panels.vectors * W; }
  int64_t scratch() const { return larger(pass_scratch(), larger(expand_scratch(), reduce_scratch())); }
  static int64_t panels_widest() { return V::panel * W; }

  T* packed_reduce(int64_t g, int64_t panel) const {
    return reduce + (g * internals.vectors + internals.first_vector(panel)) * W * in.cig;
  }
  T* packed_depthwise(int64_t g, int64_t v) const { return depthwise + (g * panels.vectors + v) * W * in.e * in.kk; }
  T* part_of_depthwise(int64_t g, int64_t part) const {
    return sums + (g * parts + part) * panels.vectors * W * in.e * in.kk;
  }
  T* packed_outer(int64_t g, int64_t panel) const {
    return outer + (g * panels.vectors + panels.first_vector(panel)) * W * in.cog * in.kk;
  }

  // --- pack ---

  void pack(int64_t unit) const {
    const int64_t depthwise_units = in.groups * panels.count;
    if (unit >= depthwise_units)
      return pack_reduce((unit - depthwise_units) / internals.count, (unit - depthwise_units) % internals.count);
    if (in.project == nullptr) return;
    const int64_t g = unit / panels.count, panel = unit % panels.count;
    for (int64_t v = panels.first_vector(panel); v < panels.first_vector(panel + 1); ++v)
      pack_depthwise(in, g, v, packed_depthwise(g, v));
  }

  void pack_reduce(int64_t g, int64_t panel) const {
    const int64_t width = internals.width(panel) * W, first = internals.first_lane(panel);
    T* packed = packed_reduce(g, panel);
    for (int64_t lane = 0; lane < width; lane += W) {
      const int64_t t = first + lane, lanes = lesser(W, in.cmg - t);
      R::split(in.reduce + (g * in.cmg + t) * in.cig, in.cig, lanes, in.cig, packed + lane, width);
      for (int64_t n = 0; in.identity && n < lanes; ++n) packed[(t + n) % in.cig * width + lane + n] += 1;
    }
  }

  // --- the pass over the output gradient ---

  void pass(int64_t unit, T* scratch) const {
    const int64_t g = unit / parts, part = unit % parts;
    const int64_t begin = in.cog * part / parts, end = in.cog * (part + 1) / parts;
    T* sums = part_of_depthwise(g, part);
    if (in.project != nullptr) R::clear(sums, panels.vectors * in.e * in.kk * W);
    for (int64_t o = begin; o < end; o += chunk) pass_chunk(g, g * in.cog + o, lesser(chunk, end - o), sums, scratch);
  }

  void pass_chunk(int64_t g, int64_t o, int64_t outputs, T* sums, T* work) const {
    T* grads = work;                           // [output][K * K][W]
    T* weights = grads + chunk * in.kk * W;    // [output][e][W]
    T* inner = weights + chunk * in.e * W;     // [output][e][W]
    T* scale_sums = inner + chunk * in.e * W;  // [output][branch][W]
    R::clear(scale_sums, outputs * kSqueezeBranches * W);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      for (int64_t v = 0; v < panels.width(panel); ++v) {
        const int64_t i = panels.first_lane(panel) + v * W, lanes = lesser(W, in.cig - i);
        for (int64_t n = 0; n < outputs; ++n) {
          T* grad = grads + n * in.kk * W;
          R::split(to.out + ((o + n) * in.cig + i) * in.kk, in.kk, lanes, in.kk, grad, W);
          simple(o + n, i, lanes, grad, scale_sums + n * kSqueezeBranches * W);
          if (in.expand != nullptr) keep(g, panel, v, o + n, grad);
        }
        if (in.project != nullptr)
          projected(g, i, lanes, o, outputs, grads, weights, inner, scale_sums, sums + i * in.e * in.kk);
      }
    }
    for (int64_t n = 0; n < outputs; ++n) finish_scales(o + n, scale_sums + n * kSqueezeBranches * W);
  }

  void finish_scales(int64_t o, const T* scale_sums) const {
    const bool summed[] = {false, in.avg != nullptr,       in.prior != nullptr,
                           false, in.pointwise != nullptr, in.project != nullptr};
    for (int b = 0; b < kSqueezeBranches; ++b) {
      if (summed[b]) to.set_scale(static_cast<Branch>(b), o, V::sum(V::load(scale_sums + b * W)));
    }
    if (in.origin == nullptr) return;
    const int64_t size = in.cig * in.kk;
    to.set_scale(
        kOrigin, o,
        R::scale_dot(to.origin + o * size, to.out + o * size, in.origin + o * size, in.scale(kOrigin, o), size));
  }

  // The parts of grad depthwise, summed in their order whichever thread made them.
  void finish_depthwise(int64_t unit, T* total) const {
    const int64_t g = unit / panels.vectors, v = unit % panels.vectors, rows = in.e * in.kk;
    const int64_t i = v * W, lanes = lesser(W, in.cig - i);
    R::clear(total, rows * W);
    for (int64_t part = 0; part < parts; ++part)
      R::axpy(total, part_of_depthwise(g, part) + v * rows * W, T(1), rows * W);
    R::join(total, W, lanes, rows, to.depthwise + (g * in.cig + i) * rows, rows);
  }

  // Branches with one value a channel. `grad`: [K * K][W].
  void simple(int64_t o, int64_t i, int64_t lanes, const T* grad, T* scale_sums) const {
    const int64_t at = o * in.cig + i;
    Reg sum = V::zero(), inner = V::zero();
    if (in.prior != nullptr) {
      const T* filter = in.filter + o * in.kk;
      for (int64_t j = 0; j < in.kk; ++j) {
        const Reg x = V::load(grad + j * W);
        sum = V::add(x, sum);
        inner = V::fma(x, V::set1(filter[j]), inner);
      }
      one_value(kPrior, o, at, lanes, inner, in.prior, to.prior, scale_sums);
    } else if (in.avg != nullptr) {
      for (int64_t j = 0; j < in.kk; ++j) sum = V::add(V::load(grad + j * W), sum);
    }
    if (in.avg != nullptr)
      one_value(kAvg, o, at, lanes, V::mul(sum, V::set1(T(1) / static_cast<T>(in.kk))), in.avg, to.avg, scale_sums);
    if (in.pointwise != nullptr)
      one_value(kPointwise, o, at, lanes, V::load(grad + in.centre() * W), in.pointwise, to.pointwise, scale_sums);
  }

  void one_value(Branch b, int64_t o, int64_t at, int64_t lanes, Reg grad, const T* weight, T* out,
                 T* scale_sums) const {
    V::store_n(out + at, V::mul(V::set1(in.scale(b, o)), grad), lanes);
    V::store(scale_sums + b * W, V::fma(V::load_n(weight + at, lanes), grad, V::load(scale_sums + b * W)));
  }

  void keep(int64_t g, int64_t panel, int64_t v, int64_t o, const T* grad) const {
    const int64_t width = panels.width(panel) * W;
    T* packed = packed_outer(g, panel) + (o - g * in.cog) * in.kk * width + v * W;
    const Reg scale = V::set1(in.scale(kExpand, o));
    for (int64_t j = 0; j < in.kk; ++j) V::store(packed + j * width, V::mul(scale, V::load(grad + j * W)));
  }

  void projected(int64_t g, int64_t i, int64_t lanes, int64_t o, int64_t outputs, const T* grads, T* weights, T* inner,
                 T* scale_sums, T* sums) const {
    for (int64_t n = 0; n < outputs; ++n)
      R::split(in.project + ((o + n) * in.cig + i) * in.e, in.e, lanes, in.e, weights + n * in.e * W, W);
    LaneProduct<T>::run(outputs, in.e, in.kk, LaneStrides{in.kk, 1, 1, in.kk, in.e, 1}, grads,
                        packed_depthwise(g, i / W), inner, false);
    for (int64_t n = 0; n < outputs; ++n) {
      const Reg scale = V::set1(in.scale(kProject, o + n));
      T* sum = scale_sums + (n * kSqueezeBranches + kProject) * W;
      Reg total = V::load(sum);
      for (int64_t at = n * in.e * W; at < (n + 1) * in.e * W; at += W) {
        const Reg weight = V::load(weights + at), grad = V::load(inner + at);
        total = V::fma(weight, grad, total);
        V::store(weights + at, V::mul(scale, weight));
        V::store(inner + at, V::mul(scale, grad));
      }
      V::store(sum, total);
      R::join(inner + n * in.e * W, W, lanes, in.e, to.project + ((o + n) * in.cig + i) * in.e, in.e);
    }
    LaneProduct<T>::run(in.e, in.kk, outputs, LaneStrides{1, in.e, in.kk, 1, in.kk, 1}, weights, grads, sums, true);
  }

  // --- grad expand, and the gradients of the scales ---

  void expand(int64_t unit, T* scratch) const {
    if (unit >= in.groups * blocks_per_group()) return finish_depthwise(unit - in.groups * blocks_per_group(), scratch);
    const int64_t g = unit / blocks_per_group(), start = unit % blocks_per_group() * block;
    const int64_t o = g * in.cog + start, outputs = lesser(block, in.cog - start);
    T d_scale[18] = {};
    for (int64_t panel = 0; panel < internals.count; ++panel) {
      const int64_t width = internals.width(panel) * W, tile = in.kk * width, first = internals.first_lane(panel);
      const int64_t used = lesser(width, in.cmg - first);
      multiply(g, panel, o, outputs, scratch);
      for (int64_t n = 0; n < outputs; ++n) {
        const int64_t at = ((o + n) * in.cmg + first) * in.kk;
        T* flat = scratch + n * tile;
        if (in.kk > 1) {
          flat = scratch + block * tile;
          for (int64_t v = 0; v < used; v += W)
            R::join(scratch + n * tile + v, width, lesser(W, used - v), in.kk, flat + v * in.kk, in.kk);
        }
        d_scale[n] += R::scale_dot(to.expand + at, flat, in.expand + at, in.scale(kExpand, o + n), used * in.kk);
      }
    }
    for (int64_t n = 0; n < outputs; ++n) to.set_scale(kExpand, o + n, d_scale[n]);
  }

  void multiply(int64_t g, int64_t panel, int64_t o, int64_t outputs, T* tiles) const {
    const int64_t width = internals.width(panel) * W, tile = in.kk * width;
    const T* a = packed_reduce(g, panel);
    const T* b = to.out + o * in.cig * in.kk;
    const Depth depth = Depth::flat(in.cig, width, in.kk);
    const Columns rows = Columns::strided(width);
    if (in.kk == 1)
      return Gemm<T>::run(internals.width(panel), depth, a, b, Columns::strided(in.cig), tiles, rows, outputs, false);
    const int64_t first = internals.first_lane(panel), used = lesser(width, in.cmg - first);
    for (int64_t n = 0; n < outputs; ++n) {
      const int64_t at = ((o + n) * in.cmg + first) * in.kk;
      R::prefetch(in.expand + at, used * in.kk);
      R::prefetch_to_write(to.expand + at, used * in.kk);
      if (panel == 0 && n + 1 < outputs) R::prefetch(b + (n + 1) * in.cig * in.kk, in.cig * in.kk);
      Gemm<T>::run(internals.width(panel), depth, a, b + n * in.cig * in.kk, Columns::strided(1), tiles + n * tile,
                   rows, in.kk, false);
    }
  }

  // --- grad reduce ---

  void reduce_range(int64_t unit, T* sums) const {
    const int64_t g = unit / ranges, range = unit % ranges, pitch = panels.vectors * W;
    const int64_t begin = in.cmg * range / ranges, count = in.cmg * (range + 1) / ranges - begin;
    const int64_t step = larger(kDepth / in.kk, 1);
    for (int64_t o = 0; o < in.cog; o += step) {
      const int64_t outputs = lesser(step, in.cog - o);
      const T* b = in.expand + ((g * in.cog + o) * in.cmg + begin) * in.kk;
      for (int64_t n = outputs; n < lesser(outputs + step, in.cog - o); ++n)
        R::prefetch(b + n * in.cmg * in.kk, count * in.kk);
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t width = panels.width(panel) * W;
        const T* a = packed_outer(g, panel) + o * in.kk * width;
        const Depth depth = in.kk == 1 ? Depth::flat(outputs, width, in.cmg)
                                       : Depth::nested(outputs, in.kk * width, in.cmg * in.kk, in.kk, width, 1);
        Gemm<T>::run(panels.width(panel), depth, a, b, Columns::strided(in.kk), sums + panels.first_lane(panel),
                     Columns::strided(pitch), count, o > 0);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      T* row = to.reduce + (g * in.cmg + begin + t) * in.cig;
      for (int64_t i = 0; i < in.cig; ++i) row[i] = sums[t * pitch + i];
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
