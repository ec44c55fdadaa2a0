// Types every op shares. No torch header, no Python.
#pragma once
#include <cstddef>
#include <cstdint>

namespace repkern {

// What a host function returns: null on success, else a text with static lifetime.
using Status = const char*;

// The codes are fixed: repkern/ops/_native.py passes them as integers.
enum class DType : int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

inline size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 8;
    case DType::f32:
      return 4;
    default:
      return 2;
  }
}

}  // namespace repkern
