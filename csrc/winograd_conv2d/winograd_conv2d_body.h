// The convolution for one instruction set: blocks of tiles go through B, the products and A without leaving the cache.
#pragma once
#include "common/parallel.h"
#include "common/workspace.h"
#include "winograd_conv2d/winograd_conv2d_halves_body.h"
#include "winograd_conv2d/winograd_conv2d_isa.h"
#include "winograd_conv2d/winograd_conv2d_maps_body.h"
#include "winograd_conv2d/winograd_conv2d_transform_body.h"
#include "winograd_conv2d/winograd_conv2d_weight_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

namespace {  // as Workspace

template <class X, int M, int kStride>
class Conv {
  using Map = Maps<X>;
  using T = typename Map::T;
  using V = Vec<T>;
  using Reg = typename V::Reg;
  using OneSide = Side<M, kStride>;
  using Tiles = Transform<T, M, kStride>;
  using Weights = Expand<T, M, kStride>;
  static constexpr int W = V::width, R = OneSide::kPatch, P = R * R;
  // Most tiles for which the other side of the weights is transformed in registers, 24 sums: AVX-512.
  static constexpr int kHalvesTiles = sizeof(Reg) == 64 && W == kWinogradLanes ? 12 : 0;

 public:
  Conv(const WinogradParams& p, void* workspace, int threads)
      : p_(p),
        plan_(p, threads),
        in_{p.c, p.h, p.w, p.channels_last != 0},
        out_{p.k, plan_.oh, plan_.ow, p.channels_last != 0},
        activate_{static_cast<WinogradActivation>(p.activation)},
        space_(workspace) {
    const int64_t inputs = plan_.v_size;
    if (plan_.whole) shared_u_ = space_.template take<T>(p.groups * plan_.blocks * plan_.u_block);
    if (joint()) shared_v_ = space_.template take<T>(p.groups * inputs);
    const size_t before = space_.used();
    own_ = take_own();
    own_bytes_ = space_.used() - before;
    bytes_ = before + own_bytes_ * static_cast<size_t>(threads);
  }

  size_t bytes() const { return bytes_; }

  void run(int threads) {
    if (plan_.whole) {
      parallel_for(p_.groups * plan_.blocks, threads, [this](int64_t block, int) {
        Weights::run(part_of(block, 0, shared_u_ + block * plan_.u_block), 0, plan_.cg);
      });
    }
    if (!plan_.shared) {
      parallel_for(plan_.count, threads, [this](int64_t unit, int thread) {
        const Own own = own_of(thread);
        const Range range = range_of(unit);
        for (int64_t g = 0; g < p_.groups; ++g) {
          read(range, g, 0, plan_.vectors, own.v, own);
          for (int64_t panel = 0; panel < plan_.panels; ++panel) multiply(range, g, panel, own.v, own);
        }
      });
      return;
    }
    if (plan_.repeated) {
      parallel_for(threads, threads, [&](int64_t share, int thread) { run_share(share, threads, own_of(thread)); });
      return;
    }
    for (int64_t unit = 0; unit < plan_.count; ++unit) {
      const Range range = range_of(unit);
      parallel_for(p_.groups * plan_.vectors, threads, [&](int64_t part, int thread) {
        const int64_t g = part / plan_.vectors, vector = part % plan_.vectors;
        read(range, g, vector, vector + 1, shared_v_ + g * plan_.v_size, own_of(thread));
      });
      parallel_for(p_.groups * plan_.panels, threads, [&](int64_t part, int thread) {
        const int64_t g = part / plan_.panels;
        multiply(range, g, part % plan_.panels, shared_v_ + g * plan_.v_size, own_of(thread));
      });
    }
  }

 private:
  struct Range {
    int64_t first, count;  // tiles
  };
  // A thread's own memory.
  struct Own {
    T *v, *m, *u, *zeros, *strip, *flat;
  };
  // Tiles next to each other in a row of tiles.
  struct Run {
    int64_t n, ty, tx, count;
  };

  // Every `threads`-th panel, and the maps that it needs.
  void run_share(int64_t share, int64_t threads, const Own& own) const {
    for (int64_t unit = 0; unit < plan_.count; ++unit) {
      const Range range = range_of(unit);
      for (int64_t g = 0; g < p_.groups; ++g) {
        const int64_t before = g * plan_.panels % threads, first = (share + threads - before) % threads;
        if (first >= plan_.panels) continue;
        read(range, g, 0, plan_.vectors, own.v, own);
        for (int64_t panel = first; panel < plan_.panels; panel += threads) multiply(range, g, panel, own.v, own);
      }
    }
  }

