// The loop of a tile product: copies of the next stages run while the current one is multiplied.
#pragma once
#include "common/cuda/copy.cuh"
#include "common/cuda/tile_gemm.cuh"

namespace repkern {

// load(stage, step): issues the copies of a step. a(stage, m, k), b(stage, k, n): the operands of a step, k in [0,
// kDepth). Ends with all threads past a barrier and the shared memory free for something else.
template <int kStages, int kStageElements, int kDepth, class Tile, class Load, class A, class B>
__device__ __forceinline__ void run_pipeline(Tile& tile, typename Tile::Scalar* shared, int steps, Load load, A a,
                                             B b) {
  using T = typename Tile::Scalar;
  tile.clear();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(shared + step * kStageElements, step);
    copy_commit();
  }
  int current = 0, next = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();  // this stage has arrived, and everybody has left the one that is loaded next
    if (step + kStages - 1 < steps) load(shared + next * kStageElements, step + kStages - 1);
    copy_commit();
    const T* stage = shared + current * kStageElements;
#pragma unroll 1  // one slab fills the issue slots; more only cost registers
    for (int k0 = 0; k0 < kDepth; k0 += kSlab) {
      tile.step([&](int m, int k) { return a(stage, m, k0 + k); }, [&](int k, int n) { return b(stage, k0 + k, n); });
    }
    current = current + 1 == kStages ? 0 : current + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
  __syncthreads();
}

}  // namespace repkern
