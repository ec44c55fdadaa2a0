// Small kernels, one right and the others each with one mistake. `planted <name>` runs one and checks its result.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/cuda/copy.cuh"
#include "common/cuda/launch.cuh"

namespace {

constexpr int kThreads = 96;
constexpr int kBlocks = 3;

enum Mistake {
  correct,
  missing_barrier,
  missing_syncwarp,
  missing_wait,
  misaligned_copy,
  unwritten_shared,
  shared_overrun,
  global_overrun,
  divergent_barrier,
  exited_thread,
  exited_lane,
  divergent_shuffle
};
const char* const kNames[] = {"correct",           "missing_barrier",  "missing_syncwarp", "missing_wait",
                              "misaligned_copy",   "unwritten_shared", "shared_overrun",   "global_overrun",
                              "divergent_barrier", "exited_thread",    "exited_lane",      "divergent_shuffle"};

// out[block][i] = sum over the warp of the block's values reversed, plus the neighbour's value.
__global__ void reverse_and_sum(const float* in, float* out, int mistake) {
  RK_DYN_SMEM(float, shared);  // [kThreads] reversed, [kThreads] neighbours
  const int i = threadIdx.x;
  const float* mine = in + blockIdx.x * kThreads;
  float* neighbours = shared + kThreads;

  repkern::copy_async<4>(neighbours + i, mine + i, true);
  if (mistake == misaligned_copy && i == 3) repkern::copy_async<8>(neighbours + i, mine + i, true);
  repkern::copy_commit();
  if (mistake != missing_wait) repkern::copy_wait<0>();
  if (!(mistake == unwritten_shared && i == 7)) shared[i + (mistake == shared_overrun ? kThreads + 1 : 0)] = mine[i];
  if (mistake == exited_thread && i == 40) return;
  if (mistake == divergent_barrier && i >= 64) {
    __syncthreads();  // line of the second barrier
  } else if (mistake != missing_barrier) {
    __syncthreads();  // line of the first barrier
  }

  float sum = shared[kThreads - 1 - i] + neighbours[(i + 1) % kThreads];
  if (mistake == exited_lane && i == 33) return;
  if (mistake == divergent_shuffle && i < 16) sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  __syncthreads();
  shared[i] = sum;
  if (mistake != missing_syncwarp) __syncwarp();
  out[blockIdx.x * kThreads + i + (mistake == global_overrun ? 1 : 0)] = shared[i / 32 * 32 + (i + 1) % 32];
}

float expected(const std::vector<float>& in, int block, int i) {
  float sum = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const int j = i / 32 * 32 + lane;
    sum += in[block * kThreads + kThreads - 1 - j] + in[block * kThreads + (j + 1) % kThreads];
  }
  return sum;
}

int run(int mistake) {
  std::vector<float> in(kBlocks * kThreads), out(kBlocks * kThreads, NAN);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 61);  // sums are exact
  const repkern::Status status = RK_LAUNCH(reverse_and_sum, dim3(kBlocks), dim3(kThreads), 2 * kThreads * sizeof(float),
                                           nullptr, in.data(), out.data(), mistake);
  if (status != nullptr) {
    std::printf("%s\n", status);
    return 2;
  }
  int wrong = 0;
  for (int block = 0; block < kBlocks; ++block)
    for (int i = 0; i < kThreads; ++i) wrong += out[block * kThreads + i] != expected(in, block, i);
  std::printf("wrong: %d\n", wrong);
  return wrong != 0;
}

}  // namespace

int main(int count, char** arguments) {
  for (int mistake = 0; mistake <= divergent_shuffle; ++mistake) {
    if (count == 2 && std::strcmp(arguments[1], kNames[mistake]) == 0) return run(mistake);
  }
  std::printf("usage: planted <mistake>\n");
  return 9;
}