  Range range_of(int64_t unit) const {
    const int64_t first = unit * plan_.block;
    return {first, least(plan_.block, plan_.tiles - first)};
  }

  Own take_own() {
    Own own;
    own.v = joint() ? nullptr : space_.template take<T>(plan_.v_size);
    own.m = space_.template take<T>(P * plan_.m_point);
    own.u = expands() ? space_.template take<T>(2 * plan_.panel * plan_.u_block) : nullptr;
    own.zeros = space_.template take<T>(plan_.vectors * W);
    own.strip = space_.template take<T>(R * plan_.strip * W);
    own.flat = space_.template take<T>(W * plan_.strip);
    return own;
  }

  Own own_of(int thread) const {
    const int64_t step = static_cast<int64_t>(own_bytes_ / sizeof(T)) * thread;
    return {joint() ? nullptr : own_.v + step,
            own_.m + step,
            expands() ? own_.u + step : nullptr,
            own_.zeros + step,
            own_.strip + step,
            own_.flat + step};
  }

  template <class Body>
  void each_run(const Range& range, const Body& body) const {
    for (int64_t t = 0; t < range.count;) {
      const int64_t tile = range.first + t, line = tile / plan_.columns;
      Run run{line / plan_.rows, line % plan_.rows, tile % plan_.columns, 0};
      run.count = least(range.count - t, plan_.columns - run.tx);
      body(run, t);
      t += run.count;
    }
  }

  // Where channel i of a group, the first of a vector, is in v [span][P][tile][channel]: the channels that a chain of
  // products reads follow each other in the order of its passes, so that they stream into the first cache.
  int64_t v_offset(int64_t i) const { return i / plan_.span * plan_.v_span + i % plan_.span; }

  // v of `vectors` from `begin` to `end` of group g.
  void read(const Range& range, int64_t g, int64_t begin, int64_t end, T* v, const Own& own) const {
    const bool direct = Map::kOwn && in_.channels_last;
    const int64_t whole = direct ? least(end, plan_.cg / W) : begin;
    if (direct) Rows<T>::clear(own.zeros, plan_.vectors * W);
    each_run(range, [&](const Run& run, int64_t t) {
      if constexpr (Map::kOwn) {
        if (whole > begin) {
          for (int64_t j = 0; j < run.count; ++j) {
            read_tile(run, j, g * plan_.cg, begin * W, whole * W, v + (t + j) * plan_.v_row, own);
          }
        }
      }
      for (int64_t vector = whole; vector < end; ++vector) {
        const int64_t cols = read_strip(run, g * plan_.cg + vector * W, least(W, plan_.cg - vector * W), own);
        for (int64_t j = 0; j < run.count; ++j) {
          const T* strip = own.strip + j * OneSide::kStep * W;
          Tiles::input([=](int y, int x) { return V::load(strip + (y * cols + x) * W); },
                       v + (t + j) * plan_.v_row + v_offset(vector * W), plan_.v_point);
        }
      }
    });
  }

  // Tile j of the run for whole vectors of channels, without a copy.
  void read_tile(const Run& run, int64_t j, int64_t channel, int64_t begin, int64_t end, T* v, const Own& own) const {
    const T* x = static_cast<const T*>(p_.x);
    const int64_t h = run.ty * OneSide::kStep - p_.padding, w = (run.tx + j) * OneSide::kStep - p_.padding;
    const int64_t c = p_.c, row = p_.w * c;
    if (h >= 0 && w >= 0 && h + R <= p_.h && w + R <= p_.w) {
      const T* from = x + in_.offset(run.n, channel, h, w);
      for (int64_t i = begin; i < end; i += W) {
        const T* here = from + i;
        Tiles::input([=](int y, int k) { return V::load(here + y * row + k * c); }, v + v_offset(i), plan_.v_point);
      }
      return;
    }
    const T* at[P];
    for (int y = 0; y < R; ++y) {
      for (int k = 0; k < R; ++k) {
        const bool inside = h + y >= 0 && h + y < p_.h && w + k >= 0 && w + k < p_.w;
        at[y * R + k] = inside ? x + in_.offset(run.n, channel, h + y, w + k) : own.zeros;
      }
    }
    for (int64_t i = begin; i < end; i += W) {
      Tiles::input([&](int y, int k) { return V::load(at[y * R + k] + i); }, v + v_offset(i), plan_.v_point);
    }
  }

