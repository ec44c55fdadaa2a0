#define REPKERN_ISA_NAMESPACE avx2
#include "common/simd/avx2.h"
#include "compose_sequential/compose_sequential_body.h"
