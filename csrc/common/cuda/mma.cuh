// Tensor-core products of one warp, and the rounding their operands need. On the host: the same fragments, emulated.
#pragma once
#include "common/cuda/launch.cuh"

namespace repkern {

// The bits of x rounded to TF32 (10 fraction bits, ties away from zero).
__device__ __forceinline__ uint32_t to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t answer;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(answer) : "f"(x));
  return answer;
#else
  const uint32_t u = simt::bits<uint32_t>(x);
  const bool finite = (u & 0x7F800000u) != 0x7F800000u;
  return (finite ? u + 0x1000u : u) & 0xFFFFE000u;
#endif
}

#ifndef __CUDACC__
namespace emulated {

struct Fragments {
  uint32_t a[4], b[2];
};

// The unit ignores the 13 lowest bits of a TF32 operand: an operand that was not rounded is cut off.
inline float tf32_operand(uint32_t bits) { return simt::bits<float>(bits & 0xFFFFE000u); }
inline float bf16_operand(uint32_t pair, int half) {
  return simt::float_of_bfloat16(static_cast<uint16_t>(pair >> (16 * half)));
}

// d[row][column] of this lane's four outputs; product(a registers of a lane, b registers of a lane) adds up 1/4 of K.
template <class Product>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Place place, Product product) {
  Fragments mine;
  for (int i = 0; i < 4; ++i) mine.a[i] = a[i];
  for (int i = 0; i < 2; ++i) mine.b[i] = b[i];
  const unsigned group = simt::lane() / 4, in_group = simt::lane() % 4;
  simt::exchange(0xFFFFFFFFu, mine, place, [&](auto at) {
    for (unsigned quarter = 0; quarter < 4; ++quarter) {
      const Fragments rows = at(group * 4 + quarter);
      for (unsigned column = 0; column < 2; ++column) {
        const Fragments columns = at((2 * in_group + column) * 4 + quarter);
        for (int upper = 0; upper < 2; ++upper) product(d[2 * upper + column], rows.a + upper, columns.b);
      }
    }
    return 0;
  });
}

}  // namespace emulated
#endif

// d += a·b, 16x8x8, TF32 operands. With g = lane / 4, t = lane % 4:
// a = (g,t) (g+8,t) (g,t+4) (g+8,t+4); b = (t,g) (t+4,g); d = (g,2t) (g,2t+1) (g+8,2t) (g+8,2t+1).
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulated::mma(d, a, b, SIMT_PLACE("mma_m16n8k8_tf32"), [](float& sum, const uint32_t* rows, const uint32_t* columns) {
    for (int i = 0; i < 2; ++i) sum += emulated::tf32_operand(rows[2 * i]) * emulated::tf32_operand(columns[i]);
  });
#endif
}

// d += a·b, 16x8x16, bfloat16 operands, two a register (the lower k in the lower half):
// a = (g,2t..) (g+8,2t..) (g,2t+8..) (g+8,2t+8..); b = (2t..,g) (2t+8..,g); d as above.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulated::mma(d, a, b, SIMT_PLACE("mma_m16n8k16_bf16"),
                [](float& sum, const uint32_t* rows, const uint32_t* columns) {
                  for (int i = 0; i < 2; ++i)
                    for (int half = 0; half < 2; ++half)
                      sum += emulated::bf16_operand(rows[2 * i], half) * emulated::bf16_operand(columns[i], half);
                });
#endif
}

}  // namespace repkern