  // own.strip [R][columns][W] of the run's patches; returns the columns.
  int64_t read_strip(const Run& run, int64_t channel, int64_t lanes, const Own& own) const {
    const int64_t cols = (run.count - 1) * OneSide::kStep + R;
    const int64_t h = run.ty * OneSide::kStep - p_.padding, w = run.tx * OneSide::kStep - p_.padding;
    const int64_t left = least(most_of(-w, 0), cols), right = most_of(least(p_.w - w, cols), left);
    for (int64_t y = 0; y < R; ++y) {
      T* to = own.strip + y * cols * W;
      if (h + y < 0 || h + y >= p_.h || left == right) {
        Rows<T>::clear(to, cols * W);
        continue;
      }
      Rows<T>::clear(to, left * W);
      in_.read(static_cast<const X*>(p_.x), run.n, channel, lanes, h + y, w + left, right - left, to + left * W,
               own.flat);
      Rows<T>::clear(to + right * W, (cols - right) * W);
    }
    return cols;
  }

  // Which of the packed weights position i of a patch has.
  static constexpr int64_t weight_of(int64_t i) {
    return OneSide::weight(static_cast<int>(i / R)) * OneSide::kWeights + OneSide::weight(static_cast<int>(i % R));
  }

  // Threads read what others have transformed.
  bool joint() const { return plan_.shared && !plan_.repeated; }

  // Weights are transformed in every chain of every panel.
  bool expands() const { return plan_.raw && !plan_.whole; }

  // The kernels of a block of outputs, counted over all groups, from channel c on: [9][C/g][16].
  const T* kernels(int64_t block, int64_t c) const {
    return static_cast<const T*>(p_.packed) + (block * 9 * plan_.cg + c) * kWinogradLanes;
  }

  typename Weights::Part part_of(int64_t block, int64_t c, T* u) const {
    return {kernels(block, c),
            u,
            plan_.cg * kWinogradLanes,
            plan_.u_point,
            plan_.u_block,
            least(plan_.depth, plan_.cg - c)};
  }

  // own.m = the products of `width` blocks. The kernels of the next chain are transformed between the passes of this
  // one, so that the stores hide behind its products, and those of the chain after it come into the cache.
  void expand_and_multiply(const Range& range, int64_t block, int64_t width, const T* v, const Own& own) const {
    const int64_t point = plan_.cg * kWinogradLanes;
    const int64_t streams = 9 * width <= P ? 1 : 3, passes = P * Product<T>::passes_of(width, range.count);
    T *u = own.u, *other = own.u + plan_.panel * plan_.u_block;
    const auto first = part_of(block, 0, u);
    Weights::run(first, 0, width * first.depth);
    for (int64_t c = 0; c < plan_.cg; c += plan_.depth) {
      const int64_t depth = least(plan_.depth, plan_.cg - c), c1 = c + depth;
      const bool more = c1 < plan_.cg;
      const auto part = part_of(block, more ? c1 : 0, other);
      const int64_t vectors = more ? width * part.depth : 0, step = ceil_div(vectors, passes);
      const T* next = c1 + part.depth < plan_.cg ? kernels(block, c1 + part.depth) : kernels(block + width, 0);
      int64_t done = 0;
      for (int64_t i = 0; i < P; ++i) {
        const bool ask = i * streams < 9 * width;
        const T* weights = u + weight_of(i) * plan_.u_point;
        const typename Product<T>::Chain chain{
            depth, plan_.v_row, plan_.u_block, c > 0, streams, ask ? point : 0, ask ? next + i * streams * point : u};
        Product<T>::run_chain(width, range.count, chain, v + v_offset(c) + i * plan_.v_point, weights,
                              own.m + i * plan_.m_point, [&] {
                                const int64_t end = least(done + step, vectors);
                                Weights::run(part, done, end);
                                done = end;
                              });
      }
      T* swap = u;
      u = other;
      other = swap;
    }
  }

