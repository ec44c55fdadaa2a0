// Writes a value in an output type chosen at run time.
#pragma once
#include "common/cuda/launch.cuh"

namespace repkern {

template <class T>
__device__ __forceinline__ void store_as(void* to, size_t at, T value, DType dtype) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(to)[at] = static_cast<float>(value);
      break;
    case DType::f64:
      static_cast<double*>(to)[at] = static_cast<double>(value);
      break;
    case DType::bf16:
      static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(static_cast<float>(value));
      break;
    case DType::f16:
      static_cast<__half*>(to)[at] = __float2half_rn(static_cast<float>(value));
      break;
  }
}

}  // namespace repkern
