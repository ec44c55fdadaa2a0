#define REPKERN_ISA_NAMESPACE avx512
#include "common/simd/avx512_math.h"
#include "winograd_conv2d/winograd_conv2d_body.h"
