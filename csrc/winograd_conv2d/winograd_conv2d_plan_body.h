// How a convolution is cut: into blocks of tiles whose transformed inputs stay in the cache, and panels of outputs.
#pragma once
#include "common/cpu_info.h"
#include "winograd_conv2d/winograd_conv2d_product_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
struct Plan {
  static constexpr int W = Vec<T>::width;
  static constexpr int kLine = 64 / sizeof(T);
  // Of transformed inputs and products of one block of tiles. Weights that do not fit into the second cache beside them
  // are read once a block, so blocks are large then.
  static constexpr int64_t kBlockBytes = 1 << 19, kLargeBlockBytes = 1 << 21, kCachedWeightBytes = 1 << 20;
  static constexpr int64_t kMostTiles = 96;
  // Fewer tiles a thread than this, and the threads divide the outputs of one block instead. Up to kRepeatingThreads
  // transform all of its maps each: two barriers and reading what the others wrote take longer (192 channels of 14x14,
  // batch 1, 2 threads: 0.36 and 0.23 ms).
  static constexpr int64_t kSharedTiles = 32, kRepeatingThreads = 4;
  // Kernels that are transformed on the way: all at once where that takes at most kWholeBytes; else `chain` channels of
  // `kernel_panel` blocks, twice, which leaves room for kKernelBlockBytes in a second cache of 2 MiB. In one of 1 MiB
  // the wide cut would push the maps out (192 channels of 14x14, batch 1, 2 threads: 0.35 and 0.28 ms); maps stream
  // from the third cache then, and large blocks transform kernels less often (batch 8: F5 1.57 and 1.45 ms).
  static constexpr int64_t kWholeBytes = 5 << 18, kKernelBlockBytes = 5 << 18, kWideCutBytes = 3 << 19;

  int64_t oh, ow, rows, columns, tiles;  // of the output; tiles per column, per row, of all images
  int64_t cg, kg, vectors, blocks;       // channels per group; vectors of inputs, blocks of 16 outputs in a group
  int64_t block, count;                  // tiles in a block of tiles; how many blocks
  int64_t panels, panel;                 // panels of a group; most blocks of outputs in one
  bool shared, repeated;                 // threads divide the outputs of one block; each transforms its maps
  bool raw, whole;                       // packed holds kernels; they are transformed all before the tiles
  int64_t depth;                         // most channels of a chain whose kernels are transformed at once
  int64_t v_row, v_point, m_point;       // elements from tile to tile, from point to point
  int64_t span, v_span, v_size;          // channels of v that lie together; elements to the next ones; of all of v
  int64_t u_point, u_block;              // of transformed weights: from point to point, from block to block
  int64_t strip;                         // most columns of a strip of tiles

  Plan(const WinogradParams& p, int threads) {
    const int64_t m = p.tile, patch = p.stride == 1 ? m + 2 : 2 * m + 1;
    const int64_t points = patch * patch, weights = (m + 2) * (m + 2);  // positions; different weights among theirs
    oh = (p.h + 2 * p.padding - 3) / p.stride + 1;
    ow = (p.w + 2 * p.padding - 3) / p.stride + 1;
    rows = ceil_div(oh, m);
    columns = ceil_div(ow, m);
    tiles = p.n * rows * columns;
    cg = p.c / p.groups;
    kg = p.k / p.groups;
    vectors = ceil_div(cg, W);
    blocks = ceil_div(kg, kWinogradLanes);
    raw = p.points != weights;
    const int64_t weight_bytes = weights * p.c * blocks * kWinogradLanes * static_cast<int64_t>(sizeof(T));
    whole = raw && weight_bytes <= kWholeBytes;
    const bool wide_cut = level2_bytes() >= kWideCutBytes;
    const int64_t kernel_panel = wide_cut ? 2 : 1, chain = wide_cut ? 64 : 48;
    panel = least(blocks, raw && !whole ? least(kernel_panel, Product<T>::kMostBlocks) : Product<T>::kMostBlocks);
    panels = ceil_div(blocks, panel);
    const int64_t chains = ceil_div(cg, chain);
    depth = raw && !whole ? ceil_div(ceil_div(cg, chains), kWinogradLanes) * kWinogradLanes : cg;
    span = raw && !whole ? depth : vectors * W;
    v_row = span;
    // Rows that are a multiple of 2 KiB apart would share a few sets of the first cache.
    if (v_row * sizeof(T) % 2048 == 0) v_row += kLine;
    const int64_t spans = ceil_div(vectors * W, span);
    const int64_t tile_bytes = points * (spans * v_row + panel * kWinogradLanes) * static_cast<int64_t>(sizeof(T));
    u_point = raw ? apart(depth * kWinogradLanes) : cg * kWinogradLanes;
    u_block = weights * u_point;
    const bool large = weight_bytes > kCachedWeightBytes;
    const int64_t kernel_bytes = wide_cut ? kKernelBlockBytes : 2 * kKernelBlockBytes;
    const int64_t bytes = raw && !whole ? kernel_bytes : large ? kLargeBlockBytes : kBlockBytes;
    const int64_t most = most_of(least(bytes / tile_bytes, kMostTiles), 12);
    shared = threads > 1 && tiles < kSharedTiles * threads && blocks * p.groups > 1;
    repeated = shared && threads <= kRepeatingThreads;
    if (shared) {
      count = ceil_div(tiles, most);
      divide_outputs(p.groups, threads);
    } else {
      count = ceil_div(tiles, most);
      if (count > 1 || tiles >= kSharedTiles * threads) count = ceil_div(count, threads) * threads;
    }
    count = least(count, tiles);
    block = ceil_div(tiles, count);
    count = ceil_div(tiles, block);
    v_point = apart(block * v_row);
    v_span = points * v_point;
    v_size = spans * v_span;
    m_point = apart(block * panel * kWinogradLanes);
    strip = (least(block, columns) - 1) * m * p.stride + patch;
  }

 private:
  // Panels so narrow that all threads have work.
  void divide_outputs(int64_t groups, int threads) {
    int64_t best = -1;
    for (int64_t width = panel; width > 0; --width) {
      const int64_t parts = ceil_div(blocks, width), rounds = ceil_div(groups * parts, threads);
      const int64_t cost = rounds * ceil_div(blocks, parts);
      if (best >= 0 && cost >= best) continue;
      best = cost;
      panel = ceil_div(blocks, parts);
      panels = parts;
    }
  }

  // An odd number of cache lines, so that the points of one tile fall into different sets.
  static int64_t apart(int64_t elements) {
    const int64_t lines = ceil_div(elements, kLine);
    return (lines + (lines % 2 == 0 ? 1 : 0)) * kLine;
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
