// Statistics and the forward pass. One launch where a block can have all of its channels, else three: the statistics
// of every split, their merge, the sum.
#include "branch_norm_add/branch_norm_add_plan.cuh"

namespace repkern {
namespace {

using namespace norm;

enum Phase { kStatistics = 1, kSum = 2 };

struct ForwardJob {
  NormParams p;
  Grid grid;
  void* out;
  void* parts;  // [B0, splits, 3, C] of the moments, less origins; null: mean and var are written instead
  int phases;
};

template <class K>
__device__ void statistics(const ForwardJob& job, const Walk<K>& walk, typename K::A* shared) {
  using A = typename K::A;
  int slot = 0;
  for (int b = 0; b < static_cast<int>(job.p.branches); ++b) {
    const NormBranch& branch = job.p.branch[b];
    if (NormMode(branch.mode) != NormMode::batch) continue;
    const int own = slot++;
    if (gridDim.z > 1 && own != static_cast<int>(blockIdx.z)) continue;
    block_moments(walk, branch.y, shared, [&](int w, const Moments<A>& all) {
      const int64_t c = walk.channel(w), channels = job.p.c;
      if (job.parts == nullptr) {
        static_cast<A*>(branch.mean)[c] = walk.origin(branch.y, w) + all.mean;
        static_cast<A*>(branch.var)[c] = all.squares / all.n;
        return;
      }
      A* part = static_cast<A*>(job.parts) + (static_cast<int64_t>(own) * job.grid.splits + blockIdx.y) * 3 * channels;
      part[c] = all.n;
      part[channels + c] = all.mean;
      part[2 * channels + c] = all.squares;
    });
  }
}

template <class K>
__device__ void sum_of_branches(const ForwardJob& job, const Walk<K>& walk, unsigned char* shared) {
  using A = typename K::A;
  const int branches = static_cast<int>(job.p.branches);
  A* rows = reinterpret_cast<A*>(shared + rounded(sizeof(double) * branches * walk.width()));
  const Coefficients<A> coefficients{rows + walk.width(), nullptr, rows};
  make_coefficients(job.p, walk, coefficients, reinterpret_cast<double*>(shared));
  const typename K::PerChannel shift = walk.own(coefficients.shift);
  for (unsigned i = walk.begin(); i < walk.end(); i += K::kUnroll * walk.step()) {
    A z[K::kUnroll][K::kVector];
#pragma unroll
    for (int u = 0; u < K::kUnroll; ++u)
#pragma unroll
      for (int j = 0; j < K::kVector; ++j) z[u][j] = shift.at[K::channel(j)];
    for (int b = 0; b < branches; ++b) {
      const NormBranch& branch = job.p.branch[b];
      const typename K::PerChannel scale = walk.own(coefficients.scale + b * walk.width());
      typename K::Values y[K::kUnroll];
#pragma unroll
      for (int u = 0; u < K::kUnroll; ++u) {
        const unsigned position = i + u * walk.step();
        y[u] = {};
        if (position < walk.end()) y[u] = walk.load(branch.y, walk.at(position));
      }
#pragma unroll
      for (int u = 0; u < K::kUnroll; ++u) add_term<K>(z[u], y[u], scale, NormMode(branch.mode) != NormMode::as_is);
    }
#pragma unroll
    for (int u = 0; u < K::kUnroll; ++u) {
      const unsigned position = i + u * walk.step();
      if (position >= walk.end()) continue;
      activate(z[u], NormActivation(job.p.activation));
      walk.store(job.out, walk.at(position), z[u]);
    }
  }
}

template <class K>
__global__ void __launch_bounds__(kThreads, 1) norm_forward(const __grid_constant__ ForwardJob job) {
  RK_DYN_SMEM(unsigned char, shared);
  const Walk<K> walk(job.grid);
  // Ends past a barrier, so this block may read the means it has written.
  if ((job.phases & kStatistics) != 0) statistics(job, walk, reinterpret_cast<typename K::A*>(shared));
  if ((job.phases & kSum) != 0) sum_of_branches(job, walk, shared);
}

template <class T>
__global__ void __launch_bounds__(32 * kMergeRows) norm_merge_moments(const __grid_constant__ ForwardJob job) {
  using A = Wide<T>;
  RK_DYN_SMEM(Moments<A>, shared);
  const int64_t channels = job.p.c, c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  const A* parts = static_cast<const A*>(job.parts) + static_cast<int64_t>(blockIdx.y) * job.grid.splits * 3 * channels;
  const Moments<A> all = merge_splits(
      job.grid.splits, c < channels, shared,
      [&](int split) {
        const A* part = parts + static_cast<int64_t>(split) * 3 * channels + c;
        return Moments<A>{part[0], part[channels], part[2 * channels]};
      },
      [](Moments<A>& total, const Moments<A>& part) { total.merge(part); });
  if (threadIdx.y != 0 || c >= channels) return;
  int b = 0;
  for (unsigned slot = 0;; ++b) {
    if (NormMode(job.p.branch[b].mode) == NormMode::batch && slot++ == blockIdx.y) break;
  }
  const A origin = origin_of<T>(job.p.branch[b].y, c, job.grid.channel_stride);
  static_cast<A*>(job.p.branch[b].mean)[c] = origin + all.mean;
  static_cast<A*>(job.p.branch[b].var)[c] = all.squares / all.n;
}

template <class K>
__global__ void __launch_bounds__(kThreads, 1)
    norm_statistics_backward(const __grid_constant__ ForwardJob job, const void* grad_mean, const void* grad_var) {
  using A = typename K::A;
  const Walk<K> walk(job.grid);
  const NormBranch& branch = job.p.branch[blockIdx.z];
  A mean[K::kChannels] = {}, constant[K::kChannels] = {}, slope[K::kChannels] = {};
#pragma unroll
  for (int s = 0; s < K::kChannels; ++s) {
    const int w = (K::kChannelsLast ? static_cast<int>(threadIdx.x) : 0) * K::kChannels + s;
    if (!walk.has(w)) continue;
    const int64_t c = walk.channel(w), at = blockIdx.z * job.p.c + c;
    const A count = static_cast<A>(job.p.n * job.p.p);
    mean[s] = static_cast<const A*>(branch.mean)[c];
    constant[s] = static_cast<const A*>(grad_mean)[at] / count;
    slope[s] = A(2) * static_cast<const A*>(grad_var)[at] / count;
  }
#pragma unroll 4
  for (unsigned i = walk.begin(); i < walk.end(); i += walk.step()) {
    const int64_t at = walk.at(i);
    const typename K::Values y = walk.load(branch.y, at);
    A grad[K::kVector];
#pragma unroll
    for (int j = 0; j < K::kVector; ++j) {
      grad[j] = std::fma(widen(y.at[j]) - mean[K::channel(j)], slope[K::channel(j)], constant[K::channel(j)]);
    }
    walk.store(branch.grad, at, grad);
  }
}

int count_of(const NormParams& p, NormMode mode) {
  int count = 0;
  for (int64_t b = 0; b < p.branches; ++b) count += NormMode(p.branch[b].mode) == mode;
  return count;
}

size_t parts_size(const NormParams& p, int batch_norms, const Plan& plan) {
  return plan.alone() ? 0 : static_cast<size_t>(batch_norms) * plan.grid.splits * 3 * p.c * wide_size(p.dtype);
}

size_t shared_size(const ForwardJob& job, const Plan& plan) {
  const size_t wide = wide_size(job.p.dtype), width = plan.width, branches = job.p.branches;
  size_t size = 0;
  if ((job.phases & kStatistics) != 0) size = 3 * plan.warps() * width * wide;
  if ((job.phases & kSum) != 0) {
    size = std::max(size, rounded(sizeof(double) * branches * width) + (branches + 1) * width * wide);
  }
  return size;
}

Status start(const ForwardJob& job, const Plan& plan, int vector, unsigned depth, void* stream) {
  const dim3 blocks(plan.blocks.x, plan.blocks.y, depth);
  return with_kind(job.p, vector, [&](auto kind) -> Status {
    return RK_LAUNCH(norm_forward<decltype(kind)>, blocks, plan.threads, shared_size(job, plan), stream, job);
  });
}

Status merge(const ForwardJob& job, const Plan& plan, int batch_norms, void* stream) {
  const dim3 threads = merge_threads(plan);
  const size_t shared = threads.x * threads.y * 3 * wide_size(job.p.dtype);
  return with_element(job.p.dtype, [&](auto element) -> Status {
    return RK_LAUNCH(norm_merge_moments<decltype(element)>, merge_blocks(job.p, batch_norms), threads, shared, stream,
                     job);
  });
}

// `wanted`: the phases this call is about.
Status run(const NormParams& p, void* out, void* workspace, int wanted, void* stream) {
  if (Status problem = check_sizes(p)) return problem;
  const int vector = vector_for(p, addresses(p) | reinterpret_cast<uintptr_t>(out));
  const Plan plan = make_plan(p, vector);
  const int batch_norms = count_of(p, NormMode::batch);
  const int phases = batch_norms == 0 ? wanted & ~kStatistics : wanted;
  ForwardJob job{p, plan.grid, out, nullptr, phases};
  if (plan.alone() && phases == kStatistics) return start(job, plan, vector, batch_norms, stream);
  if (plan.alone() || phases == kSum) return start(job, plan, vector, 1, stream);
  job.parts = workspace;
  job.phases = kStatistics;
  if (Status problem = start(job, plan, vector, batch_norms, stream)) return problem;
  if (Status problem = merge(job, plan, batch_norms, stream)) return problem;
  if ((phases & kSum) == 0) return nullptr;
  job.phases = kSum;
  return start(job, plan, vector, 1, stream);
}

}  // namespace

size_t branch_norm_add_forward_cuda_workspace(const NormParams& p) {
  const int batch_norms = count_of(p, NormMode::batch);
  return workspace_for(p, [&](const Plan& plan) { return parts_size(p, batch_norms, plan); });
}

Status branch_norm_add_forward_cuda(const NormParams& p, void* out, void* workspace, void* stream) {
  return run(p, out, workspace, kStatistics | kSum, stream);
}

size_t branch_norm_statistics_cuda_workspace(const NormParams& p) { return branch_norm_add_forward_cuda_workspace(p); }

Status branch_norm_statistics_cuda(const NormParams& p, void* workspace, void* stream) {
  return run(p, nullptr, workspace, kStatistics, stream);
}

Status branch_norm_statistics_backward_cuda(const NormParams& p, const void* grad_mean, const void* grad_var,
                                            void* stream) {
  if (Status problem = check_sizes(p)) return problem;
  const int vector = vector_for(p, addresses(p));
  const Plan plan = make_plan(p, vector);
  const ForwardJob job{p, plan.grid, nullptr, nullptr, 0};
  const dim3 blocks(plan.blocks.x, plan.blocks.y, static_cast<unsigned>(p.branches));
  return with_kind(p, vector, [&](auto kind) -> Status {
    return RK_LAUNCH(norm_statistics_backward<decltype(kind)>, blocks, plan.threads, 0, stream, job, grad_mean,
                     grad_var);
  });
}

}  // namespace repkern
