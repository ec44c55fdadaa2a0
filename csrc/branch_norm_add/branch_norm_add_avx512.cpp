#include "common/simd/avx512_math.h"
#define REPKERN_ISA_NAMESPACE avx512
#include "branch_norm_add/branch_norm_add_body.h"
