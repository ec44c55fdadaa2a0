// The convolution by multiply-adds for one instruction set: the micro-kernels of winograd_conv2d on padded rows, where
// the pixels that a tap reads lie a constant step apart.
#pragma once
#include "common/parallel.h"
#include "common/workspace.h"
#include "direct_conv2d/direct_conv2d_depthwise_body.h"
#include "direct_conv2d/direct_conv2d_isa.h"
#include "direct_conv2d/direct_conv2d_maps_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

namespace {  // as Workspace

template <class T>
class Direct {
  using V = Vec<T>;
  static constexpr int W = V::width;
  static constexpr int64_t kLanes = kWinogradLanes;
  static constexpr int64_t kPieceBytes = 3 << 18;  // of padded rows: they share the second cache with weights
  static constexpr int64_t kMostPixels = 96;

 public:
  Direct(const DirectParams& p, void* workspace, int threads)
      : p_(p), s_(p), in_{p, s_.cg}, out_(p, s_), space_(workspace), threads_(threads) {
    pitch_ = s_.cg;
    if (pitch_ * p.sw * static_cast<int64_t>(sizeof(T)) % 2048 == 0) pitch_ += 64 / sizeof(T);
    // A row of the kernel is one run of products where its taps lie side by side.
    merged_ = p.dw == 1 && pitch_ == s_.cg;
    columns_ = ceil_div((s_.ow - 1) * p.sw + (p.kw - 1) * p.dw + 1, p.sw) * p.sw;
    row_ = columns_ * pitch_;
    reach_ = (p.kh - 1) * p.dh / p.sh;
    phases_ = least(p.sh, (p.kh - 1) * p.dh + 1);
    const int64_t all = phase_rows(s_.oh) * phases_ * row_;
    pieces_ = DirectPieces(p, s_, all * sizeof(T) * p.groups, kPieceBytes, threads);
    plane_ = phase_rows(pieces_.rows) * row_;
    image_ = plane_ * phases_;
    panel_ = least(s_.blocks, Product<T>::kMostBlocks);
    panels_ = ceil_div(s_.blocks, panel_);
    const int64_t planes = pieces_.images * image_ * (pieces_.shared ? p.groups : 1);
    shared_ = space_.template take<T>(pieces_.shared ? planes : 0);
    const size_t before = space_.used();
    own_ = space_.template take<T>(pieces_.shared ? 0 : planes);
    sums_ = space_.template take<T>(kMostPixels * panel_ * kLanes);
    own_bytes_ = space_.used() - before;
    bytes_ = before + own_bytes_ * static_cast<size_t>(threads);
  }

  size_t bytes() const { return bytes_; }

  void run() {
    for (int64_t number = 0; pieces_.shared && number < pieces_.count; ++number) run_shared(pieces_.at(p_, s_, number));
    if (pieces_.shared) return;
    parallel_for(pieces_.count, threads_, [this](int64_t number, int thread) {
      const DirectPiece piece = pieces_.at(p_, s_, number);
      T* planes = own_ + step_of(thread);
      for (int64_t g = 0; g < p_.groups; ++g) {
        for (int64_t line = 0; line < piece.images * lines_of(piece); ++line) read(piece, g, line, planes);
        for (int64_t panel = 0; panel < panels_; ++panel) {
          for (int64_t image = 0; image < piece.images; ++image)
            multiply(piece, image, g, panel, 0, positions_of(piece), planes + image * image_, thread);
        }
      }
    });
  }

 private:
  void run_shared(const DirectPiece& piece) {
    const int64_t group = pieces_.images * image_, lines = piece.images * lines_of(piece);
    parallel_for(p_.groups * lines, threads_, [&](int64_t unit, int) {
      read(piece, unit / lines, unit % lines, shared_ + unit / lines * group);
    });
    const int64_t positions = positions_of(piece), units = p_.groups * panels_ * piece.images;
    // Panels read different weights; positions are divided where panels alone leave threads without work.
    const int64_t wanted = units % threads_ == 0 ? 1 : ceil_div(4 * threads_, units);
    const int64_t parts = most_of(least(wanted, positions / 24), 1), part = ceil_div(positions, parts);
    parallel_for(units * parts, threads_, [&](int64_t unit, int thread) {
      const int64_t q = unit % parts * part, image = unit / parts % piece.images, rest = unit / parts / piece.images;
      const int64_t g = rest / panels_;
      if (q < positions) {
        multiply(piece, image, g, rest % panels_, q, least(q + part, positions),
                 shared_ + g * group + image * image_, thread);
      }
    });
  }

