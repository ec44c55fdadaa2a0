// The portable build of the kernels, and the choice between the builds at run time.
#define REPKERN_ISA_NAMESPACE scalar
#include "common/isa_dispatch.h"
#include "common/simd/scalar_math.h"
#include "direct_conv2d/direct_conv2d_body.h"
#include "direct_conv2d/direct_conv2d_isa.h"

namespace repkern {

bool direct_conv2d_splits_cpu() { return isa_used() == Isa::amx; }

#if defined(__x86_64__) || defined(_M_X64)
size_t direct_conv2d_packed_cpu_workspace(const DirectParams& p, int threads) {
  return p.split ? amx::direct_workspace(p, threads) : largest_size(REPKERN_BUILDS(direct_workspace), p, threads);
}

Status direct_conv2d_packed_cpu(const DirectParams& p, void* workspace, int threads) {
  if (!p.split) return chosen_build(REPKERN_BUILDS(direct_conv))(p, workspace, threads);
  if (isa_found() != Isa::amx) return "split weights need a CPU with AMX";
  return amx::direct_conv(p, workspace, threads);
}
#else
size_t direct_conv2d_packed_cpu_workspace(const DirectParams& p, int threads) {
  return scalar::direct_workspace(p, threads);
}

Status direct_conv2d_packed_cpu(const DirectParams& p, void* workspace, int threads) {
  return p.split ? "split weights need a CPU with AMX" : scalar::direct_conv(p, workspace, threads);
}
#endif

}  // namespace repkern
