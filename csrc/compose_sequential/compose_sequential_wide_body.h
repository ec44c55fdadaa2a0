// Groups that fill vectors. Position u of the result is (position a of second) + (position b of first): for a fixed b
// the forward is a plain product over t whose columns a go to rows u(a) + u(b) of the tile; likewise backward.
#pragma once
#include "common/gemm_body.h"
#include "compose_sequential/compose_sequential_narrow_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class T>
struct WideCompose {
  using R = Rows<T>;
  static constexpr int W = Vec<T>::width;
  static constexpr int64_t kWidest = Vec<T>::panel * W;
  static constexpr int64_t kBlock = 8;          // output channels that share a pass over the packed operand
  static constexpr int64_t kDepth = 320;        // terms summed between two visits to a tile of grad first
  static constexpr int64_t kSums = 128 * 1024;  // elements of grad first that a thread has in work

  Composition c;
  int64_t kk1, kk2, kk;
  Panels<T> panels;     // of input channels
  Panels<T> internals;  // of internal channels
  const T* first;
  const T* second;

  explicit WideCompose(const ComposeParams& p)
      : c(p),
        kk1(c.k1 * c.k1),
        kk2(c.k2 * c.k2),
        kk(c.k * c.k),
        panels(c.cig),
        internals(c.cmg),
        first(static_cast<const T*>(p.first)),
        second(static_cast<const T*>(p.second)) {}

  static int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
  int64_t blocks() const { return (c.cog + kBlock - 1) / kBlock; }
  int64_t block_units() const { return c.groups * blocks(); }

  // --- forward ---

  // [g][panel][position b][Cm/g][lanes]
  int64_t forward_packed() const { return c.groups * panels.vectors * W * kk1 * c.cmg; }
  int64_t forward_pack_units() const { return c.groups * panels.count; }
  int64_t forward_scratch() const { return kBlock * kk * kWidest; }
  int64_t forward_panel(int64_t g, int64_t panel) const {
    return (g * panels.vectors + panels.first_vector(panel)) * W * kk1 * c.cmg;
  }

  void pack_forward(int64_t unit, T* packed) const {
    const int64_t g = unit / panels.count, panel = unit % panels.count, width = panels.width(panel) * W;
    T* to = packed + forward_panel(g, panel);
    for (int64_t t = 0; t < c.cmg; ++t) {
      for (int64_t lane = 0; lane < width; lane += W) {
        const int64_t i = panels.first_lane(panel) + lane;
        R::split(first + ((g * c.cmg + t) * c.cig + i) * kk1, kk1, lesser(W, c.cig - i), kk1, to + t * width + lane,
                 c.cmg * width);
      }
    }
  }

