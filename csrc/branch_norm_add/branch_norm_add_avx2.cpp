#include "common/simd/avx2_math.h"
#define REPKERN_ISA_NAMESPACE avx2
#include "branch_norm_add/branch_norm_add_body.h"
