// Sums and gradients. One launch where a block can have all of its channels, else three: the sums of every split,
// their merge, the gradients. The activation's input is made again from the maps.
#include "branch_norm_add/branch_norm_add_plan.cuh"

namespace repkern {
namespace {

using namespace norm;

enum Phase { kSums = 1, kGradients = 2 };

constexpr int kMostOfVectors = 8;  // branches

struct BackwardJob {
  NormParams p;
  NormGrads grads;
  Grid grid;
  void* sums;   // [1 + Bn, C]: written by the phase of the sums, or by the caller
  void* parts;  // [splits, 1 + Bn, C]; null: sums are written instead
  int norms, phases;
  unsigned read_for_sums, read_for_gradients;  // bit b: the phase needs the b-th map
};

// Per channel of the block, in shared memory, besides those of the forward: grad_b = scale dz + slope (y - mean) +
// constant.
template <class A>
struct Slopes {
  A *slope, *constant;
};

template <class A>
__device__ __forceinline__ double inverse_deviation(const NormParams& p, const NormBranch& branch, int64_t c) {
  const DType statistics = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const DType held = NormMode(branch.mode) == NormMode::batch ? statistics : p.param_dtype;
  return inverse_root(load_as<double>(branch.var, c, held) + branch.eps);
}

// A position's maps, read once, and dz.
template <class K, int kBranches>
struct Reading {
  typename K::Values y[kBranches] = {};
  typename K::A dz[K::kVector];

  __device__ __forceinline__ void load(const BackwardJob& job, const Walk<K>& walk, int64_t at, unsigned wanted,
                                       const Coefficients<typename K::A>& coefficients) {
    const int branches = static_cast<int>(job.p.branches);
    const typename K::Values grad = walk.load(job.grads.out, at);
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      if (b >= branches) break;
      if ((wanted >> b & 1) != 0) y[b] = walk.load(job.p.branch[b].y, at);
    }
#pragma unroll
    for (int j = 0; j < K::kVector; ++j) dz[j] = widen(grad.at[j]);
    const NormActivation activation = NormActivation(job.p.activation);
    if (activation == NormActivation::none) return;
    const typename K::PerChannel shift = walk.own(coefficients.shift);
    typename K::A z[K::kVector];
#pragma unroll
    for (int j = 0; j < K::kVector; ++j) z[j] = shift.at[K::channel(j)];
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      if (b >= branches) break;
      const typename K::PerChannel scale = walk.own(coefficients.scale + b * walk.width());
      add_term<K>(z, y[b], scale, NormMode(job.p.branch[b].mode) != NormMode::as_is);
    }
    activate_backward(dz, z, activation);
  }
};

template <class K, int kBranches>
__device__ void sum_up(const BackwardJob& job, const Walk<K>& walk, const Coefficients<typename K::A>& coefficients,
                       typename K::A* shared) {
  using A = typename K::A;
  const int branches = static_cast<int>(job.p.branches);
  A sums[1 + kBranches][K::kChannels] = {};  // of dz, of dz (y_b - mean_b)
  for (unsigned i = walk.begin(); i < walk.end(); i += walk.step()) {
    Reading<K, kBranches> reading;
    reading.load(job, walk, walk.at(i), job.read_for_sums, coefficients);
#pragma unroll
    for (int j = 0; j < K::kVector; ++j) sums[0][K::channel(j)] += reading.dz[j];
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      if (b >= branches) break;
      if (NormMode(job.p.branch[b].mode) == NormMode::as_is) continue;
      const typename K::PerChannel mean = walk.own(coefficients.mean + b * walk.width());
#pragma unroll
      for (int j = 0; j < K::kVector; ++j) {
        const A centred = widen(reading.y[b].at[j]) - mean.at[K::channel(j)];
        sums[1 + b][K::channel(j)] = std::fma(reading.dz[j], centred, sums[1 + b][K::channel(j)]);
      }
    }
  }
  block_sums<K, 1 + kBranches>(walk, sums, 1 + branches, shared, [&](int value, int w, A sum) {
    const int64_t c = walk.channel(w);
    int row = 0;
    if (value > 0) {
      const NormBranch& branch = job.p.branch[value - 1];
      if (NormMode(branch.mode) == NormMode::as_is) return;
      for (int b = 0; b < value; ++b) row += NormMode(job.p.branch[b].mode) != NormMode::as_is;
      sum = static_cast<A>(sum * inverse_deviation<A>(job.p, branch, c));
    }
    if (job.parts == nullptr) {
      static_cast<A*>(job.sums)[row * job.p.c + c] = sum;
    } else {
      static_cast<A*>(job.parts)[(static_cast<int64_t>(blockIdx.y) * (1 + job.norms) + row) * job.p.c + c] = sum;
    }
  });
}

