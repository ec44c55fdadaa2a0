// Forward of one layer whose groups fill vectors. The lanes are input channels; the tile of an output channel is
// [K * K][lanes], the product of expand and reduce, to which the other branches are added before it is written once.
#pragma once
#include "common/lane_product_body.h"
#include "orepa_squeeze/orepa_squeeze_view_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// depthwise of group `g`, vector `v` of its channels: [channel][e * K * K] -> [e * K * K][lane].
template <class T>
void pack_depthwise(const View<T>& in, int64_t g, int64_t v, T* to) {
  constexpr int W = Vec<T>::width;
  const int64_t rows = in.e * in.kk, channel = v * W, lanes = lesser(W, in.cig - channel);
  Rows<T>::split(in.depthwise + (g * in.cig + channel) * rows, rows, lanes, rows, to, W);
}

template <class T>
struct ForwardPlan {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  using R = Rows<T>;
  static constexpr int W = V::width;
  static constexpr int64_t kTilePositions = 36;  // of one panel; keeps the tiles of a block in the first-level cache

  View<T> in;
  Panels<T> panels;
  int64_t block;  // output channels that share a pass over the packed operands
  T* reduce;      // [g][panel][Cm/g][lanes of the panel]
  T* depthwise;   // [g][vector][e][K * K][W]

  ForwardPlan(const View<T>& view, int threads)
      : in(view), panels(view.cig), block(lesser(larger(kTilePositions / view.kk, 1), 18)) {
    block = lesser(block, larger(view.co / (2 * threads), 1));
  }

  template <class Space>
  void take(Space& space) {
    const int64_t lanes = in.groups * panels.vectors * W;
    reduce = space.template take<T>(in.expand == nullptr ? 0 : lanes * in.cmg);
    depthwise = space.template take<T>(in.project == nullptr ? 0 : lanes * in.e * in.kk);
  }

  int64_t pack_units() const { return in.groups * panels.count; }
  int64_t blocks_per_group() const { return divide_up(in.cog, block); }
  int64_t units() const { return in.groups * blocks_per_group(); }

  // tile [block][K * K][panel], flat [panel][K * K] twice, project [block][e][W]
  int64_t scratch() const {
    const int64_t widest = V::panel * W;
    return (block + 2) * in.kk * widest + block * in.e * W;
  }

  T* packed_reduce(int64_t g, int64_t panel) const {
    return reduce + (g * panels.vectors + panels.first_vector(panel)) * W * in.cmg;
  }
  T* packed_depthwise(int64_t g, int64_t v) const { return depthwise + (g * panels.vectors + v) * W * in.e * in.kk; }

  void pack(int64_t unit) const {
    const int64_t g = unit / panels.count, panel = unit % panels.count, first = panels.first_lane(panel);
    const int64_t width = panels.width(panel) * W, used = lesser(width, in.cig - first);
    for (int64_t v = panels.first_vector(panel); in.project != nullptr && v < panels.first_vector(panel + 1); ++v)
      pack_depthwise(in, g, v, packed_depthwise(g, v));
    if (in.expand == nullptr) return;
    T* to = packed_reduce(g, panel);
    for (int64_t t = 0; t < in.cmg; ++t, to += width) {
      const T* from = in.reduce + (g * in.cmg + t) * in.cig + first;
      for (int64_t i = 0; i < used; ++i) to[i] = from[i];
      for (int64_t i = used; i < width; ++i) to[i] = 0;
      const int64_t one = t % in.cig - first;
      if (in.identity && one >= 0 && one < used) to[one] += 1;
    }
  }

