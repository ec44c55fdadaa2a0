#define REPKERN_ISA_NAMESPACE avx2
#include "common/simd/avx2_math.h"
#include "direct_conv2d/direct_conv2d_body.h"