// The slopes, and the parameters' gradients from the blocks of the first split. Ends past a barrier.
template <class K>
__device__ void make_slopes(const BackwardJob& job, const Walk<K>& walk,
                            const Coefficients<typename K::A>& coefficients, const Slopes<typename K::A>& to) {
  using A = typename K::A;
  const int width = walk.width(), branches = static_cast<int>(job.p.branches);
  const A* sums = static_cast<const A*>(job.sums);
  const double count = job.grads.count != nullptr ? static_cast<double>(*static_cast<const A*>(job.grads.count))
                                                  : static_cast<double>(job.p.n * job.p.p);
  const double inverse_count = 1.0 / count;
  const bool writes = blockIdx.y == 0;
  for (int item = walk.thread(); item < branches * width; item += walk.threads()) {
    const int w = item % width, b = item / width;
    const NormBranch& branch = job.p.branch[b];
    if (NormMode(branch.mode) == NormMode::as_is || !walk.has(w)) continue;
    const int64_t c = walk.channel(w);
    int row = 1;
    for (int before = 0; before < b; ++before) row += NormMode(job.p.branch[before].mode) != NormMode::as_is;
    const A sum = sums[row * job.p.c + c];
    if (writes) store_as(job.grads.weight, (row - 1) * job.p.c + c, sum, job.p.param_dtype);
    const double scale = coefficients.scale[item] * inverse_count;
    to.slope[item] = static_cast<A>(-scale * inverse_deviation<A>(job.p, branch, c) * static_cast<double>(sum));
    to.constant[item] = static_cast<A>(-scale * static_cast<double>(sums[c]));
  }
  for (int w = walk.thread(); writes && w < width; w += walk.threads()) {
    if (walk.has(w)) store_as(job.grads.bias, walk.channel(w), sums[walk.channel(w)], job.p.param_dtype);
  }
  __syncthreads();
}

template <class K, int kBranches>
__device__ void write_gradients(const BackwardJob& job, const Walk<K>& walk,
                                const Coefficients<typename K::A>& coefficients, const Slopes<typename K::A>& slopes) {
  using A = typename K::A;
  const int branches = static_cast<int>(job.p.branches);
  for (unsigned i = walk.begin(); i < walk.end(); i += walk.step()) {
    const int64_t at = walk.at(i);
    Reading<K, kBranches> reading;
    reading.load(job, walk, at, job.read_for_gradients, coefficients);
    if (job.grads.as_is != nullptr) walk.store(job.grads.as_is, at, reading.dz);
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      if (b >= branches) break;
      const NormBranch& branch = job.p.branch[b];
      if (branch.grad == nullptr) continue;
      const typename K::PerChannel scale = walk.own(coefficients.scale + b * walk.width());
      A grad[K::kVector];
      if (NormMode(branch.mode) == NormMode::batch) {
        const typename K::PerChannel mean = walk.own(coefficients.mean + b * walk.width());
        const typename K::PerChannel slope = walk.own(slopes.slope + b * walk.width());
        const typename K::PerChannel constant = walk.own(slopes.constant + b * walk.width());
#pragma unroll
        for (int j = 0; j < K::kVector; ++j) {
          const int s = K::channel(j);
          const A rest = std::fma(widen(reading.y[b].at[j]) - mean.at[s], slope.at[s], constant.at[s]);
          grad[j] = std::fma(reading.dz[j], scale.at[s], rest);
        }
      } else {
#pragma unroll
        for (int j = 0; j < K::kVector; ++j) grad[j] = reading.dz[j] * scale.at[K::channel(j)];
      }
      walk.store(branch.grad, at, grad);
    }
  }
}

// kBranches: at least as many as there are; their maps wait in registers.
template <class K, int kBranches>
__global__ void __launch_bounds__(kThreads, 1) norm_backward(const __grid_constant__ BackwardJob job) {
  using A = typename K::A;
  RK_DYN_SMEM(unsigned char, shared);
  const Walk<K> walk(job.grid);
  const int size = static_cast<int>(job.p.branches) * walk.width();
  A* rows = reinterpret_cast<A*>(shared);
  const Coefficients<A> coefficients{rows + walk.width(), rows + walk.width() + size, rows};
  const Slopes<A> slopes{rows + walk.width() + 2 * size, rows + walk.width() + 3 * size};
  unsigned char* scratch = shared + rounded((walk.width() + 4 * static_cast<size_t>(size)) * sizeof(A));
  make_coefficients(job.p, walk, coefficients, reinterpret_cast<double*>(scratch));
  // Ends past a barrier, so this block may read the sums it has written.
  if ((job.phases & kSums) != 0) sum_up<K, kBranches>(job, walk, coefficients, reinterpret_cast<A*>(scratch));
  if ((job.phases & kGradients) == 0) return;
  make_slopes(job, walk, coefficients, slopes);
  write_gradients<K, kBranches>(job, walk, coefficients, slopes);
}

template <class A>
__global__ void __launch_bounds__(32 * kMergeRows) norm_merge_sums(const __grid_constant__ BackwardJob job) {
  RK_DYN_SMEM(A, shared);
  const int64_t channels = job.p.c, c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  const A* parts = static_cast<const A*>(job.parts) + blockIdx.y * channels + c;
  const A sum = merge_splits(
      job.grid.splits, c < channels, shared,
      [&](int split) { return parts[static_cast<int64_t>(split) * (1 + job.norms) * channels]; },
      [](A& total, A part) { total += part; });
  if (threadIdx.y == 0 && c < channels) static_cast<A*>(job.sums)[blockIdx.y * channels + c] = sum;
}

