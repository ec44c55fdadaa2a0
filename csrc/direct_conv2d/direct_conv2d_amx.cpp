// The convolution on the tile unit: padded rows in three bfloat16 parts, where 16 neighbouring outputs read 16 rows of a
// tile a constant step apart.
#define REPKERN_ISA_NAMESPACE amx
#include "common/simd/amx.h"
//
#include "common/parallel.h"
#include "common/workspace.h"
#include "direct_conv2d/direct_conv2d_isa.h"
#include "direct_conv2d/direct_conv2d_maps_body.h"
#include "direct_conv2d/direct_conv2d_split_body.h"

namespace repkern {
namespace amx {
namespace {

class Split {
  static constexpr int64_t kPieceBytes = 1 << 20;  // of padded rows: they share the second cache with weights
  static constexpr int64_t kGroup = 32;            // tiles of pixels that pass by the weights of a chain together
  static constexpr int64_t kChain = 24;            // blocks; longer chains of sums lose accuracy
  static constexpr int64_t kPanel = 2;             // blocks of outputs side by side
  static constexpr int64_t kTile = kTileRows * kDepth;

 public:
  Split(const DirectParams& p, void* workspace, int threads)
      : p_(p), s_(p), in_{p, s_.cg}, out_(p, s_), space_(workspace), threads_(threads) {
    lay_out();
    const int64_t all = (s_.oh + reach_) * phases_ * row_ * kParts;
    pieces_ = DirectPieces(p, s_, all * 2 * p.groups, kPieceBytes, threads);
    plane_ = (pieces_.rows + reach_) * row_;
    part_ = plane_ * phases_;
    image_ = part_ * kParts;
    panels_ = ceil_div(s_.blocks, kPanel);
    // A tile is read whole even if the map ends within it.
    const int64_t planes = pieces_.images * image_, behind = kTileRows * step_ + kDepth;
    offsets_ = space_.take<int32_t>(blocks_);
    shared_ = space_.take<uint16_t>(pieces_.shared ? planes * p.groups + behind : 0);
    const size_t before = space_.used();
    own_.planes = space_.take<uint16_t>(pieces_.shared ? 0 : planes + behind);
    own_.sums = space_.take<float>(kGroup * kTileRows * kPanel * 16);
    own_.strips = space_.take<float>(strips_ * columns_ * pitch_ + 16);
    own_.patch = space_.take<float>(patched_ ? row_ + 16 : 0);
    own_bytes_ = space_.used() - before;
    bytes_ = before + own_bytes_ * static_cast<size_t>(threads);
  }

  size_t bytes() const { return bytes_; }

  void run() {
    set_offsets();
    for (int64_t number = 0; pieces_.shared && number < pieces_.count; ++number) run_shared(pieces_.at(p_, s_, number));
    if (pieces_.shared) return;
    parallel_for(pieces_.count, threads_, [this](int64_t number, int thread) {
      const DirectPiece piece = pieces_.at(p_, s_, number);
      const Own own = own_of(thread);
      const int64_t tiles = tiles_of(piece) * piece.images;
      for (int64_t g = 0; g < p_.groups; ++g) {
        for (int64_t line = 0; line < piece.images * lines_of(piece); ++line) read(piece, g, line, own.planes, own);
        const TileUse use;
        for (int64_t panel = 0; panel < panels_; ++panel) multiply(piece, g, panel, 0, tiles, own.planes, own);
      }
    });
  }

 private:
  struct Own {
    uint16_t* planes;
    float *sums, *strips, *patch;
  };

  Own own_of(int thread) const {
    const int64_t bytes = static_cast<int64_t>(own_bytes_) * thread;
    return {own_.planes + bytes / 2, own_.sums + bytes / 4, own_.strips + bytes / 4, own_.patch + bytes / 4};
  }

