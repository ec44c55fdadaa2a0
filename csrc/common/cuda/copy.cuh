// Copies from global to shared memory that run beside the arithmetic (cp.async).
#pragma once
#include "common/cuda/launch.cuh"

namespace repkern {

// kBytes (4, 8 or 16) from `from` to shared memory at `to`; zeros instead when not `valid`: then `from` is not read
// and may point anywhere. Both aligned to kBytes.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async can copy");
#ifdef __CUDACC__
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
#else
  simt::copy_async(to, from, kBytes, valid ? kBytes : 0);
#endif
}

// Closes the group of copies issued since the last call.
__device__ __forceinline__ void copy_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::copy_commit();
#endif
}

// Waits until all but the kNewest latest groups of this thread have arrived. Other threads need a barrier after it.
template <int kNewest>
__device__ __forceinline__ void copy_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
#else
  simt::copy_wait(kNewest);
#endif
}

}  // namespace repkern
