// Sizes every path works out from the parameters.
#pragma once
#include "direct_conv2d/direct_conv2d.h"

namespace repkern {

struct DirectShape {
  int64_t oh, ow, cg, kg, taps, blocks;  // blocks: of 16 outputs, in a group

  explicit DirectShape(const DirectParams& p)
      : oh((p.h + 2 * p.ph - p.dh * (p.kh - 1) - 1) / p.sh + 1),
        ow((p.w + 2 * p.pw - p.dw * (p.kw - 1) - 1) / p.sw + 1),
        cg(p.c / p.groups),
        kg(p.k / p.groups),
        taps(p.kh * p.kw),
        blocks((kg + 15) / 16) {}
};

// A piece of the maps that threads work on together, or one alone: images, or rows of one image.
struct DirectPiece {
  int64_t image, images, row, rows;  // rows of the output
};

// How the maps are cut into pieces whose padded inputs stay in the cache.
struct DirectPieces {
  int64_t images = 1, rows, bands, count;
  bool shared;  // threads work on one piece together

  // image_bytes: padded inputs of one image; a thread's piece should hold no more than `most` bytes.
  DirectPieces(const DirectParams& p, const DirectShape& s, int64_t image_bytes, int64_t most, int threads) {
    shared = threads > 1 && p.n * image_bytes <= threads * most / 2;
    rows = s.oh;
    if (shared) {
      images = p.n;
    } else if (image_bytes <= most && p.n >= threads) {
      const int64_t fit = most / image_bytes, each = (p.n + threads - 1) / threads;
      const int64_t turns = (each + fit - 1) / fit;
      images = (p.n + threads * turns - 1) / (threads * turns);
    } else {
      int64_t turns = (image_bytes + most - 1) / most;
      if (p.n % threads != 0) turns = (turns + threads - 1) / threads * threads;
      rows = (s.oh + turns - 1) / turns;
    }
    bands = (s.oh + rows - 1) / rows;
    count = (p.n + images - 1) / images * bands;
  }

  DirectPiece at(const DirectParams& p, const DirectShape& s, int64_t number) const {
    const int64_t image = number / bands * images, row = number % bands * rows;
    return {image, images < p.n - image ? images : p.n - image, row, rows < s.oh - row ? rows : s.oh - row};
  }
};

}  // namespace repkern
