// The convolution on the tile unit: padded rows in three bfloat16 parts, where 16 neighbouring outputs read 16 rows of
// a tile a constant step apart.
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
  static constexpr int64_t kChain = 36;            // blocks; longer chains of sums lose accuracy
  static constexpr int64_t kPanel = 2;             // blocks of outputs side by side
  // Up to so many threads on one piece each read the whole input: cheaper than rows from another core's cache.
  static constexpr int kRepeatingThreads = 4;
  static constexpr int64_t kTile = kTileRows * kDepth, kBlockLines = kParts * kTile / 32;

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
    segments_ = space_.take<Segment>(patched_ ? most_segments() : 0);
    repeated_ = pieces_.shared && threads <= kRepeatingThreads;
    group_ = pieces_.shared ? planes : 0;
    shared_ = space_.take<uint16_t>(pieces_.shared && !repeated_ ? planes * p.groups + behind : 0);
    const size_t before = space_.used();
    own_.planes = space_.take<uint16_t>(repeated_ ? planes * p.groups + behind : pieces_.shared ? 0 : planes + behind);
    own_.sums = space_.take<float>(kGroup * kTileRows * kPanel * 16);
    own_.strips = space_.take<float>(strips_ * columns_ * pitch_ + 16);
    own_bytes_ = space_.used() - before;
    bytes_ = before + own_bytes_ * static_cast<size_t>(threads);
  }

  size_t bytes() const { return bytes_; }

  void run() {
    set_offsets();
    if (patched_) set_segments();
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
  // Numbers of a patch that lie side by side in a strip, within one vector of the patch; lane 0 would be at `offset`.
  struct Segment {
    int64_t offset;
    int32_t vector;
    __mmask16 mask;
  };
  struct Own {
    uint16_t* planes;
    float *sums, *strips;
  };

  Own own_of(int thread) const {
    const int64_t bytes = static_cast<int64_t>(own_bytes_) * thread;
    return {own_.planes + bytes / 2, own_.sums + bytes / 4, own_.strips + bytes / 4};
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

  // Blocks come in the order in which all taps read the same numbers of the input, which stay in the first cache.
  void set_offsets() {
    const bool taps = s_.cg % kDepth == 0;
    const int64_t inside = taps ? p_.kw : 1;
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t t = b % inside, r = b / inside % runs_ * p_.dh, first = b / inside / runs_ * kDepth;
      const int64_t start = length_ < kDepth ? first : least(first, length_ - kDepth);
      const int64_t line = whole_ ? 0 : r % p_.sh * plane_ + r / p_.sh * row_;
      offsets_[b] = static_cast<int32_t>(line + t * p_.dw * pitch_ + start);
    }
  }

  int64_t most_segments() const { return step_ / 16 + strips_ * p_.kw + 2; }

  void set_segments() {
    const int64_t pieces = p_.dw == 1 ? 1 : p_.kw, length = p_.kw * s_.cg / pieces;
    Segment* next = segments_;
    for (int64_t run = 0; run < strips_ * pieces; ++run) {
      const int64_t from = run / pieces * columns_ * pitch_ + run % pieces * p_.dw * pitch_, at = run * length;
      for (int64_t c = 0; c < length;) {
        const int64_t lane = (at + c) % 16, some = least(16 - lane, length - c);
        *next++ = {from + c - lane, static_cast<int32_t>((at + c) / 16), __mmask16(((1u << some) - 1) << lane)};
        c += some;
      }
    }
    *next = {0, -1, 0};
  }

  void run_shared(const DirectPiece& piece) {
    const int64_t lines = piece.images * lines_of(piece), all_lines = p_.groups * lines;
    const auto read_line = [&](int64_t unit, uint16_t* planes, int thread) {
      read(piece, unit / lines, unit % lines, planes + unit / lines * group_, own_of(thread));
    };
    if (!repeated_)
      parallel_for(all_lines, threads_, [&](int64_t unit, int thread) { read_line(unit, shared_, thread); });
    const int64_t tiles = tiles_of(piece) * piece.images, units = p_.groups * panels_;
    // Panels read different weights; tiles are divided where panels alone leave threads without work.
    const int64_t wanted = units % threads_ == 0 ? 1 : ceil_div(4 * threads_, units);
    const int64_t parts = most_of(least(wanted, tiles / 4), 1), part = ceil_div(ceil_div(tiles, parts), 2) * 2;
    const auto multiply_unit = [&](int64_t unit, const uint16_t* planes, int thread) {
      const int64_t t = unit % parts * part, g = unit / parts / panels_;
      if (t >= tiles) return;
      const TileUse use;
      multiply(piece, g, unit / parts % panels_, t, least(t + part, tiles), planes + g * group_, own_of(thread));
    };
    if (!repeated_) {
      return parallel_for(units * parts, threads_,
                          [&](int64_t unit, int thread) { multiply_unit(unit, shared_, thread); });
    }
    int64_t next = 0;
    parallel_for(threads_, threads_, [&](int64_t, int thread) {
      uint16_t* planes = own_of(thread).planes;
      for (int64_t unit = 0; unit < all_lines; ++unit) read_line(unit, planes, thread);
      for (int64_t unit; (unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < units * parts;)
        multiply_unit(unit, planes, thread);
    });
  }

  int64_t lines_of(const DirectPiece& piece) const { return (piece.rows + reach_) * phases_; }
  int64_t positions_of(const DirectPiece& piece) const { return (piece.rows - 1) * width_ + s_.ow; }
  int64_t tiles_of(const DirectPiece& piece) const { return ceil_div(positions_of(piece), kTileRows); }

  // One row of planes [image][part][phase][row]: row i of phase f is padded row (first + i) sh + f.
  void read(const DirectPiece& piece, int64_t g, int64_t line, uint16_t* planes, const Own& own) const {
    const int64_t image = line / lines_of(piece), rest = line % lines_of(piece), n = piece.image + image;
    const int64_t phase = rest % phases_, i = rest / phases_;
    uint16_t* to = planes + image * image_ + phase * plane_ + i * row_;
    const int64_t h = (piece.row + i) * p_.sh + phase - p_.ph, strip = columns_ * pitch_;
    if (!patched_ && (h < 0 || h >= p_.h)) return clear_parts(row_, to, part_);
    if (!patched_ && p_.channels_last && pitch_ == p_.c) return read_in_place(n, h, to);
    for (int64_t r = 0; r < strips_; ++r) in_.row(n, g, h + r * p_.dh, columns_, pitch_, own.strips + r * strip);
    if (!patched_) return split_numbers(own.strips, row_, to, part_);
    for (int64_t w = 0; w < s_.ow; ++w) read_patch(own.strips + w * p_.sw * pitch_, to + w * step_);
  }

  // Row h of a channels_last map whose channels are one group.
  void read_in_place(int64_t n, int64_t h, uint16_t* to) const {
    const int64_t left = least(p_.pw, columns_) * pitch_, some = least(p_.w * pitch_, row_ - left);
    clear_parts(left, to, part_);
    split_numbers(static_cast<const float*>(p_.x) + (n * p_.h + h) * p_.w * p_.c, some, to + left, part_);
    clear_parts(row_ - left - some, to + left + some, part_);
  }

  // The numbers one output reads, from strips.
  void read_patch(const float* from, uint16_t* to) const {
    const Segment* segment = segments_;
    for (int64_t j = 0; j < step_; j += kDepth) {
      __m512 halves[2];
      for (int half = 0; half < 2; ++half) {
        __m512 sum = _mm512_setzero_ps();
        for (const int64_t vector = j / 16 + half; segment->vector == vector; ++segment)
          sum = _mm512_mask_loadu_ps(sum, segment->mask, from + segment->offset);
        halves[half] = sum;
      }
      store_parts(halves[0], halves[1], to + j, part_, first_of_32(step_ - j));
    }
  }

  // Outputs of one panel for the tiles [begin, end) of all images of the piece.
  void multiply(const DirectPiece& piece, int64_t g, int64_t panel, int64_t begin, int64_t end, const uint16_t* planes,
                const Own& own) const {
    const int64_t first = panel * kPanel, wide = least(kPanel, s_.blocks - first), each = tiles_of(piece);
    const int64_t k = first * 16, lanes = least(wide * 16, s_.kg - k), pitch = wide * 16;
    const int64_t output = blocks_ * kParts * kTile;
    const uint16_t* u = static_cast<const uint16_t*>(p_.packed) + (g * s_.blocks + first) * output;
    const int64_t chains = ceil_div(blocks_, kChain), rows = wide == 2 ? 2 : 4;
    // The panel this thread will probably take next.
    const int64_t panels_ahead = (pieces_.shared ? threads_ : 1) * kPanel * output;
    for (int64_t t = begin; t < end;) {
      const int64_t image = t / each, tile = t % each;
      const int64_t count = least(least(kGroup, end - t), each - tile), q = tile * kTileRows;
      const int64_t passes = ceil_div(count, rows);
      for (int64_t chain = 0; chain < chains; ++chain) {
        const int64_t from = blocks_ * chain / chains, to = blocks_ * (chain + 1) / chains;
        // The next weights come a part at a time while these are used; a second group finds them in the cache.
        const uint16_t* next = to < blocks_ ? u + to * kParts * kTile : t + count < end ? u : u + panels_ahead;
        const int64_t lines = t == begin || to == blocks_ ? ceil_div(kBlockLines, passes) : 0;
        for (int64_t j = 0; j < count; j += rows) {
          const Pixels x{planes + image * image_ + (q + j * kTileRows) * step_, step_, part_, offsets_};
          const Weights w{u, output, next + j / rows * (to - from) * lines * 32, lines};
          product(least(rows, count - j), wide)(x, w, from, to, chain > 0, own.sums + j * kTileRows * pitch, pitch);
        }
      }
      const int64_t wanted = least(count * kTileRows, positions_of(piece) - q);
      out_.positions(piece, image, width_, q, wanted, g * s_.kg + k, lanes, own.sums, pitch);
      t += count;
    }
  }

  using Run = void(const Pixels&, const Weights&, int64_t, int64_t, bool, float*, int64_t);
  static Run* product(int64_t rows, int64_t columns) {
    constexpr Run* one[] = {tile_product<1, 1>, tile_product<2, 1>, tile_product<3, 1>, tile_product<4, 1>};
    if (columns == 1) return one[rows - 1];
    return rows == 1 ? tile_product<1, 2> : tile_product<2, 2>;
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
  int64_t group_;  // elements of a group's planes where threads share a piece
  bool repeated_;
  DirectPieces pieces_{p_, s_, 1, 1, 1};
  int32_t* offsets_;
  Segment* segments_;
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
