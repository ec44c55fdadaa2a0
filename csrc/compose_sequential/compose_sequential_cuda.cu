// All three products (the composed kernel and both gradients) have one form:
//   out(m, n) = sum over k of A(m, k) B(k, n),  m = (mx, my), k = (kx, ky), my and ky positions on small grids,
// where A reads a kernel at the position my - ky (forward: zero outside) or my + ky (backward).
#include "common/cuda/index.cuh"
#include "common/cuda/math.cuh"
#include "common/cuda/pipeline.cuh"
#include "compose_sequential/compose_sequential.h"

namespace repkern {
namespace {

constexpr int kDepth = 2 * kSlab;
template <class T>
constexpr int kStages = sizeof(T) == 4 ? 3 : 2;
constexpr int kStageElements = kDepth * (kRowM + kRowN);
template <class T>
constexpr size_t kSharedBytes =
    sizeof(T) * (kStages<T> * kStageElements > kTileM * kRowC ? kStages<T> * kStageElements : kTileM * kRowC);

struct Product {
  const void *a, *b;
  void* out;
  int rows, columns, depth, groups;
  WideDivisor m_grid, m_side, k_grid, k_side;  // positions of a grid, and along one side
  int a_m, a_k, a_side, sign;                  // strides of mx and kx, the side of A's kernels, +1 or -1
  int b_k, b_n;                                // strides of kx and n; ky is contiguous
  int out_m, out_n;                            // strides of mx and n; my is contiguous
  int64_t a_group, b_group, out_group;
};

template <class T>
class Operands {
 public:
  __device__ Operands(const Product& product, int group, int m0, int n0)
      : p_(product),
        a_(static_cast<const T*>(product.a) + group * product.a_group),
        b_(static_cast<const T*>(product.b) + group * product.b_group),
        n0_(n0) {
    const int m = m0 + threadIdx.x % kTileM;
    row_exists_ = m < p_.rows;
    const int mx = p_.m_grid.divide(m), my = m - mx * p_.m_grid.value;
    y_ = p_.m_side.divide(my);
    x_ = my - y_ * p_.m_side.value;
    row_ = static_cast<int64_t>(mx) * p_.a_m;
  }

  __device__ __forceinline__ void load(T* stage, int step) const {
    constexpr int kRowsAtOnce = kTileThreads / kTileM;
#pragma unroll
    for (int k = threadIdx.x / kTileM; k < kDepth; k += kRowsAtOnce) {
      const int at = step * kDepth + k, kx = p_.k_grid.divide(at), ky = at - kx * p_.k_grid.value;
      const int dy = p_.k_side.divide(ky), dx = ky - dy * p_.k_side.value;
      const int y = y_ + p_.sign * dy, x = x_ + p_.sign * dx;
      const bool there = row_exists_ && at < p_.depth && y >= 0 && y < p_.a_side && x >= 0 && x < p_.a_side;
      const T* from = a_ + row_ + static_cast<int64_t>(kx) * p_.a_k + y * p_.a_side + x;
      copy_async<sizeof(T)>(stage + k * kRowM + threadIdx.x % kTileM, from, there);
    }
    T* right = stage + kDepth * kRowM;
    const int k = threadIdx.x % kDepth, at = step * kDepth + k;
    const int kx = p_.k_grid.divide(at), ky = at - kx * p_.k_grid.value;
    const T* column = b_ + static_cast<int64_t>(kx) * p_.b_k + ky;
#pragma unroll
    for (int n = threadIdx.x / kDepth; n < kTileN; n += kTileThreads / kDepth) {
      const bool there = at < p_.depth && n0_ + n < p_.columns;
      copy_async<sizeof(T)>(right + k * kRowN + n, column + static_cast<int64_t>(n0_ + n) * p_.b_n, there);
    }
  }