  // Where numbers lie. Short filters become one run of products, gathered for every output; dilated ones whose taps do
  // not fill blocks are gathered row by row; all others are read from the padded rows themselves.
  void lay_out() {
    const int64_t row = p_.kw * s_.cg;
    whole_ = row < kDepth;
    patched_ = whole_ || (p_.dw != 1 && s_.cg % kDepth != 0);
    runs_ = whole_ ? 1 : p_.kh;
    length_ = whole_ ? s_.taps * s_.cg : row;
    blocks_ = runs_ * ceil_div(length_, kDepth);
    pitch_ = s_.cg;
    // Rows of a tile in few sets of the first cache would drive each other out.
    if (s_.cg % kDepth == 0 && pitch_ * p_.sw * 2 % 512 == 0) pitch_ += kDepth;
    columns_ = ceil_div((s_.ow - 1) * p_.sw + (p_.kw - 1) * p_.dw + 1, p_.sw) * p_.sw;
    step_ = patched_ ? most_of(length_, kDepth) : p_.sw * pitch_;
    width_ = patched_ ? s_.ow : columns_ / p_.sw;
    row_ = width_ * step_;
    reach_ = whole_ ? 0 : (p_.kh - 1) * p_.dh / p_.sh;
    phases_ = whole_ ? 1 : least(p_.sh, (p_.kh - 1) * p_.dh + 1);
    strips_ = whole_ ? p_.kh : 1;
  }

  void set_offsets() {
    const int64_t each = blocks_ / runs_;
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t r = b / each * p_.dh, first = b % each * kDepth;
      const int64_t start = length_ < kDepth ? first : least(first, length_ - kDepth);
      const int64_t line = whole_ ? 0 : r % p_.sh * plane_ + r / p_.sh * row_;
      const bool taps = !patched_ && s_.cg % kDepth == 0;
      offsets_[b] = static_cast<int32_t>(line + (taps ? start / s_.cg * p_.dw * pitch_ + start % s_.cg : start));
    }
  }

  void run_shared(const DirectPiece& piece) {
    const int64_t group = pieces_.images * image_, lines = piece.images * lines_of(piece);
    parallel_for(p_.groups * lines, threads_, [&](int64_t unit, int thread) {
      read(piece, unit / lines, unit % lines, shared_ + unit / lines * group, own_of(thread));
    });
    const int64_t tiles = tiles_of(piece) * piece.images, units = p_.groups * panels_;
    // Panels read different weights; tiles are divided where panels alone leave threads without work.
    const int64_t wanted = units % threads_ == 0 ? 1 : ceil_div(4 * threads_, units);
    const int64_t parts = most_of(least(wanted, tiles / 4), 1), part = ceil_div(ceil_div(tiles, parts), 2) * 2;
    parallel_for(units * parts, threads_, [&](int64_t unit, int thread) {
      const int64_t t = unit % parts * part, g = unit / parts / panels_;
      if (t >= tiles) return;
      const TileUse use;
      multiply(piece, g, unit / parts % panels_, t, least(t + part, tiles), shared_ + g * group, own_of(thread));
    });
  }

  int64_t lines_of(const DirectPiece& piece) const { return (piece.rows + reach_) * phases_; }
  int64_t positions_of(const DirectPiece& piece) const { return (piece.rows - 1) * width_ + s_.ow; }
  int64_t tiles_of(const DirectPiece& piece) const { return ceil_div(positions_of(piece), kTileRows); }

  // One row of planes [image][part][phase][row]: row i of phase f is padded row (first + i) sh + f.
  void read(const DirectPiece& piece, int64_t g, int64_t line, uint16_t* planes, const Own& own) const {
    const int64_t image = line / lines_of(piece), rest = line % lines_of(piece);
    const int64_t phase = rest % phases_, i = rest / phases_;
    uint16_t* to = planes + image * image_ + phase * plane_ + i * row_;
    const int64_t h = (piece.row + i) * p_.sh + phase - p_.ph, strip = columns_ * pitch_;
    for (int64_t r = 0; r < strips_; ++r)
      in_.row(piece.image + image, g, h + r * p_.dh, columns_, pitch_, own.strips + r * strip);
    if (!patched_) return split_numbers(own.strips, row_, to, part_);
    for (int64_t w = 0; w < s_.ow; ++w) {
      float* patch = own.patch + w * step_;
      for (int64_t r = 0; r < strips_; ++r) patch = gather(own.strips + r * strip + w * p_.sw * pitch_, patch);
      for (; patch < own.patch + (w + 1) * step_; ++patch) *patch = 0;
    }
    split_numbers(own.patch, row_, to, part_);
  }