  // As expand_and_multiply, for one block and few tiles.
  void halves_and_multiply(const Range& range, int64_t block, const T* v, const Own& own) const {
    if constexpr (kHalvesTiles > 0) {
      constexpr int N = OneSide::kPoints, Z = PointCounts<N>::kZeros;
      const int64_t point = plan_.cg * kWinogradLanes;
      for (int64_t c = 0; c < plan_.cg; c += plan_.depth) {
        const auto part = part_of(block, c, own.u);
        Weights::run_columns(part, own.u);
        const int64_t column = Weights::row_step(part.depth), c1 = c + part.depth;
        const T* next = c1 < plan_.cg ? kernels(block, c1) : kernels(block + 1, 0);
        const typename Product<T>::Chain chain{part.depth, plan_.v_row, 0, c > 0};
        int64_t call = 0;
        for (int a = 0; a < R; ++a) {
          const T* h = own.u + OneSide::weight(a) * Weights::kRowVectors * column;
          const T* from = v + v_offset(c) + a * R * plan_.v_point;
          T* m = own.m + a * R * plan_.m_point;
          const auto single = [&](int vector, int position) {
            Product<T>::run_chain(1, range.count, chain, from + position * plan_.v_point, h + vector * column,
                                  m + position * plan_.m_point);
          };
          if (Z == 1) single(3, 0);
          for (int p = 0; p < PointCounts<N>::kPairs; ++p, ++call) {
            const int64_t i = 2 * p + Z;
            const PairJob<T> job{part.depth,
                                 plan_.v_row,
                                 plan_.v_point,
                                 plan_.m_point,
                                 c > 0,
                                 from + i * plan_.v_point,
                                 m + i * plan_.m_point,
                                 call < 9 ? next + call * point : h};
            Halves<T, Z, kStride>::run(range.count, job, Weights::kRows.row[p], h, column);
          }
          single(2, N - 1);
          for (int odd = N; odd < R; ++odd) single(1, odd);
        }
      }
    }
  }

  // The outputs of one panel of group g for the tiles of `range`.
  void multiply(const Range& range, int64_t g, int64_t panel, const T* v, const Own& own) const {
    const int64_t first = plan_.blocks * panel / plan_.panels;
    const int64_t width = plan_.blocks * (panel + 1) / plan_.panels - first;
    const int64_t block = g * plan_.blocks + first;
    if (expands() && width == 1 && range.count <= kHalvesTiles) {
      halves_and_multiply(range, block, v, own);
    } else if (expands()) {
      expand_and_multiply(range, block, width, v, own);
    } else {
      const T* u = (plan_.raw ? shared_u_ : static_cast<const T*>(p_.packed)) + block * plan_.u_block;
      for (int64_t i = 0; i < P; ++i) {
        Product<T>::run(width, range.count, plan_.cg, v + i * plan_.v_point, plan_.v_row,
                        u + weight_of(i) * plan_.u_point, plan_.u_block, own.m + i * plan_.m_point);
      }
    }
    const int64_t row = width * kWinogradLanes, k0 = first * kWinogradLanes;
    const int64_t channel = g * plan_.kg + k0, count = least(row, plan_.kg - k0);
    each_run(range, [&](const Run& run, int64_t t) {
      const T* m = own.m + t * row;
      if (out_.channels_last) return write_tiles(run, channel, count, m, row);
      for (int64_t k = 0; k < count; k += W) write_strip(run, channel + k, least(W, count - k), m + k, row, own);
    });
  }

  Reg bias_of(int64_t channel, int64_t lanes) const {
    return p_.bias == nullptr ? V::zero() : V::load_n(static_cast<const T*>(p_.bias) + channel, lanes);
  }

  // `count` outputs from `channel` on. Tile by tile, so that neighbouring outputs are written together.
  void write_tiles(const Run& run, int64_t channel, int64_t count, const T* m, int64_t row) const {
    for (int64_t j = 0; j < run.count; ++j) {
      const int64_t h = run.ty * M, w = (run.tx + j) * M, at = out_.offset(run.n, channel, h, w);
      const Corner corner{least(M, plan_.oh - h), least(M, plan_.ow - w), plan_.ow * p_.k};
      const bool inside = corner.rows == M && corner.columns == M && p_.residual == nullptr;
      for (int64_t k = 0; k < count; k += W) {
        const int64_t lanes = least(W, count - k);
        const Reg bias = bias_of(channel + k, lanes);
        inside&& lanes == W ? write_tile<true>(corner, at + k, bias, lanes, m + j * row + k)
                            : write_tile<false>(corner, at + k, bias, lanes, m + j * row + k);
      }
    }
  }