 private:
  const Product& p_;
  const T *a_, *b_;
  int64_t row_;
  int n0_, y_, x_;
  bool row_exists_;
};

template <class Tile>
__global__ void __launch_bounds__(kTileThreads, 2) compose_product(const __grid_constant__ Product product) {
  using T = typename Tile::Scalar;
  RK_DYN_SMEM(T, shared);
  const int m0 = blockIdx.x * kTileM, n0 = blockIdx.y * kTileN, group = blockIdx.z;
  const Operands<T> operands(product, group, m0, n0);
  Tile tile;
  run_pipeline<kStages<T>, kStageElements, kDepth>(
      tile, shared, ceil_div(product.depth, kDepth), [&](T* stage, int step) { operands.load(stage, step); },
      [](const T* stage, int m, int k) { return stage[k * kRowM + m]; },
      [](const T* stage, int k, int n) { return stage[kDepth * kRowM + k * kRowN + n]; });
  tile.for_each([&](int m, int n, T value) { shared[m * kRowC + n] = value; });
  __syncthreads();

  T* out = static_cast<T*>(product.out) + group * product.out_group;
  for (int e = threadIdx.x; e < kTileM * kTileN; e += kTileThreads) {
    const int m = m0 + e % kTileM, n = n0 + e / kTileM;
    if (m >= product.rows || n >= product.columns) continue;
    const int mx = product.m_grid.divide(m), my = m - mx * product.m_grid.value;
    out[static_cast<int64_t>(mx) * product.out_m + static_cast<int64_t>(n) * product.out_n + my] =
        shared[e % kTileM * kRowC + e / kTileM];
  }
}

// Per-group counts and kernel areas.
struct Sizes {
  int co, ci, cm, k1, k2, k, area1, area2, area;
};

Sizes sizes_of(const ComposeParams& p) {
  const int k1 = static_cast<int>(p.k1), k2 = static_cast<int>(p.k2), k = k1 + k2 - 1;
  return {static_cast<int>(p.co / p.groups),
          static_cast<int>(p.ci / p.groups),
          static_cast<int>(p.cm / p.groups),
          k1,
          k2,
          k,
          k1 * k1,
          k2 * k2,
          k * k};
}

Status check(const ComposeParams& p) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  const int64_t k = p.k1 + p.k2 - 1;
  const bool fits = p.co * (p.ci / p.groups) * k * k < kLimit && p.cm * (p.ci / p.groups) * p.k1 * p.k1 < kLimit &&
                    p.co * (p.cm / p.groups) * p.k2 * p.k2 < kLimit && p.co * k * k < kLimit;
  if (!fits) return "a tensor has 2^31 elements or more, which the CUDA kernels do not index";
  if (p.groups > 65535) return "more than 65535 groups are not supported by the CUDA kernels";
  return nullptr;
}

void set_grids(Product& product, int m_side, int k_side) {
  product.m_side = WideDivisor(m_side);
  product.m_grid = WideDivisor(m_side * m_side);
  product.k_side = WideDivisor(k_side);
  product.k_grid = WideDivisor(k_side * k_side);
}

Product composed(const ComposeParams& p, const Sizes& s, void* out) {
  Product product{};
  product.a = p.first;
  product.b = p.second;
  product.out = out;
  product.rows = s.ci * s.area;
  product.columns = s.co;
  product.depth = s.cm * s.area2;
  set_grids(product, s.k, s.k2);
  product.a_m = s.area1;
  product.a_k = s.ci * s.area1;
  product.a_side = s.k1;
  product.sign = -1;
  product.b_k = s.area2;
  product.b_n = s.cm * s.area2;
  product.out_m = s.area;
  product.out_n = s.ci * s.area;
  product.a_group = static_cast<int64_t>(s.cm) * s.ci * s.area1;
  product.b_group = static_cast<int64_t>(s.co) * s.cm * s.area2;
  product.out_group = static_cast<int64_t>(s.co) * s.ci * s.area;
  return product;
}

Product gradient_of_first(const ComposeParams& p, const Sizes& s, const void* grad, void* out) {
  Product product{};
  product.a = grad;
  product.b = p.second;
  product.out = out;
  product.rows = s.ci * s.area1;
  product.columns = s.cm;
  product.depth = s.co * s.area2;
  set_grids(product, s.k1, s.k2);
  product.a_m = s.area;
  product.a_k = s.ci * s.area;
  product.a_side = s.k;
  product.sign = 1;
  product.b_k = s.cm * s.area2;
  product.b_n = s.area2;
  product.out_m = s.area1;
  product.out_n = s.ci * s.area1;
  product.a_group = static_cast<int64_t>(s.co) * s.ci * s.area;
  product.b_group = static_cast<int64_t>(s.co) * s.cm * s.area2;
  product.out_group = static_cast<int64_t>(s.cm) * s.ci * s.area1;
  return product;
}

Product gradient_of_second(const ComposeParams& p, const Sizes& s, const void* grad, void* out) {
  Product product{};
  product.a = grad;
  product.b = p.first;
  product.out = out;
  product.rows = s.co * s.area2;
  product.columns = s.cm;
  product.depth = s.ci * s.area1;
  set_grids(product, s.k2, s.k1);
  product.a_m = s.ci * s.area;
  product.a_k = s.area;
  product.a_side = s.k;
  product.sign = 1;
  product.b_k = s.area1;
  product.b_n = s.ci * s.area1;
  product.out_m = s.cm * s.area2;
  product.out_n = s.area2;
  product.a_group = static_cast<int64_t>(s.co) * s.ci * s.area;
  product.b_group = static_cast<int64_t>(s.cm) * s.ci * s.area1;
  product.out_group = static_cast<int64_t>(s.co) * s.cm * s.area2;
  return product;
}

Status run(Product product, int64_t groups, DType dtype, int math, void* stream) {
  const dim3 grid(ceil_div(product.rows, kTileM), ceil_div(product.columns, kTileN), static_cast<unsigned>(groups));
  if (grid.y > 65535) return "more than 8388480 channels are not supported by the CUDA kernels";
  return with_tile(dtype, math, [&](auto tile) -> Status {
    using Tile = decltype(tile);
    return RK_LAUNCH(compose_product<Tile>, grid, dim3(kTileThreads), kSharedBytes<typename Tile::Scalar>, stream,
                     product);
  });
}

}  // namespace

size_t compose_sequential_forward_cuda_workspace(const ComposeParams&, DType) { return 0; }
size_t compose_sequential_backward_cuda_workspace(const ComposeParams&, DType) { return 0; }

Status compose_sequential_forward_cuda(const ComposeParams& p, void* out, DType dtype, int math, void*, void* stream) {
  if (Status problem = check(p)) return problem;
  return run(composed(p, sizes_of(p), out), p.groups, dtype, math, stream);
}

Status compose_sequential_backward_cuda(const ComposeParams& p, const void* grad_out, void* grad_first,
                                        void* grad_second, DType dtype, int math, void*, void* stream) {
  if (Status problem = check(p)) return problem;
  const Sizes sizes = sizes_of(p);
  if (Status problem = run(gradient_of_first(p, sizes, grad_out, grad_first), p.groups, dtype, math, stream))
    return problem;
  return run(gradient_of_second(p, sizes, grad_out, grad_second), p.groups, dtype, math, stream);
}

}  // namespace repkern
