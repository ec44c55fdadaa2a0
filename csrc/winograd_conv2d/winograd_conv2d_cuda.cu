// The transform of the weights, and which kernels a convolution takes.
#include <cstdlib>
#include <cstring>

#include "common/cuda/math.cuh"
#include "winograd_conv2d/winograd_conv2d_chunk.cuh"
#include "winograd_conv2d/winograd_conv2d_fused.cuh"

namespace repkern {
namespace {

using namespace winograd;

__device__ __forceinline__ double weight_at(const WinogradWeight& w, int64_t at) {
  switch (w.dtype) {
    case DType::f32:
      return static_cast<const float*>(w.weight)[at];
    case DType::f64:
      return static_cast<const double*>(w.weight)[at];
    case DType::bf16:
      return widen(static_cast<const __nv_bfloat16*>(w.weight)[at]);
    default:
      return widen(static_cast<const __half*>(w.weight)[at]);
  }
}

// A thread has one place (block, channel, lane) of the packed weights, and all of its positions.
template <int M>
__global__ void __launch_bounds__(kMapThreads)
    winograd_weight(const __grid_constant__ WinogradWeight w, const __grid_constant__ FilterMatrix matrix) {
  constexpr int R = M + 2;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kMapThreads + threadIdx.x, row = e / kWinogradLanes;
  const int64_t kg = w.k / w.groups, blocks = (kg + kWinogradLanes - 1) / kWinogradLanes, unit = row / w.c;
  if (unit >= w.groups * blocks) return;
  const int64_t lane = e % kWinogradLanes, c = row - unit * w.c;
  const int64_t k = unit % blocks * kWinogradLanes + lane, from = ((unit / blocks * kg + k) * w.c + c) * 9;
  double half[R][3];
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    double column[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) column[i] = k < kg ? weight_at(w, from + i * 3 + j) : 0.0;
#pragma unroll
    for (int a = 0; a < R; ++a)
      half[a][j] = matrix.g[a][0] * column[0] + matrix.g[a][1] * column[1] + matrix.g[a][2] * column[2];
  }
#pragma unroll
  for (int a = 0; a < R; ++a)
#pragma unroll
    for (int b = 0; b < R; ++b) {
      const double u = half[a][0] * matrix.g[b][0] + half[a][1] * matrix.g[b][1] + half[a][2] * matrix.g[b][2];
      const int64_t at = ((unit * R * R + a * R + b) * w.c + c) * kWinogradLanes + lane;
      if (w.dtype == DType::f64) {
        static_cast<double*>(w.packed)[at] = u;
      } else {
        static_cast<float*>(w.packed)[at] = static_cast<float>(u);
      }
    }
}

template <int M>
struct TileSize {
  static constexpr int kM = M;
};

template <class Call>
Status with_tile_size(int64_t tile, Call call) {
  switch (tile) {
    case 2:
      return call(TileSize<2>());
    case 4:
      return call(TileSize<4>());
    case 5:
      return call(TileSize<5>());
    default:
      return call(TileSize<6>());
  }
}

enum class Path { fused, chunked };

// By the channels, the tile and the arithmetic only: an image's result must not depend on the batch it is in.
// REPKERN_WINOGRAD_CUDA=fused|chunked takes that path wherever it exists.
Path choose_path(const WinogradParams& p, int math) {
  if (p.tile != 2 || p.dtype != DType::f32 || choose_math(math) == Math::tf32) return Path::chunked;
  if (const char* wanted = std::getenv("REPKERN_WINOGRAD_CUDA")) {
    if (std::strcmp(wanted, "fused") == 0) return Path::fused;
    if (std::strcmp(wanted, "chunked") == 0) return Path::chunked;
  }
  // Tensor cores, at three products for one, are faster than multiply-adds only where V and M cost little beside them.
  constexpr int64_t kDeep = 256;
  return p.c / p.groups < kDeep || choose_math(math) == Math::fma ? Path::fused : Path::chunked;
}

Geometry geometry_of(const WinogradParams& p) {
  const int64_t height = p.h + 2 * p.padding - 2, width = p.w + 2 * p.padding - 2;
  return Geometry(p, (height + p.tile - 1) / p.tile, (width + p.tile - 1) / p.tile);
}

// Null if every count that the kernels keep in 32 bits fits.
Status check_sizes(const WinogradParams& p) {
  constexpr int64_t kSide = int64_t(1) << 30, kChannels = int64_t(1) << 20;
  if (p.h >= kSide || p.w >= kSide || (p.h / p.tile + 3) * (p.w / p.tile + 3) >= kSide)
    return "an image has 2^30 tiles or more, which the CUDA kernels do not index";
  if (p.c + p.groups * kDepth >= kChannels || p.k >= kChannels)
    return "more than 2^20 channels are not supported on CUDA";
  return nullptr;
}

// Half-precision maps are multiplied as TF32: as many bits as float16 has, and the range of float32, so that neither a
// transformed map nor a product overflows.
template <class Call>
Status with_maps(DType dtype, int math, Call call) {
  switch (dtype) {
    case DType::f32:
      return with_tile(dtype, math, [&](auto tile) -> Status {
        if constexpr (sizeof(typename decltype(tile)::Scalar) == sizeof(float)) return call(tile, float());
        return nullptr;
      });
    case DType::f64:
      return call(FmaTile<double>(), double());
    case DType::bf16:
      return call(TensorTile<false>(), __nv_bfloat16());
    default:
      return call(TensorTile<false>(), __half());
  }
}

}  // namespace

size_t winograd_conv2d_packed_cuda_workspace(const WinogradParams& p, int math) {
  if (check_sizes(p) != nullptr || choose_path(p, math) == Path::fused) return 0;
  const size_t element = p.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  const Chunk chunk(geometry_of(p), static_cast<int>((p.tile + 2) * (p.tile + 2)), element);
  Workspace space(nullptr);
  space.take<char>(chunk.v_count * static_cast<int64_t>(element));
  space.take<char>(chunk.m_count * static_cast<int64_t>(element));
  return space.used();
}

Status winograd_conv2d_packed_cuda(const WinogradParams& p, int math, void* workspace, void* stream) {
  if (Status problem = check_sizes(p)) return problem;
  const Geometry geometry = geometry_of(p);
  if (choose_path(p, math) == Path::fused) return run_fused(geometry, stream);
  return with_maps(p.dtype, math, [&](auto tile, auto element) {
    return with_tile_size(p.tile, [&](auto size) {
      return run_chunks<decltype(tile), decltype(element), decltype(size)::kM>(geometry, workspace, stream);
    });
  });
}

Status winograd_transform_weight_cuda(const WinogradWeight& w, void* stream) {
  const int64_t kg = w.k / w.groups, units = w.groups * ((kg + kWinogradLanes - 1) / kWinogradLanes);
  const int64_t blocks = (units * w.c * kWinogradLanes + kMapThreads - 1) / kMapThreads;
  if (blocks > kMostBlocks) return "a weight of so many channels exceeds the largest CUDA grid";
  return with_tile_size(w.tile, [&](auto size) {
    constexpr int M = decltype(size)::kM;
    return RK_LAUNCH((winograd_weight<M>), dim3(static_cast<unsigned>(blocks)), dim3(kMapThreads), 0, stream, w,
                     FilterMatrix::make<M>());
  });
}

}  // namespace repkern
