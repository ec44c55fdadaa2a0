// One function in several builds, one per instruction set: which of them to call. Not for files built per ISA.
#pragma once
#include <cstddef>
#include <initializer_list>

#include "common/cpu_info.h"

#if defined(__x86_64__) || defined(_M_X64)
#define REPKERN_BUILDS(function) scalar::function, avx2::function, avx512::function
#else
#define REPKERN_BUILDS(function) scalar::function, scalar::function, scalar::function
#endif

namespace repkern {

// The build in use: `chosen_build(REPKERN_BUILDS(f))(arguments)`.
template <class Function>
Function* chosen_build(Function* scalar, Function* avx2, Function* avx512) {
  switch (isa_used()) {
    case Isa::amx:
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return scalar;
  }
}

// The largest size any build that this machine can run asks for: the choice may change between asking and running.
template <class Function, class... Arguments>
size_t largest_size(Function* scalar, Function* avx2, Function* avx512, const Arguments&... arguments) {
  size_t size = scalar(arguments...);
  for (Isa isa : {Isa::avx2, Isa::avx512}) {
    if (isa > isa_found()) break;
    const size_t here = (isa == Isa::avx2 ? avx2 : avx512)(arguments...);
    if (here > size) size = here;
  }
  return size;
}

}  // namespace repkern
