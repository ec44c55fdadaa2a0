// What lets one .cu file be built by nvcc for the GPU and by g++ for the host executor (csrc/simt).
#pragma once
#include <cstddef>

#include "common/types.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <utility>
#else
#include "simt/simt.h"
#endif

// `T* name`: the block's dynamic shared memory. The only kind kernels use: the host executor can guard its bounds.
#ifdef __CUDACC__
#define RK_DYN_SMEM(T, name)                                          \
  extern __shared__ __align__(128) unsigned char rk_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(rk_dynamic_shared)
#else
#define RK_DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(simt::launch_state.shared.get())
#endif

// A Status: starts the kernel on the stream, or runs it on the host.
#define RK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::repkern::launch(#kernel, kernel, grid, block, shared, stream, __VA_ARGS__)

namespace repkern {

#ifdef __CUDACC__
constexpr size_t kSharedWithoutAsking = 48 << 10;

inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  (void)cudaGetLastError();  // the error was reported; the next call must not see it again
  return cudaGetErrorString(error);
}

// More than 48 KB must be asked for; and several blocks of a size only fit if the driver gives the L1 cache up to them.
inline Status ask_for_shared(const void* kernel, size_t shared) {
  if (shared > kSharedWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return status_of(error);
  }
  if (shared <= kSharedWithoutAsking / 2) return nullptr;
  return status_of(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
}

template <class... Parameters, class... Arguments>
Status launch(const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void* stream,
              Arguments&&... arguments) {
  if (Status problem = ask_for_shared(reinterpret_cast<const void*>(kernel), shared)) return problem;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return status_of(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}
#else
template <class... Parameters, class... Arguments>
Status launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void*,
              const Arguments&... arguments) {
  return simt::launch(name, grid, block, shared, [&] { kernel(arguments...); });
}
#endif

}  // namespace repkern
