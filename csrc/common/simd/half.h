// float -> the bits of a 16-bit type, round to nearest even. Static: every translation unit keeps its own copy, so
// code built for one instruction set is never linked into another.
#pragma once
#include <cstdint>

namespace repkern {

static inline uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

[[maybe_unused]] static inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

[[maybe_unused]] static inline uint16_t half_bits(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the rounded significand in the low bits.
    float shifted;
    __builtin_memcpy(&shifted, &magnitude, sizeof(shifted));
    return static_cast<uint16_t>(sign | (float_bits(shifted + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

}  // namespace repkern
