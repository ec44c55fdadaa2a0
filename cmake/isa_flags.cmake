# The one table: file suffix -> compiler flags. A file <op>_<isa>.cpp is built with these and nothing else is.
set(REPKERN_ISA_SUFFIXES "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(REPKERN_ISA_SUFFIXES avx2 avx512 amx)
  set(REPKERN_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
  # GCC takes the deliberately undefined registers of its own AVX-512 header for a mistake.
  set(REPKERN_ISA_FLAGS_avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
                               -Wno-maybe-uninitialized -Wno-uninitialized)
  set(REPKERN_ISA_FLAGS_amx ${REPKERN_ISA_FLAGS_avx512} -mavx512bf16 -mamx-tile -mamx-bf16)
endif()