  // How much of a tile is inside the map, and the elements from row to row there.
  struct Corner {
    int64_t rows, columns, line;
  };

  // kPlain: all of the tile and of the lanes are there, and no residual is.
  template <bool kPlain>
  void write_tile(const Corner& corner, int64_t at, Reg bias, int64_t lanes, const T* m) const {
    const X* residual = static_cast<const X*>(p_.residual);
    X* out = static_cast<X*>(p_.out);
    Tiles::output(m, plan_.m_point, [&](int y, const Reg* values) __attribute__((always_inline)) {
      if (!kPlain && y >= corner.rows) return;
#pragma GCC unroll 8
      for (int x = 0; x < M; ++x) {
        if (!kPlain && x >= corner.columns) break;
        const int64_t here = at + y * corner.line + x * p_.k;
        Reg value = V::add(values[x], bias);
        if (!kPlain && residual != nullptr) value = V::add(value, Io<X>::load_n(residual + here, lanes));
        kPlain ? Io<X>::store(out + here, activate_(value)) : Io<X>::store_n(out + here, activate_(value), lanes);
      }
    });
  }

  void write_strip(const Run& run, int64_t channel, int64_t lanes, const T* m, int64_t row, const Own& own) const {
    const Reg bias = bias_of(channel, lanes);
    const int64_t cols = run.count * M, h = run.ty * M, w = run.tx * M;
    for (int64_t j = 0; j < run.count; ++j) {
      Tiles::output(m + j * row, plan_.m_point, [&](int y, const Reg* values) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int x = 0; x < M; ++x) V::store(own.strip + (y * cols + j * M + x) * W, V::add(values[x], bias));
      });
    }
    for (int64_t y = 0; y < M && h + y < plan_.oh; ++y) {
      out_.write(static_cast<X*>(p_.out), static_cast<const X*>(p_.residual), activate_, run.n, channel, lanes, h + y,
                 w, least(cols, plan_.ow - w), own.strip + y * cols * W, own.flat);
    }
  }

  const WinogradParams& p_;
  Plan<T> plan_;
  Map in_, out_;
  Activate<T> activate_;
  Workspace space_;
  T* shared_v_ = nullptr;
  T* shared_u_ = nullptr;
  Own own_;
  size_t own_bytes_, bytes_;
};

// Calls body.run<X, M, stride>() for the dtype, the tile and the stride.
template <class X, class Body>
void with_tile(const WinogradParams& p, Body& body) {
  if (p.stride == 2) return body.template run<X, 4, 2>();
  if (p.tile == 2) return body.template run<X, 2, 1>();
  if (p.tile == 4) return body.template run<X, 4, 1>();
  if (p.tile == 5) return body.template run<X, 5, 1>();
  body.template run<X, 6, 1>();
}

template <class Body>
void with_types(const WinogradParams& p, Body& body) {
  switch (p.dtype) {
    case DType::f64:
      return with_tile<double>(p, body);
    case DType::f32:
      return with_tile<float>(p, body);
    case DType::bf16:
      return with_tile<Bf16>(p, body);
    default:
      return with_tile<F16>(p, body);
  }
}

struct MeasureCall {
  const WinogradParams& p;
  int threads;
  size_t bytes;
  template <class X, int M, int kStride>
  void run() {
    bytes = Conv<X, M, kStride>(p, nullptr, threads).bytes();
  }
};

struct ConvCall {
  const WinogradParams& p;
  void* workspace;
  int threads;
  template <class X, int M, int kStride>
  void run() {
    Conv<X, M, kStride>(p, workspace, threads).run(threads);
  }
};

}  // namespace

size_t winograd_workspace(const WinogradParams& p, int threads) {
  MeasureCall call{p, threads, 0};
  with_types(p, call);
  return call.bytes;
}

Status winograd_conv(const WinogradParams& p, void* workspace, int threads) {
  ConvCall call{p, workspace, threads};
  with_types(p, call);
  return nullptr;
}

Status winograd_weight(const WinogradWeight& w, int threads) { return transform_weight(w, threads); }

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
