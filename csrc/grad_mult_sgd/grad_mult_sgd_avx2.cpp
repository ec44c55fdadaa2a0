#include "common/simd/avx2_math.h"
#define REPKERN_ISA_NAMESPACE avx2
#include "grad_mult_sgd/grad_mult_sgd_body.h"
