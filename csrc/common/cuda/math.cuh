// Which arithmetic a call uses.
#pragma once
#include <cstdlib>
#include <cstring>

#include "common/cuda/tile_gemm.cuh"

namespace repkern {

enum class Math { compensated, tf32, fma };

// Strict fp32 is error-compensated TF32 on the tensor cores; REPKERN_CUDA_FP32=ffma takes plain multiply-adds instead.
inline Math choose_math(int math) {
  if (math == 1) return Math::tf32;
  const char* wanted = std::getenv("REPKERN_CUDA_FP32");
  return wanted != nullptr && std::strcmp(wanted, "ffma") == 0 ? Math::fma : Math::compensated;
}

// call(tile type) for the dtype and the arithmetic.
template <class Call>
Status with_tile(DType dtype, int math, Call call) {
  if (dtype == DType::f64) return call(FmaTile<double>());
  if (dtype != DType::f32) return "the parameters must be float32 or float64";
  switch (choose_math(math)) {
    case Math::tf32:
      return call(TensorTile<false>());
    case Math::fma:
      return call(FmaTile<float>());
    default:
      return call(TensorTile<true>());
  }
}

}  // namespace repkern
