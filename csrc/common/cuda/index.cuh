// Small integers: division by a number known at run time only, rounding, warp sums.
#pragma once
#include "common/cuda/launch.cuh"

namespace repkern {

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// n / value and n % value without a division, for n < 2^16 and value < 2^16.
struct Divisor {
  unsigned value, magic;

  __device__ __forceinline__ explicit Divisor(unsigned v) : value(v), magic(0xFFFFFFFFu / v + 1u) {}
  __device__ __forceinline__ unsigned divide(unsigned n) const { return value == 1 ? n : __umulhi(n, magic); }
};

// The same for any n < 2^31; made on the host.
struct WideDivisor {
  unsigned value, magic, shift;

  WideDivisor() = default;
  explicit WideDivisor(unsigned v) : value(v), shift(0) {
    while ((uint64_t(1) << shift) < v) ++shift;
    magic = static_cast<unsigned>((uint64_t(1) << 32) * ((uint64_t(1) << shift) - v) / v + 1);
  }
  __device__ __forceinline__ unsigned divide(unsigned n) const { return (__umulhi(n, magic) + n) >> shift; }
};

template <class T>
__device__ __forceinline__ T warp_sum(T value, int width = 32) {
  for (int lanes = width / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
  return value;
}

}  // namespace repkern
