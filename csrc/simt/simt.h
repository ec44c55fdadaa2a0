// Included instead of the CUDA headers when a .cu file is built by the host compiler.
#pragma once
#include <cmath>
#include <type_traits>

#include "executor.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define threadIdx (simt::current->index)
#define blockIdx (simt::launch_state.block_index)
#define blockDim (simt::launch_state.block)
#define gridDim (simt::launch_state.grid)

#define SIMT_PLACE(what) (simt::Place{what, __FILE__, __LINE__})
#define __syncthreads() simt::block_barrier(SIMT_PLACE("__syncthreads"))
#define __syncwarp(...) simt::warp_barrier(simt::mask_or_all(__VA_ARGS__), SIMT_PLACE("__syncwarp"))
#define __shfl_sync(...) simt::shfl(SIMT_PLACE("__shfl_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) simt::shfl_xor(SIMT_PLACE("__shfl_xor_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) simt::shfl_down(SIMT_PLACE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) simt::shfl_up(SIMT_PLACE("__shfl_up_sync"), __VA_ARGS__)
#define __ballot_sync(...) simt::ballot(SIMT_PLACE("__ballot_sync"), __VA_ARGS__)
#define __any_sync(...) simt::any(SIMT_PLACE("__any_sync"), __VA_ARGS__)
#define __threadfence()
#define __all_sync(...) simt::all(SIMT_PLACE("__all_sync"), __VA_ARGS__)

namespace simt {
inline unsigned mask_or_all(unsigned mask = 0xFFFFFFFFu) { return mask; }
}  // namespace simt

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* at, T value) {
  return simt::atomic(at, [&](T old) { return old + value; });
}
template <class T>
T atomicMax(T* at, T value) {
  return simt::atomic(at, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* at, T value) {
  return simt::atomic(at, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicExch(T* at, T value) {
  return simt::atomic(at, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
  return simt::atomic(at, [&](T old) { return old == expected ? value : old; });
}

inline float __int_as_float(int v) { return simt::bits<float>(v); }
inline int __float_as_int(float v) { return simt::bits<int>(v); }
inline float __uint_as_float(unsigned v) { return simt::bits<float>(v); }
inline unsigned __float_as_uint(float v) { return simt::bits<unsigned>(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
