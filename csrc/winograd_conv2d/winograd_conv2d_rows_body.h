// Rows of transformed inputs, a constant step apart, that a micro-kernel reads an element at a time.
#pragma once
#include <cstdint>

#include "common/always_inline.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// Every third row has a pointer of its own; the address of one between is that and the step, once or twice, which x86
// adds for nothing. Left to itself, GCC gives each of up to 24 rows a pointer, more than there are registers.
template <class T, int NT>
class TileRows {
 public:
  TileRows(const T* first, int64_t step) : step_(step) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) at_[g] = first + 3 * g * step;
  }

  REPKERN_ALWAYS_INLINE const T& operator[](int t) const { return at_[t / 3][t % 3 * step_]; }

  // The next element of every row.
  REPKERN_ALWAYS_INLINE void advance() {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      ++at_[g];
#if defined(__x86_64__)
      asm("" : "+r"(at_[g]));  // what it is stays unknown, so that it stays where it is
#endif
    }
  }

 private:
  static constexpr int kGroups = (NT + 2) / 3;
  const T* at_[kGroups];
  int64_t step_;
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
