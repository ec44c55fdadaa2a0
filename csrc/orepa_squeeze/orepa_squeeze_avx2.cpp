#define REPKERN_ISA_NAMESPACE avx2
#include "common/simd/avx2.h"
#include "orepa_squeeze/orepa_squeeze_body.h"
