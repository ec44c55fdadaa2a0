#define REPKERN_ISA_NAMESPACE avx2
#include "common/simd/avx2_math.h"
#include "winograd_conv2d/winograd_conv2d_body.h"
