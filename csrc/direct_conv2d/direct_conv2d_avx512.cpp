#define REPKERN_ISA_NAMESPACE avx512
#include "common/simd/avx512_math.h"
#include "direct_conv2d/direct_conv2d_body.h"
