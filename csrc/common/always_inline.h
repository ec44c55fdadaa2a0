// For functions of vector code whose arguments must stay in registers.
#pragma once

#define REPKERN_ALWAYS_INLINE __attribute__((always_inline)) inline
