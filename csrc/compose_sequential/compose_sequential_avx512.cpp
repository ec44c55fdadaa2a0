#define REPKERN_ISA_NAMESPACE avx512
#include "common/simd/avx512.h"
#include "compose_sequential/compose_sequential_body.h"
