// float32 as three bfloat16 whose sum it is, and products of such numbers on the tile unit: the six of nine that
// float32 can hold. Tiles 0 to 3 are sums, 4 and 5 pixels, 6 and 7 weights.
#pragma once
#include "common/simd/amx.h"

namespace repkern {
namespace amx {

constexpr int64_t kTileRows = 16, kDepth = 32, kParts = 3;

static inline __m512 widened(__m512bh x, int half) {
  const __m512i bits = reinterpret_cast<__m512i>(x);
  const __m256i part = half == 0 ? _mm512_castsi512_si256(bits) : _mm512_extracti64x4_epi64(bits, 1);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
}

// to[0 .. n), to[apart ..), to[2 apart ..) = the parts of `from`.
static inline void split_numbers(const float* from, int64_t n, uint16_t* to, int64_t apart) {
  using V = Vec<float>;
  for (int64_t j = 0; j < n; j += kDepth) {
    const int64_t left = n - j;
    const __mmask32 mask = left < kDepth ? (__mmask32(1) << left) - 1 : ~__mmask32(0);
    __m512 a = V::load_n(from + j, left), b = left > 16 ? V::load_n(from + j + 16, left - 16) : V::zero();
    for (int part = 0; part < kParts; ++part) {
      const __m512bh rounded = _mm512_cvtne2ps_pbh(b, a);
      _mm512_mask_storeu_epi16(to + part * apart + j, mask, reinterpret_cast<__m512i>(rounded));
      if (part + 1 == kParts) break;
      a = _mm512_sub_ps(a, widened(rounded, 0));
      b = _mm512_sub_ps(b, widened(rounded, 1));
    }
  }
}

// One operand of a product: where block b of a part lies for tiles of 16 pixels, or of 16 outputs.
struct Pixels {
  const uint16_t* at;      // of part 0 and block 0, of the first pixel
  int64_t step, part;      // elements from pixel to pixel, from part to part
  const int32_t* offsets;  // of a block, in elements
};
struct Weights {
  const uint16_t* at;     // [blocks][3][512]
  int64_t output_block;   // elements from 16 outputs to the next
};

// kRows x kColumns tiles of sums. A sum takes only one product in 52 cycles, the unit makes one in 16: a single column
// deals its products to two sets of sums. One row of two columns does not, to give the bits that two rows give.
template <int kRows, int kColumns>
struct TileProduct {
  static constexpr int kTiles = kRows * kColumns, kSets = 3 - kColumns;

  template <int kSet>
  static void multiply() {
    constexpr int first = kSet % kSets * kTiles;
    add_product<first, 4, 6>();
    if constexpr (kColumns > 1) add_product<first + 1, 4, 7>();
    if constexpr (kRows > 1) add_product<first + kColumns, 5, 6>();
    if constexpr (kRows > 1 && kColumns > 1) add_product<first + 3, 5, 7>();
  }

  static void left(const uint16_t* at, int64_t step) {
    load_tile<4>(at, 2 * step);
    if constexpr (kRows > 1) load_tile<5>(at + kTileRows * step, 2 * step);
  }

  static void right(const uint16_t* at, int64_t output_block) {
    load_tile<6>(at, 64);
    if constexpr (kColumns > 1) load_tile<7>(at + output_block, 64);
  }

  // Blocks [begin, end) added up from zero.
  static void sum_up(const Pixels& x, const Weights& w, int64_t begin, int64_t end) {
    constexpr int64_t tile = kTileRows * kDepth;
    clear_tile<0>();
    clear_tile<1>();
    clear_tile<2>();
    clear_tile<3>();
    for (int64_t b = begin; b < end; ++b) {
      const uint16_t* high = x.at + x.offsets[b];
      const uint16_t* u = w.at + b * kParts * tile;
      left(high, x.step);
      right(u, w.output_block);
      multiply<0>();
      right(u + tile, w.output_block);
      multiply<1>();
      left(high + x.part, x.step);
      multiply<2>();
      right(u, w.output_block);
      multiply<3>();
      left(high + 2 * x.part, x.step);
      multiply<4>();
      left(high, x.step);
      right(u + 2 * tile, w.output_block);
      multiply<5>();
    }
  }

  // sums: rows `pitch` apart. `add`: to what is there.
  static void run(const Pixels& x, const Weights& w, int64_t begin, int64_t end, bool add, float* sums, int64_t pitch) {
    using V = Vec<float>;
    sum_up(x, w, begin, end);
    if (kSets == 1 && !add) return store(sums, pitch);
    alignas(64) float scratch[4 * kTileRows * 16];
    store_tile<0>(scratch, 64);
    store_tile<1>(scratch + 256, 64);
    store_tile<2>(scratch + 512, 64);
    store_tile<3>(scratch + 768, 64);
    for (int tile = 0; tile < kTiles; ++tile) {
      float* to = sums + tile / kColumns * kTileRows * pitch + tile % kColumns * 16;
      for (int row = 0; row < kTileRows; ++row, to += pitch) {
        __m512 sum = V::load(scratch + tile * 256 + row * 16);
        for (int set = 1; set < kSets; ++set)
          sum = V::add(sum, V::load(scratch + (set * kTiles + tile) * 256 + row * 16));
        V::store(to, add ? V::add(V::load(to), sum) : sum);
      }
    }
  }

 private:
  static void store(float* sums, int64_t pitch) {
    store_tile<0>(sums, 4 * pitch);
    store_tile<1>(sums + 16, 4 * pitch);
    if constexpr (kRows > 1) {
      store_tile<2>(sums + kTileRows * pitch, 4 * pitch);
      store_tile<3>(sums + kTileRows * pitch + 16, 4 * pitch);
    }
  }
};

}  // namespace amx
}  // namespace repkern
