// The tensor-core wrappers against a product in double, with fragments loaded as the PTX manual lays them out;
// and the half-precision conversions of the host executor over every bit pattern.
#include <cmath>
#include <cstdio>
#include <vector>

#include "common/cuda/mma.cuh"

namespace {

constexpr int kRows = 16, kColumns = 8;

__global__ void multiply_tf32(const float* a, const float* b, float* d) {  // [16, 8] [8, 8] -> [16, 8]
  const int group = threadIdx.x / 4, in_group = threadIdx.x % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = repkern::to_tf32(a[(group + i % 2 * 8) * 8 + in_group + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) right[i] = repkern::to_tf32(b[(in_group + i * 4) * kColumns + group]);
  float sum[4] = {0, 0, 0, 0};
  repkern::mma_m16n8k8_tf32(sum, left, right);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * kColumns + in_group * 2 + i % 2] = sum[i];
}

__device__ uint32_t pair(float low, float high) {
  const __nv_bfloat16 both[2] = {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
  uint32_t bits;
  memcpy(&bits, both, sizeof bits);
  return bits;
}

__global__ void multiply_bf16(const float* a, const float* b, float* d) {  // [16, 16] [16, 8] -> [16, 8]
  const int group = threadIdx.x / 4, in_group = threadIdx.x % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const float* from = a + (group + i % 2 * 8) * 16 + in_group * 2 + i / 2 * 8;
    left[i] = pair(from[0], from[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const float* from = b + (in_group * 2 + i * 8) * kColumns + group;
    right[i] = pair(from[0], from[kColumns]);
  }
  float sum[4] = {0, 0, 0, 0};
  repkern::mma_m16n8k16_bf16(sum, left, right);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * kColumns + in_group * 2 + i % 2] = sum[i];
}

// Worst |error| / (sum of |products|).
double worst(const std::vector<float>& a, const std::vector<float>& b, const std::vector<float>& d, int depth) {
  double most = 0;
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kColumns; ++n) {
      double sum = 0, size = 0;
      for (int k = 0; k < depth; ++k) {
        const double product = double(a[m * depth + k]) * b[k * kColumns + n];
        sum += product;
        size += std::fabs(product);
      }
      const double error = std::fabs(d[m * kColumns + n] - sum) / size;
      if (!(error <= most)) most = error;
    }
  return most;
}

template <class Kernel>
double check(Kernel kernel, int depth) {
  std::vector<float> a(kRows * depth), b(depth * kColumns), d(kRows * kColumns, NAN);
  for (size_t i = 0; i < a.size(); ++i) a[i] = std::sin(1.0f + 3.7f * i);
  for (size_t i = 0; i < b.size(); ++i) b[i] = std::cos(2.0f + 1.3f * i);
  const repkern::Status status = RK_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, a.data(), b.data(), d.data());
  if (status != nullptr) std::printf("%s\n", status);
  return worst(a, b, d, depth);
}

int wrong_conversions() {
  int wrong = 0;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float half = simt::float_of_half(static_cast<uint16_t>(bits)),
                brain = simt::float_of_bfloat16(static_cast<uint16_t>(bits));
    wrong += half == half ? simt::half_of(half) != bits : simt::half_of(half) % 0x8000 <= 0x7C00;
    wrong += brain == brain ? simt::bfloat16_of(brain) != bits : simt::bfloat16_of(brain) % 0x8000 <= 0x7F80;
  }
  return wrong;
}

}  // namespace

int main() {
  std::printf("tf32 %.3g bf16 %.3g conversions %d\n", check(multiply_tf32, 8), check(multiply_bf16, 16),
              wrong_conversions());
}
