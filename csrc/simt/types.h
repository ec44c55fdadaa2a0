// The vector and half-precision types of CUDA, as far as the kernels use them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

#define SIMT_VECTOR_TYPES(type, name)                                                         \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SIMT_VECTOR_TYPES(float, float)
SIMT_VECTOR_TYPES(double, double)
SIMT_VECTOR_TYPES(int, int)
SIMT_VECTOR_TYPES(unsigned, uint)
#undef SIMT_VECTOR_TYPES

namespace simt {

template <class To, class From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To answer;
  std::memcpy(&answer, &value, sizeof answer);
  return answer;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t bfloat16_of(float value) {
  const uint32_t u = bits<uint32_t>(value);
  if (value != value) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

inline float float_of_bfloat16(uint16_t value) { return bits<float>(static_cast<uint32_t>(value) << 16); }

inline uint16_t half_of(float value) {
  const uint32_t u = bits<uint32_t>(value), sign = (u >> 16) & 0x8000, magnitude = u & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                                              // below 2^-14: subnormal, steps of 2^-24
    const float scaled = bits<float>(magnitude) * 16777216.0f;
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(scaled)));
  }
  const uint32_t rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

inline float float_of_half(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16, exponent = (value >> 10) & 31,
                 fraction = value & 0x3FF;
  if (exponent == 31) return bits<float>(sign | 0x7F800000 | fraction << 13);
  if (exponent == 0) return bits<float>(sign | bits<uint32_t>(static_cast<float>(fraction) / 16777216.0f));
  return bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

}  // namespace simt

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __half __float2half_rn(float v) { return {simt::half_of(v)}; }
inline __half __float2half(float v) { return {simt::half_of(v)}; }
inline float __half2float(__half v) { return simt::float_of_half(v.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {simt::bfloat16_of(v)}; }
inline __nv_bfloat16 __float2bfloat16(float v) { return {simt::bfloat16_of(v)}; }
inline float __bfloat162float(__nv_bfloat16 v) { return simt::float_of_bfloat16(v.bits); }
// CUDA goes from double to half in one rounding for half and through float for bfloat16; the kernels do the same.
inline __half __double2half(double v) { return {simt::half_of(static_cast<float>(v))}; }
inline __nv_bfloat16 __double2bfloat16(double v) { return {simt::bfloat16_of(static_cast<float>(v))}; }
