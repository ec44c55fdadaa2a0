#include "common/simd/avx512_math.h"
#define REPKERN_ISA_NAMESPACE avx512
#include "grad_mult_adamw/grad_mult_adamw_body.h"