int norms_of(const NormParams& p) {
  int count = 0;
  for (int64_t b = 0; b < p.branches; ++b) count += NormMode(p.branch[b].mode) != NormMode::as_is;
  return count;
}

size_t sums_size(const NormParams& p) { return rounded((1 + norms_of(p)) * p.c * wide_size(p.dtype)); }

size_t parts_size(const NormParams& p, const Plan& plan) {
  return plan.alone() ? 0 : static_cast<size_t>(plan.grid.splits) * (1 + norms_of(p)) * p.c * wide_size(p.dtype);
}

size_t shared_size(const BackwardJob& job, const Plan& plan) {
  const size_t wide = wide_size(job.p.dtype), width = plan.width, branches = job.p.branches;
  size_t scratch = sizeof(double) * branches * width;
  if ((job.phases & kSums) != 0) scratch = std::max(scratch, (1 + branches) * plan.warps() * width * wide);
  return rounded((1 + 4 * branches) * width * wide) + scratch;
}

template <class K, int kBranches>
Status start_with(const BackwardJob& job, const Plan& plan, void* stream) {
  return RK_LAUNCH((norm_backward<K, kBranches>), plan.blocks, plan.threads, shared_size(job, plan), stream, job);
}

Status start(const BackwardJob& job, const Plan& plan, int vector, void* stream) {
  return with_kind(job.p, vector, [&](auto kind) -> Status {
    using K = decltype(kind);
    constexpr int kMost = K::kVector == 1 ? kMostNormBranches : kMostOfVectors;
    return job.p.branches <= 4 ? start_with<K, 4>(job, plan, stream) : start_with<K, kMost>(job, plan, stream);
  });
}

Status merge(const BackwardJob& job, const Plan& plan, void* stream) {
  const dim3 blocks = merge_blocks(job.p, 1 + job.norms), threads = merge_threads(plan);
  const size_t shared = threads.x * threads.y * wide_size(job.p.dtype);
  if (job.p.dtype == DType::f64) return RK_LAUNCH(norm_merge_sums<double>, blocks, threads, shared, stream, job);
  return RK_LAUNCH(norm_merge_sums<float>, blocks, threads, shared, stream, job);
}

// More maps than registers hold vectors of are read one value at a time.
int vector_of(const NormParams& p, const NormGrads& grads) {
  if (p.branches > kMostOfVectors) return 1;
  return vector_for(p,
                    addresses(p) | reinterpret_cast<uintptr_t>(grads.out) | reinterpret_cast<uintptr_t>(grads.as_is));
}

void choose_maps(BackwardJob& job) {
  for (int64_t b = 0; b < job.p.branches; ++b) {
    const NormMode mode = NormMode(job.p.branch[b].mode);
    const bool active = NormActivation(job.p.activation) != NormActivation::none;
    if (active || mode != NormMode::as_is) job.read_for_sums |= 1u << b;
    if (active || mode == NormMode::batch) job.read_for_gradients |= 1u << b;
  }
}

// `sums`: where they go, or come from when kSums is not wanted.
Status run(const NormParams& p, const NormGrads& grads, void* sums, void* parts, int wanted, void* stream) {
  if (Status problem = check_sizes(p)) return problem;
  const int vector = vector_of(p, grads);
  const Plan plan = make_plan(p, vector);
  BackwardJob job{p, grads, plan.grid, sums, nullptr, norms_of(p), wanted, 0, 0};
  choose_maps(job);
  if (plan.alone() || wanted == kGradients) return start(job, plan, vector, stream);
  job.parts = parts;
  job.phases = kSums;
  if (Status problem = start(job, plan, vector, stream)) return problem;
  if (Status problem = merge(job, plan, stream)) return problem;
  if ((wanted & kGradients) == 0) return nullptr;
  job.parts = nullptr;
  job.phases = kGradients;
  return start(job, plan, vector, stream);
}

}  // namespace

size_t branch_norm_sums_cuda_workspace(const NormParams& p) {
  return workspace_for(p, [&](const Plan& plan) { return parts_size(p, plan); });
}

Status branch_norm_sums_cuda(const NormParams& p, const void* grad_out, void* sums, void* workspace, void* stream) {
  NormGrads grads{};
  grads.out = grad_out;
  return run(p, grads, sums, workspace, kSums, stream);
}

size_t branch_norm_add_backward_cuda_workspace(const NormParams& p) {
  return sums_size(p) + branch_norm_sums_cuda_workspace(p);
}

Status branch_norm_add_backward_cuda(const NormParams& p, const NormGrads& grads, void* workspace, void* stream) {
  if (grads.sums != nullptr) {
    return run(p, grads, const_cast<void*>(grads.sums), nullptr, kGradients, stream);
  }
  return run(p, grads, workspace, static_cast<char*>(workspace) + sums_size(p), kSums | kGradients, stream);
}

}  // namespace repkern