  // The numbers of one row of the kernel; returns where the next belong.
  float* gather(const float* from, float* to) const {
    using V = Vec<float>;
    const int64_t pieces = p_.dw == 1 && pitch_ == s_.cg ? 1 : p_.kw, length = p_.kw * s_.cg / pieces;
    for (int64_t t = 0; t < pieces; ++t, from += p_.dw * pitch_, to += length) {
      for (int64_t c = 0; c < length; c += V::width) V::store_n(to + c, V::load_n(from + c, length - c), length - c);
    }
    return to;
  }

  // Outputs of one panel for the tiles [begin, end) of all images of the piece.
  void multiply(const DirectPiece& piece, int64_t g, int64_t panel, int64_t begin, int64_t end, const uint16_t* planes,
                const Own& own) const {
    const int64_t first = panel * kPanel, wide = least(kPanel, s_.blocks - first), each = tiles_of(piece);
    const int64_t k = first * 16, lanes = least(wide * 16, s_.kg - k), pitch = wide * 16, output = blocks_ * kParts * kTile;
    const Weights w{static_cast<const uint16_t*>(p_.packed) + (g * s_.blocks + first) * output, output};
    const int64_t chains = ceil_div(blocks_, kChain);
    for (int64_t t = begin; t < end;) {
      const int64_t image = t / each, tile = t % each;
      const int64_t count = least(least(kGroup, end - t), each - tile), q = tile * kTileRows;
      for (int64_t chain = 0; chain < chains; ++chain) {
        const int64_t from = blocks_ * chain / chains, to = blocks_ * (chain + 1) / chains;
        for (int64_t j = 0; j < count; j += 2) {
          const Pixels x{planes + image * image_ + (q + j * kTileRows) * step_, step_, part_, offsets_};
          float* sums = own.sums + j * kTileRows * pitch;
          product(least(2, count - j), wide)(x, w, from, to, chain > 0, sums, pitch);
        }
      }
      const int64_t wanted = least(count * kTileRows, positions_of(piece) - q);
      out_.positions(piece, image, width_, q, wanted, g * s_.kg + k, lanes, own.sums, pitch);
      t += count;
    }
  }

  using Run = void(const Pixels&, const Weights&, int64_t, int64_t, bool, float*, int64_t);
  static Run* product(int64_t rows, int64_t columns) {
    if (rows == 2) return columns == 2 ? &TileProduct<2, 2>::run : &TileProduct<2, 1>::run;
    return columns == 2 ? &TileProduct<1, 2>::run : &TileProduct<1, 1>::run;
  }

  const DirectParams& p_;
  const DirectShape s_;
  const Input<float> in_;
  const Output<float> out_;
  Workspace space_;
  const int threads_;
  bool whole_, patched_;
  int64_t runs_, length_, blocks_;                 // of products: runs, numbers in one, blocks of 32 in all
  int64_t pitch_, columns_;                        // of a padded row of the input in float32
  int64_t step_, width_, row_;                     // elements from output to output; outputs and elements of a row
  int64_t reach_, phases_, plane_, part_, image_;  // rows a kernel reaches down; planes; elements of each
  int64_t strips_, panels_;
  DirectPieces pieces_{p_, s_, 1, 1, 1};
  int32_t* offsets_;
  uint16_t* shared_;
  Own own_;
  size_t own_bytes_, bytes_;
};

}  // namespace

size_t direct_workspace(const DirectParams& p, int threads) { return Split(p, nullptr, threads).bytes(); }

Status direct_conv(const DirectParams& p, void* workspace, int threads) {
  Split(p, workspace, threads).run();
  return nullptr;
}

}  // namespace amx
}  // namespace repkern