  void run(int64_t unit, void* out, DType out_dtype, bool channels_last, T* scratch) const {
    const int64_t g = unit / blocks_per_group(), start = unit % blocks_per_group() * block;
    const int64_t o = g * in.cog + start, outputs = lesser(block, in.cog - start);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t width = panels.width(panel) * W, tile = in.kk * width;
      T* flat = scratch + block * tile;
      T* weights = flat + 2 * tile;
      multiply(g, panel, o, outputs, scratch, channels_last || out_dtype != R::kOwn ? nullptr : static_cast<T*>(out));
      for (int64_t n = 0; n < outputs; ++n) add_simple(o + n, panel, scratch + n * tile);
      if (in.project != nullptr) add_projected(g, panel, o, outputs, scratch, weights);
      for (int64_t n = 0; n < outputs; ++n)
        write(o + n, panel, scratch + n * tile, flat, out, out_dtype, channels_last);
    }
  }

  // `out`: null when its elements are not in the order of the tile.
  void multiply(int64_t g, int64_t panel, int64_t o, int64_t outputs, T* tiles, const T* out) const {
    const int64_t width = panels.width(panel) * W, tile = in.kk * width;
    if (in.expand == nullptr) return R::clear(tiles, outputs * tile);
    const T* a = packed_reduce(g, panel);
    const T* b = in.expand + o * in.cmg * in.kk;
    const Depth depth = Depth::flat(in.cmg, width, in.kk);
    const Columns rows = Columns::strided(width);
    if (in.kk == 1)
      return Gemm<T>::run(panels.width(panel), depth, a, b, Columns::strided(in.cmg), tiles, rows, outputs, false);
    for (int64_t n = 0; n < outputs; ++n) {
      prefetch(panel, o + n, out);
      if (panel == 0 && n + 1 < outputs) R::prefetch(b + (n + 1) * in.cmg * in.kk, in.cmg * in.kk);
      Gemm<T>::run(panels.width(panel), depth, a, b + n * in.cmg * in.kk, Columns::strided(1), tiles + n * tile, rows,
                   in.kk, false);
    }
  }

  // What the epilogue of this tile reads lies far apart from output to output: too far for the hardware to foresee.
  void prefetch(int64_t panel, int64_t o, const T* out) const {
    const int64_t i = o * in.cig + panels.first_lane(panel);
    const int64_t used = lesser(panels.width(panel) * W, in.cig - panels.first_lane(panel));
    R::prefetch_to_write(out == nullptr ? nullptr : out + i * in.kk, used * in.kk);
    R::prefetch(in.origin == nullptr ? nullptr : in.origin + i * in.kk, used * in.kk);
    R::prefetch(in.project == nullptr ? nullptr : in.project + i * in.e, used * in.e);
    R::prefetch(in.avg == nullptr ? nullptr : in.avg + i, used);
    R::prefetch(in.prior == nullptr ? nullptr : in.prior + i, used);
    R::prefetch(in.pointwise == nullptr ? nullptr : in.pointwise + i, used);
  }

  // Scales the product and adds the branches that have one value a channel.
  void add_simple(int64_t o, int64_t panel, T* tile) const {
    const int64_t width = panels.width(panel) * W;
    const Reg s_expand = V::set1(in.scale(kExpand, o)), s_avg = V::set1(in.scale(kAvg, o) / static_cast<T>(in.kk));
    const Reg s_prior = V::set1(in.scale(kPrior, o)), s_pointwise = V::set1(in.scale(kPointwise, o));
    for (int64_t v = 0; v < width; v += W) {
      const int64_t i = panels.first_lane(panel) + v, at = o * in.cig + i, lanes = lesser(W, in.cig - i);
      Reg everywhere = V::zero(), along = V::zero();
      if (in.avg != nullptr) everywhere = V::mul(s_avg, V::load_n(in.avg + at, lanes));
      if (in.prior != nullptr) along = V::mul(s_prior, V::load_n(in.prior + at, lanes));
      T* x = tile + v;
      if (in.prior != nullptr) {
        const T* filter = in.filter + o * in.kk;
        for (int64_t j = 0; j < in.kk; ++j) {
          const Reg sum = V::fma(s_expand, V::load(x + j * width), everywhere);
          V::store(x + j * width, V::fma(along, V::set1(filter[j]), sum));
        }
      } else {
        for (int64_t j = 0; j < in.kk; ++j)
          V::store(x + j * width, V::fma(s_expand, V::load(x + j * width), everywhere));
      }
      if (in.pointwise != nullptr) {
        T* centre = x + in.centre() * width;
        V::store(centre, V::fma(s_pointwise, V::load_n(in.pointwise + at, lanes), V::load(centre)));
      }
    }
  }

  void add_projected(int64_t g, int64_t panel, int64_t o, int64_t outputs, T* tiles, T* weights) const {
    const int64_t vectors = panels.width(panel);
    const LaneStrides strides{in.e, 1, in.kk, 1, in.kk * vectors, vectors};
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t i = panels.first_lane(panel) + v * W, lanes = lesser(W, in.cig - i);
      for (int64_t n = 0; n < outputs; ++n) {
        T* to = weights + n * in.e * W;
        R::split(in.project + ((o + n) * in.cig + i) * in.e, in.e, lanes, in.e, to, W);
        R::scale(to, to, in.scale(kProject, o + n), in.e * W);
      }
      LaneProduct<T>::run(outputs, in.kk, in.e, strides, weights, packed_depthwise(g, panels.first_vector(panel) + v),
                          tiles + v * W, true);
    }
  }

  void write(int64_t o, int64_t panel, T* tile, T* flat, void* out, DType out_dtype, bool channels_last) const {
    const int64_t width = panels.width(panel) * W, first = panels.first_lane(panel);
    const int64_t used = lesser(width, in.cig - first), start = (o * in.cig + first) * in.kk;
    if (channels_last) return write_channels_last(o, panel, tile, flat, out, out_dtype);
    if (in.kk == 1) {
      flat = tile;
    } else {
      for (int64_t v = 0; v < used; v += W)
        R::join(tile + v, width, lesser(W, used - v), in.kk, flat + v * in.kk, in.kk);
    }
    const T* origin = in.origin == nullptr ? nullptr : in.origin + start;
    R::add_and_store(out, start, out_dtype, flat, origin, in.scale(kOrigin, o), used * in.kk);
  }

  void write_channels_last(int64_t o, int64_t panel, T* tile, T* flat, void* out, DType out_dtype) const {
    const int64_t width = panels.width(panel) * W, first = panels.first_lane(panel);
    const int64_t used = lesser(width, in.cig - first);
    if (in.origin != nullptr) {
      const T* origin = in.origin + (o * in.cig + first) * in.kk;
      for (int64_t v = 0; v < used; v += W)
        R::split(origin + v * in.kk, in.kk, lesser(W, used - v), in.kk, flat + v, width);
      R::axpy(tile, flat, in.scale(kOrigin, o), in.kk * width);
    }
    for (int64_t j = 0; j < in.kk; ++j)
      R::store_as(out, (o * in.kk + j) * in.cig + first, out_dtype, tile + j * width, used);
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