  int64_t phase_rows(int64_t rows) const { return rows + reach_; }
  int64_t lines_of(const DirectPiece& piece) const { return phase_rows(piece.rows) * phases_; }
  int64_t width() const { return columns_ / p_.sw; }
  // Outputs of a piece are numbered with the columns behind a row's end counted, up to the last one wanted.
  int64_t positions_of(const DirectPiece& piece) const { return (piece.rows - 1) * width() + s_.ow; }
  int64_t step_of(int thread) const { return static_cast<int64_t>(own_bytes_ / sizeof(T)) * thread; }

  // One padded row. planes [image][phase][row]: row i of phase f is padded row (first + i) sh + f.
  void read(const DirectPiece& piece, int64_t g, int64_t line, T* planes) const {
    const int64_t image = line / lines_of(piece), rest = line % lines_of(piece);
    const int64_t phase = rest % phases_, i = rest / phases_;
    in_.row(piece.image + image, g, (piece.row + i) * p_.sh + phase - p_.ph, columns_, pitch_,
            planes + image * image_ + phase * plane_ + i * row_);
  }

  // Outputs of one panel at the positions [begin, end) of one image.
  void multiply(const DirectPiece& piece, int64_t image, int64_t g, int64_t panel, int64_t begin, int64_t end,
                const T* planes, int thread) const {
    const int64_t first = s_.blocks * panel / panels_, wide = s_.blocks * (panel + 1) / panels_ - first;
    const T* u = static_cast<const T*>(p_.packed) + (g * s_.blocks + first) * s_.taps * s_.cg * kLanes;
    T* sums = sums_ + step_of(thread);
    const int64_t turns = ceil_div(end - begin, kMostPixels), some = ceil_div(end - begin, turns);
    for (int64_t q = begin; q < end; q += some) {
      const int64_t count = least(some, end - q);
      sum_up(wide, count, planes + q * p_.sw * pitch_, u, sums);
      const int64_t k = first * kLanes, lanes = least(wide * kLanes, s_.kg - k);
      out_.positions(piece, image, width(), q, count, g * s_.kg + k, lanes, sums, wide * kLanes);
    }
  }

  // sums [count][wide][16], cut after each kChain products of a run.
  void sum_up(int64_t wide, int64_t count, const T* from, const T* u, T* sums) const {
    const int64_t runs = merged_ ? p_.kh : s_.taps, depth = merged_ ? p_.kw * s_.cg : s_.cg;
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t r = merged_ ? run : run / p_.kw, column = merged_ ? 0 : run % p_.kw * p_.dw;
      const T* v = from + r * p_.dh % p_.sh * plane_ + r * p_.dh / p_.sh * row_ + column * pitch_;
      for (int64_t c = 0; c < depth; c += Product<T>::kChain) {
        const int64_t some = least(Product<T>::kChain, depth - c);
        Product<T>::run_chain(wide, count, {some, p_.sw * pitch_, s_.taps * s_.cg * kLanes, run + c > 0}, v + c,
                              u + (run * depth + c) * kLanes, sums, [] {});
      }
    }
  }

  const DirectParams& p_;
  const DirectShape s_;
  const Input<T> in_;
  const Output<T> out_;
  Workspace space_;
  const int threads_;
  bool merged_;
  int64_t pitch_, columns_, row_;           // elements from pixel to pixel; pixels of a padded row; elements of it
  int64_t reach_, phases_, plane_, image_;  // rows a kernel reaches down; planes, elements of a plane and an image
  int64_t panel_, panels_;
  DirectPieces pieces_{p_, s_, 1, 1, 1};
  T *shared_, *own_, *sums_;
  size_t own_bytes_, bytes_;
};

template <class T>
size_t workspace_of(const DirectParams& p, int threads) {
  return Depthwise<T>::takes(p) ? Depthwise<T>(p, nullptr, threads).bytes() : Direct<T>(p, nullptr, threads).bytes();
}

template <class T>
void conv_of(const DirectParams& p, void* workspace, int threads) {
  if (Depthwise<T>::takes(p)) return Depthwise<T>(p, workspace, threads).run();
  Direct<T>(p, workspace, threads).run();
}

}  // namespace

size_t direct_workspace(const DirectParams& p, int threads) {
  return p.dtype == DType::f64 ? workspace_of<double>(p, threads) : workspace_of<float>(p, threads);
}

Status direct_conv(const DirectParams& p, void* workspace, int threads) {
  p.dtype == DType::f64 ? conv_of<double>(p, workspace, threads) : conv_of<float>(p, workspace, threads);
  return nullptr;
}

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