  void forward(int64_t unit, const T* packed, T* out, T* tiles) const {
    const int64_t g = unit / blocks(), start = unit % blocks() * kBlock;
    const int64_t o = g * c.cog + start, outputs = lesser(kBlock, c.cog - start);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t width = panels.width(panel) * W, tile = kk * width;
      R::clear(tiles, outputs * tile);
      for (int64_t b = 0; b < kk1; ++b)
        multiply(panel, packed + forward_panel(g, panel) + b * c.cmg * width, o, outputs,
                 tiles + (b / c.k1 * c.k + b % c.k1) * width);
      for (int64_t n = 0; n < outputs; ++n) {
        for (int64_t v = 0; v < panels.width(panel); ++v) {
          const int64_t i = panels.first_lane(panel) + v * W;
          R::join(tiles + n * tile + v * W, width, lesser(W, c.cig - i), kk, out + ((o + n) * c.cig + i) * kk, kk);
        }
      }
    }
  }

  void multiply(int64_t panel, const T* a, int64_t o, int64_t outputs, T* to) const {
    const int vectors = panels.width(panel);
    const int64_t width = vectors * W;
    const Depth depth = Depth::flat(c.cmg, width, kk2);
    const T* b = second + o * c.cmg * kk2;
    if (kk2 == 1)
      return Gemm<T>::run(vectors, depth, a, b, Columns::strided(c.cmg), to, Columns::strided(kk * width), outputs,
                          true);
    for (int64_t n = 0; n < outputs; ++n)
      Gemm<T>::run(vectors, depth, a, b + n * c.cmg * kk2, Columns::strided(1), to + n * kk * width,
                   Columns{c.k2, width, c.k * width}, kk2, true);
  }

  // --- backward ---

  // first transposed: [g][internal panel][Ci/g][position b][lanes]
  int64_t first_packed() const { return c.groups * internals.vectors * W * c.cig * kk1; }
  // the output gradient: [g][panel][Co/g][K * K][lanes]
  int64_t outer_packed() const { return c.groups * panels.vectors * W * c.cog * kk; }
  int64_t backward_pack_units() const { return c.groups * internals.count + block_units(); }
  int64_t second_scratch() const { return kBlock * kk2 * kWidest; }

  int64_t ranges(int threads) const {
    const int64_t row = kk1 * panels.vectors * W, most = larger(kSums / row, 9);
    const int64_t wanted = larger((c.cmg + most - 1) / most, (2 * threads + c.groups - 1) / c.groups);
    return lesser(wanted, (c.cmg + 8) / 9);
  }
  int64_t first_scratch(int threads) const {
    const int64_t count = ranges(threads);
    return (c.cmg + count - 1) / count * kk1 * panels.vectors * W;
  }
  T* first_panel(T* packed, int64_t g, int64_t panel) const {
    return packed + (g * internals.vectors + internals.first_vector(panel)) * W * c.cig * kk1;
  }
  T* outer_panel(T* packed, int64_t g, int64_t panel) const {
    return packed + (g * panels.vectors + panels.first_vector(panel)) * W * c.cog * kk;
  }

  void pack_backward(int64_t unit, const T* grad, T* packed_first, T* packed_outer) const {
    if (unit < c.groups * internals.count) return pack_first(unit, packed_first);
    unit -= c.groups * internals.count;
    const int64_t g = unit / blocks(), start = unit % blocks() * kBlock, end = lesser(start + kBlock, c.cog);
    for (int64_t o = start; o < end; ++o) {
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t width = panels.width(panel) * W;
        for (int64_t lane = 0; lane < width; lane += W) {
          const int64_t i = panels.first_lane(panel) + lane;
          R::split(grad + ((g * c.cog + o) * c.cig + i) * kk, kk, lesser(W, c.cig - i), kk,
                   outer_panel(packed_outer, g, panel) + o * kk * width + lane, width);
        }
      }
    }
  }

  void pack_first(int64_t unit, T* packed) const {
    const int64_t g = unit / internals.count, panel = unit % internals.count, rows = c.cig * kk1;
    const int64_t width = internals.width(panel) * W;
    for (int64_t lane = 0; lane < width; lane += W) {
      const int64_t t = internals.first_lane(panel) + lane;
      R::split(first + (g * c.cmg + t) * rows, rows, lesser(W, c.cmg - t), rows, first_panel(packed, g, panel) + lane,
               width);
    }
  }

  // grad second of a block of output channels: the lanes are internal channels.
  void backward_second(int64_t unit, const T* grad, T* packed_first, T* grad_second, T* tiles) const {
    const int64_t g = unit / blocks(), start = unit % blocks() * kBlock;
    const int64_t o = g * c.cog + start, outputs = lesser(kBlock, c.cog - start);
    for (int64_t panel = 0; panel < internals.count; ++panel) {
      const int vectors = internals.width(panel);
      const int64_t width = vectors * W, tile = kk2 * width, row = c.cig * kk;
      const T* a = first_panel(packed_first, g, panel);
      const Depth depth{{c.cig, c.k1, c.k1}, {kk1 * width, c.k1 * width, width}, {kk, c.k, 1}};
      const Columns rows = Columns::strided(width);
      if (kk2 == 1) Gemm<T>::run(vectors, depth, a, grad + o * row, Columns::strided(row), tiles, rows, outputs, false);
      for (int64_t n = 0; n < outputs; ++n) {
        if (kk2 > 1)
          Gemm<T>::run(vectors, depth, a, grad + (o + n) * row, Columns{c.k2, 1, c.k}, tiles + n * tile, rows, kk2,
                       false);
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t t = internals.first_lane(panel) + v * W;
          R::join(tiles + n * tile + v * W, width, lesser(W, c.cmg - t), kk2, grad_second + ((o + n) * c.cmg + t) * kk2,
                  kk2);
        }
      }
    }
  }

  // grad first of a range of internal channels: sums [position b][t][lanes].
  void backward_first(int64_t unit, int64_t in_group, T* packed_outer, T* grad_first, T* sums) const {
    const int64_t g = unit / in_group, range = unit % in_group, pitch = panels.vectors * W;
    const int64_t begin = c.cmg * range / in_group, count = c.cmg * (range + 1) / in_group - begin;
    const int64_t step = larger(kDepth / kk2, 1);
    for (int64_t o = 0; o < c.cog; o += step) {
      const T* b = second + ((g * c.cog + o) * c.cmg + begin) * kk2;
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t width = panels.width(panel) * W;
        const T* a = outer_panel(packed_outer, g, panel) + o * kk * width;
        const Depth depth{
            {lesser(step, c.cog - o), c.k2, c.k2}, {kk * width, c.k * width, width}, {c.cmg * kk2, c.k2, 1}};
        for (int64_t at = 0; at < kk1; ++at)
          Gemm<T>::run(panels.width(panel), depth, a + (at / c.k1 * c.k + at % c.k1) * width, b, Columns::strided(kk2),
                       sums + at * count * pitch + panels.first_lane(panel), Columns::strided(pitch), count, o > 0);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t v = 0; v < panels.vectors; ++v) {
        const int64_t i = v * W;
        R::join(sums + t * pitch + i, count * pitch, lesser(W, c.cig - i), kk1,
                grad_first + ((g * c.cmg + begin + t) * c.cig + i) * kk1, kk1);
      }
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
