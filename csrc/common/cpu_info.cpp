#include "common/cpu_info.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace repkern {
namespace {

Isa detect() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa initial() {
  const char* wanted = std::getenv("REPKERN_ISA");
  if (wanted != nullptr) {
    for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
      if (std::strcmp(wanted, isa_name(isa)) == 0 && isa <= isa_found()) return isa;
    }
  }
  return isa_found();
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

Isa isa_found() {
  static const Isa found = detect();
  return found;
}

Isa isa_used() { return current().load(std::memory_order_relaxed); }

const char* set_isa(Isa isa) {
  if (isa > isa_found()) return "this CPU lacks that instruction set";
  current().store(isa, std::memory_order_relaxed);
  return nullptr;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

}  // namespace repkern
