// A call with typed pointers, how its maps are cut, and the per-channel numbers that every pass needs.
#pragma once
#include <cmath>

#include "branch_norm_add/branch_norm_add.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

constexpr int64_t kChunkBytes = 8192;  // of one channel, in T: what is summed in T before it goes to double
constexpr int64_t kBlock = 32768;      // about how many elements of a channels_last map make a block of rows
constexpr int64_t kMostRows = 512;     // rows of a block, each one addition in T
constexpr int64_t kLanesPadding = 32;  // rows of numbers per channel are padded to whole vectors of every ISA

// X: how the maps are stored.
template <class X>
struct View {
  using T = typename Computing<X>::Type;

  const NormParams& p;
  int64_t n, c, plane;  // plane = H * W
  int64_t lanes;        // c, padded
  int branches;
  int norms = 0;
  bool channels_last;
  NormActivation activation;
  const X* y[kMostNormBranches];
  NormMode mode[kMostNormBranches];

  explicit View(const NormParams& params)
      : p(params),
        n(params.n),
        c(params.c),
        plane(params.p),
        lanes(round_up(params.c, kLanesPadding)),
        branches(static_cast<int>(params.branches)),
        // With one position an image both layouts are the same memory, and channels side by side fill vectors.
        channels_last(params.channels_last != 0 || params.p == 1),
        activation(static_cast<NormActivation>(params.activation)) {
    for (int b = 0; b < branches; ++b) {
      y[b] = static_cast<const X*>(params.branch[b].y);
      mode[b] = static_cast<NormMode>(params.branch[b].mode);
      norms += mode[b] != NormMode::as_is;
    }
  }

  int64_t count() const { return n * plane; }
  bool normed(int b) const { return mode[b] != NormMode::as_is; }
  X* grad(int b) const { return static_cast<X*>(p.branch[b].grad); }

  double statistic(const void* values, int b, int64_t channel) const {
    if (mode[b] == NormMode::batch) return static_cast<const T*>(values)[channel];
    return value_at(values, p.param_dtype, channel);
  }
  double mean(int b, int64_t channel) const { return statistic(p.branch[b].mean, b, channel); }
  double inverse(int b, int64_t channel) const {
    return 1 / std::sqrt(statistic(p.branch[b].var, b, channel) + p.branch[b].eps);
  }
};

// Rows of `lanes` numbers each, one number a channel.
template <class T>
struct ChannelRows {
  T* data = nullptr;
  int64_t lanes = 0;

  ChannelRows(Workspace& space, int64_t rows, int64_t lanes_of_row)
      : data(space.take<T>(rows * lanes_of_row)), lanes(lanes_of_row) {}
  T* row(int64_t r) const { return data + r * lanes; }
  T& at(int64_t r, int64_t channel) const { return data[r * lanes + channel]; }
};

// z = shift + sum of scale_b y_b. Rows: scale of every branch, mean of every branch, shift.
template <class X>
struct Terms {
  using T = typename View<X>::T;
  ChannelRows<T> rows;
  int branches;

  Terms(Workspace& space, const View<X>& in) : rows(space, 2 * in.branches + 1, in.lanes), branches(in.branches) {}
  T* scale(int b) const { return rows.row(b); }
  T* mean(int b) const { return rows.row(branches + b); }
  T* shift() const { return rows.row(2 * branches); }

  void prepare(const View<X>& in, int64_t channel) const {
    double shift_sum = 0;
    for (int b = 0; b < branches; ++b) {
      const NormBranch& branch = in.p.branch[b];
      T factor = 1, centre = 0;
      if (in.normed(b)) {
        factor = static_cast<T>(value_at(branch.weight, in.p.param_dtype, channel) * in.inverse(b, channel));
        centre = static_cast<T>(in.mean(b, channel));
        shift_sum +=
            value_at(branch.bias, in.p.param_dtype, channel) - in.mean(b, channel) * static_cast<double>(factor);
      }
      scale(b)[channel] = factor;
      mean(b)[channel] = centre;
    }
    shift()[channel] = static_cast<T>(shift_sum);
  }
};

// How one channel of a contiguous map is cut: into runs of whole images, or, of large images, parts of one.
struct Chunks {
  int64_t images, length, per_image, count;  // a chunk is `images` runs of `length`; `per_image` chunks an image

  Chunks(int64_t n, int64_t plane, int64_t most) {
    per_image = divide_up(plane, most);
    length = per_image == 1 ? plane : round_up(divide_up(plane, per_image), 16);
    per_image = divide_up(plane, length);
    images = per_image == 1 ? lesser(larger(most / plane, 1), n) : 1;
    count = per_image == 1 ? divide_up(n, images) : n * per_image;
  }
};

struct Chunk {
  int64_t image, images, begin, length;

  Chunk(const Chunks& cut, int64_t index, int64_t n, int64_t plane) {
    image = cut.per_image == 1 ? index * cut.images : index / cut.per_image;
    images = lesser(cut.images, n - image);
    begin = index % cut.per_image * cut.length;
    length = lesser(cut.length, plane - begin);
  }
  int64_t size() const { return images * length; }
};

// How the rows (N * H * W of them, C long) of channels_last maps are cut.
struct RowBlocks {
  int64_t rows, per_block, count;

  RowBlocks(int64_t all_rows, int64_t c) : rows(all_rows) {
    per_block = lesser(larger(kBlock / c, 32), kMostRows);
    count = divide_up(rows, per_block);
  }
  int64_t begin(int64_t block) const { return block * per_block; }
  int64_t size(int64_t block) const { return lesser(per_block, rows - block * per_block); }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
