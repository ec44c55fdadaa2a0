// The AVX-512 vectors once more for files built for AMX, in a namespace of their own: their code, built with more
// flags, must never be linked into what runs on CPUs without it. And tiles, their registers numbered by templates.
#pragma once
#include <immintrin.h>

#include <cstring>

#define avx512 amx
#include "common/simd/avx512_math.h"
#undef avx512

namespace repkern {
namespace amx {

// While one exists, the eight tiles of this thread are 16 rows of 64 bytes. Released at the end, or every switch
// between threads would save 8 KiB.
class TileUse {
 public:
  TileUse() {
    alignas(64) unsigned char layout[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      layout[16 + 2 * tile] = 64;
      layout[48 + tile] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(layout));
  }
  ~TileUse() { asm volatile("tilerelease" ::: "memory"); }
  TileUse(const TileUse&) = delete;
  TileUse& operator=(const TileUse&) = delete;
};

// `stride`: bytes from row to row.
template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile));
}

template <int kTile>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// sum [16][16] += left [16][32] right [32][16], bfloat16 into float; right as [16][16][2].
template <int kSum, int kLeft, int kRight>
inline void add_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

}  // namespace amx
}  // namespace repkern
