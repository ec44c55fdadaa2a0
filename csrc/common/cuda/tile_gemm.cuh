// A 64 x 128 tile of a matrix product, computed by 128 threads from operands in shared memory.
// TF32 tensor cores (plain, or error-compensated to fp32 accuracy) or fused multiply-adds (fp32, fp64).
#pragma once
#include "common/cuda/mma.cuh"

namespace repkern {

constexpr int kTileM = 64, kTileN = 128, kTileThreads = 128;
constexpr int kSlab = 8;           // the depth one step of a tile takes
constexpr int kRowM = kTileM + 8;  // row lengths in shared memory: 8 banks from row to row, so that the
constexpr int kRowN = kTileN + 8;  //   8 x 4 elements of a fragment lie in 32 different banks
constexpr int kRowC = kTileN + 9;  // the staged result; 9 positions of a 3x3 kernel continue in the next row

// x = high + low + error, |error| <= 2^-23 |x|. `low` is left to be cut to TF32 by the tensor core: exactly one bit is
// lost. An infinite x has no finite remainder: products with it are NaN, where multiply-adds would give an infinity.
struct SplitTf32 {
  uint32_t high, low;
};
__device__ __forceinline__ SplitTf32 split_tf32(float x) {
  const uint32_t high = (__float_as_uint(x) + 0x1000u) & 0xFFFFE000u;
  return {high, __float_as_uint(x - __uint_as_float(high))};
}

// Tensor cores. Warps 2 x 2, each 32 x 64. With kCompensated, three products stand for one (a_low·b_low is below
// fp32 rounding) and every slab is added in fp32 outside of the tensor core, whose own adder truncates
// (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores").
template <bool kCompensated>
struct TensorTile {
  using Scalar = float;
  static constexpr int kRows = 2, kColumns = 8;  // 16 x 8 pieces of a warp's part
  float sum[kRows][kColumns][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[r][c][i] = 0.0f;
  }

  // a(m, k) and b(k, n): one slab, k in [0, 8).
  template <class A, class B>
  __device__ __forceinline__ void step(A a, B b) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, in_group = lane % 4;
    const int m0 = warp / 2 * 32 + group, n0 = warp % 2 * 64 + group;
    uint32_t a_high[kRows][4], a_low[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = a(m0 + r * 16 + i % 2 * 8, in_group + i / 2 * 4);
        if constexpr (kCompensated) {
          const SplitTf32 split = split_tf32(x);
          a_high[r][i] = split.high;
          a_low[r][i] = split.low;
        } else {
          a_high[r][i] = to_tf32(x);
        }
      }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      uint32_t b_high[2], b_low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float x = b(in_group + i * 4, n0 + c * 8);
        if constexpr (kCompensated) {
          const SplitTf32 split = split_tf32(x);
          b_high[i] = split.high;
          b_low[i] = split.low;
        } else {
          b_high[i] = to_tf32(x);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kCompensated) {
          float slab[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          mma_m16n8k8_tf32(slab, a_low[r], b_high);
          mma_m16n8k8_tf32(slab, a_high[r], b_low);
          mma_m16n8k8_tf32(slab, a_high[r], b_high);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[r][c][i] += slab[i];
        } else {
          mma_m16n8k8_tf32(sum[r][c], a_high[r], b_high);
        }
      }
    }
  }

  // f(m, n, value) for every element this thread holds.
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, in_group = lane % 4;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          f(warp / 2 * 32 + r * 16 + i / 2 * 8 + group, warp % 2 * 64 + c * 8 + in_group * 2 + i % 2, sum[r][c][i]);
  }
};

// Fused multiply-adds. Threads 8 x 16, each 8 x 8 elements: rows next to each other, columns 16 apart.
template <class T>
struct FmaTile {
  using Scalar = T;
  T sum[8][8];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[i][j] = T(0);
  }

  template <class A, class B>
  __device__ __forceinline__ void step(A a, B b) {
    [[maybe_unused]] constexpr int kUnroll = sizeof(T) == 4 ? kSlab : 2;
    const int row = threadIdx.x / 16 * 8, column = threadIdx.x % 16;
#pragma unroll kUnroll
    for (int k = 0; k < kSlab; ++k) {
      T left[8], right[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) left[i] = a(row + i, k);
#pragma unroll
      for (int j = 0; j < 8; ++j) right[j] = b(k, column + 16 * j);
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] += left[i] * right[j];
    }
  }

  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    const int row = threadIdx.x / 16 * 8, column = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) f(row + i, column + 16 * j, sum[i][j]);
  }
};

}  // namespace repkern
