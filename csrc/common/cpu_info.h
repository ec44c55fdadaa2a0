// Which instruction set the CPU kernels use (found at run time, forced by REPKERN_ISA), and the cache they work in.
#pragma once
#include <cstdint>

namespace repkern {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, amx = 3 };
// amx: AVX-512, bfloat16, and tiles that the kernel lets this process use. Code written for avx512 runs there.

// The best this machine can run.
Isa isa_found();
// The one in use: isa_found(), or what REPKERN_ISA (scalar | avx2 | avx512 | amx) or set_isa() asks for, if the machine
// can run it.
Isa isa_used();
// Null on success, else why it cannot be used.
const char* set_isa(Isa isa);
const char* isa_name(Isa isa);
// Of a core's second cache; 1 MiB where the system does not say.
int64_t level2_bytes();

}  // namespace repkern
