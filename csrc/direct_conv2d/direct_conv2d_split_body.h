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

// to[0 .. 32), to[apart ..), to[2 apart ..) = the parts of a and b, where `mask` says so.
static inline void store_parts(__m512 a, __m512 b, uint16_t* to, int64_t apart, __mmask32 mask) {
  for (int part = 0; part < kParts; ++part) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(b, a);
    _mm512_mask_storeu_epi16(to + part * apart, mask, reinterpret_cast<__m512i>(rounded));
    if (part + 1 == kParts) break;
    a = _mm512_sub_ps(a, widened(rounded, 0));
    b = _mm512_sub_ps(b, widened(rounded, 1));
  }
}

static inline __mmask32 first_of_32(int64_t n) { return n < 32 ? (__mmask32(1) << n) - 1 : ~__mmask32(0); }

// The parts of n numbers side by side.
static inline void split_numbers(const float* from, int64_t n, uint16_t* to, int64_t apart) {
  using V = Vec<float>;
  int64_t j = 0;
  for (; j + kDepth <= n; j += kDepth)
    store_parts(V::load(from + j), V::load(from + j + 16), to + j, apart, ~__mmask32(0));
  if (j == n) return;
  const int64_t left = n - j;
  const __m512 b = left > 16 ? V::load_n(from + j + 16, left - 16) : V::zero();
  store_parts(V::load_n(from + j, left), b, to + j, apart, first_of_32(left));
}

static inline void clear_parts(int64_t n, uint16_t* to, int64_t apart) {
  for (int part = 0; part < kParts; ++part) std::memset(to + part * apart, 0, static_cast<size_t>(n) * 2);
}

// One operand of a product: where block b of a part lies for tiles of 16 pixels, or of 16 outputs.
struct Pixels {
  const uint16_t* at;      // of part 0 and block 0, of the first pixel
  int64_t step, part;      // elements from pixel to pixel, from part to part
  const int32_t* offsets;  // of a block, in elements
};
// `ahead`: weights wanted later; `lines` of 64 bytes for each 16 outputs are asked for with every block of products.
struct Weights {
  const uint16_t* at;    // [blocks][3][512]
  int64_t output_block;  // elements from 16 outputs to the next
  const uint16_t* ahead;
  int64_t lines;

  template <int kColumns>
  void ask(int64_t block) const {
    const uint16_t* from = ahead + block * lines * 32;
    for (int64_t line = 0; line < lines; ++line, from += 32) {
      __builtin_prefetch(from, 0, 2);
      if constexpr (kColumns > 1) __builtin_prefetch(from + output_block, 0, 2);
    }
  }
};

// kRows x kColumns tiles of sums, each of which takes its products in the same order whatever kRows is.
template <int kRows, int kColumns>
struct TileProduct;

// Two columns: pixels in tiles 4 and 5, weights in 6 and 7; one operand changes from product to product.
template <int kRows>
struct TileProduct<kRows, 2> {
  static void multiply() {
    add_product<0, 4, 6>();
    add_product<1, 4, 7>();
    if constexpr (kRows > 1) add_product<2, 5, 6>();
    if constexpr (kRows > 1) add_product<3, 5, 7>();
  }

  static void left(const uint16_t* at, int64_t step) {
    load_tile<4>(at, 2 * step);
    if constexpr (kRows > 1) load_tile<5>(at + kTileRows * step, 2 * step);
  }

  static void right(const uint16_t* at, int64_t output_block) {
    load_tile<6>(at, 64);
    load_tile<7>(at + output_block, 64);
  }

  static void add_block(const uint16_t* high, int64_t step, int64_t part, const uint16_t* u, int64_t output_block) {
    constexpr int64_t tile = kTileRows * kDepth;
    left(high + 2 * part, step);
    right(u, output_block);
    multiply();
    left(high, step);
    multiply();
    right(u + 2 * tile, output_block);
    multiply();
    right(u + tile, output_block);
    multiply();
    left(high + part, step);
    multiply();
    right(u, output_block);
    multiply();
  }
};

// One column: the weights in tiles 5 to 7, the pixels one after the other in 4.
template <int kRows>
struct TileProduct<kRows, 1> {
  template <int kRow, int kWeights>
  static void multiply(const uint16_t* at, int64_t step) {
    load_tile<4>(at + kRow * kTileRows * step, 2 * step);
    add_product<kRow, 4, 5>();
    if constexpr (kWeights > 1) add_product<kRow, 4, 6>();
    if constexpr (kWeights > 2) add_product<kRow, 4, 7>();
  }

  template <int kWeights>
  static void all_rows(const uint16_t* at, int64_t step) {
    multiply<0, kWeights>(at, step);
    if constexpr (kRows > 1) multiply<1, kWeights>(at, step);
    if constexpr (kRows > 2) multiply<2, kWeights>(at, step);
    if constexpr (kRows > 3) multiply<3, kWeights>(at, step);
  }

  static void add_block(const uint16_t* high, int64_t step, int64_t part, const uint16_t* u, int64_t) {
    constexpr int64_t tile = kTileRows * kDepth;
    load_tile<5>(u, 64);
    load_tile<6>(u + tile, 64);
    load_tile<7>(u + 2 * tile, 64);
    all_rows<3>(high, step);
    all_rows<2>(high + part, step);
    all_rows<1>(high + 2 * part, step);
  }
};

// sums (rows `pitch` apart) of the blocks [begin, end); `add`: to what is there.
template <int kRows, int kColumns>
static void tile_product(const Pixels& x, const Weights& w, int64_t begin, int64_t end, bool add, float* sums,
                         int64_t pitch) {
  using V = Vec<float>;
  clear_tile<0>();
  clear_tile<1>();
  clear_tile<2>();
  clear_tile<3>();
  for (int64_t b = begin; b < end; ++b) {
    w.ask<kColumns>(b - begin);
    TileProduct<kRows, kColumns>::add_block(x.at + x.offsets[b], x.step, x.part,
                                            w.at + b * kParts * kTileRows * kDepth, w.output_block);
  }
  alignas(64) float scratch[4 * kTileRows * 16];
  constexpr int kTiles = kRows * kColumns;
  const auto place = [=](int tile) { return sums + tile / kColumns * kTileRows * pitch + tile % kColumns * 16; };
  const int64_t row = add ? 64 : 4 * pitch;
  store_tile<0>(add ? scratch : place(0), row);
  if constexpr (kTiles > 1) store_tile<1>(add ? scratch + 256 : place(1), row);
  if constexpr (kTiles > 2) store_tile<2>(add ? scratch + 512 : place(2), row);
  if constexpr (kTiles > 3) store_tile<3>(add ? scratch + 768 : place(3), row);
  if (!add) return;
  for (int tile = 0; tile < kTiles; ++tile) {
    float* to = place(tile);
    for (int j = 0; j < kTileRows; ++j, to += pitch)
      V::store(to, V::add(V::load(to), V::load(scratch + tile * 256 + j * 16)));
  }
}

}  // namespace amx
}  // namespace repkern
