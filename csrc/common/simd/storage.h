// How numbers lie in memory, and in what type one computes with them.
#pragma once
#include <cstdint>

#include "common/simd/half.h"
#include "common/types.h"

namespace repkern {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class X>
struct Computing {
  using Type = float;
};
template <>
struct Computing<double> {
  using Type = double;
};

[[maybe_unused]] static inline float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

[[maybe_unused]] static inline float bfloat16_value(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

[[maybe_unused]] static inline float half_value(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return sign != 0 ? -subnormal : subnormal;
}

[[maybe_unused]] static inline double value_at(const void* from, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f64:
      return static_cast<const double*>(from)[at];
    case DType::f32:
      return static_cast<const float*>(from)[at];
    case DType::bf16:
      return bfloat16_value(static_cast<const uint16_t*>(from)[at]);
    default:
      return half_value(static_cast<const uint16_t*>(from)[at]);
  }
}

// Like torch, double goes to 16 bits through float.
[[maybe_unused]] static inline void set_value_at(void* to, DType dtype, int64_t at, double value) {
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(to)[at] = value;
      break;
    case DType::f32:
      static_cast<float*>(to)[at] = static_cast<float>(value);
      break;
    case DType::bf16:
      static_cast<uint16_t*>(to)[at] = bfloat16_bits(static_cast<float>(value));
      break;
    default:
      static_cast<uint16_t*>(to)[at] = half_bits(static_cast<float>(value));
  }
}

}  // namespace repkern
