#define REPKERN_ISA_NAMESPACE avx512
#include "common/simd/avx512.h"
#include "orepa_squeeze/orepa_squeeze_body.h"
