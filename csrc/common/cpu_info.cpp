#include "common/cpu_info.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__linux__)
#include <unistd.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace repkern {
namespace {

// Linux gives tiles to a process that asks for them, once and for all of its threads.
[[maybe_unused]] bool tiles_granted() {
#if defined(__linux__) && defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if ((d & kBf16) == 0 || (d & kTile) == 0) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  constexpr unsigned kVectorBf16 = 1u << 5;
  if ((a & kVectorBf16) == 0) return false;
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return tiles_granted() ? Isa::amx : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa initial() {
  const char* wanted = std::getenv("REPKERN_ISA");
  if (wanted != nullptr) {
    for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::amx}) {
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

int64_t level2_bytes() {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return found;
#endif
  return int64_t{1} << 20;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

}  // namespace repkern
