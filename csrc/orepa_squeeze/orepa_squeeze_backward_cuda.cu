// Backward: two tile products (grad_expand, grad_reduce), one pass for the other branches, one for partial sums.
// Every sum has a fixed order: the gradients are the same bits in every run.
#include <algorithm>
#include <vector>

#include "common/cuda/math.cuh"
#include "orepa_squeeze/orepa_squeeze_grad_branches.cuh"
#include "orepa_squeeze/orepa_squeeze_grad_expand.cuh"
#include "orepa_squeeze/orepa_squeeze_grad_reduce.cuh"

namespace repkern {
namespace {

using namespace squeeze;

// One call, and what it has yet to sum up.
struct Backward {
  const SqueezeLayer* layers;
  const SqueezeGrads* grads;
  DType dtype;
  char* workspace;
  void* stream;
  BackwardPlans plans;
  std::vector<SumJob> sums;

  int of(int64_t value) const { return static_cast<int>(value); }

  void sum_later(const void* from, void* to, int64_t stride, int slices, int64_t count) {
    if (to != nullptr && count > 0) sums.push_back({from, to, stride, slices, static_cast<int>(count), 0});
  }
};

using Indices = std::vector<int>::const_iterator;

// Fills tables with the layers [first, last) and launches each when it is full.
// describe(layer index, entry) -> blocks; run(blocks, table) launches.
template <class Table, class Describe, class Run>
Status launch_tables(Indices first, Indices last, Describe describe, Run run) {
  constexpr std::ptrdiff_t kCapacity = sizeof(Table::layers) / sizeof(Table::layers[0]);
  while (first != last) {
    Table table{};
    table.count = static_cast<int>(std::min(kCapacity, last - first));
    int blocks = 0;
    for (int i = 0; i < table.count; ++i) {
      table.layers[i].first_tile = blocks;
      blocks += describe(first[i], table.layers[i]);
    }
    if (Status status = run(blocks, table)) return status;
    first += table.count;
  }
  return nullptr;
}

int describe_expand(Backward& call, int index, ExpandLayer& entry) {
  const SqueezeLayer& layer = call.layers[index];
  const SqueezeGrads& grads = call.grads[index];
  const BackwardPlan& plan = call.plans.layers[index];
  entry.grad = grads.grad_out;
  entry.reduce = layer.reduce;
  entry.expand = layer.expand;
  entry.scale = layer.scale[3];
  entry.grad_expand = grads.expand;
  entry.co = call.of(layer.co);
  entry.co_g = call.of(layer.co / layer.groups);
  entry.ci_g = call.of(layer.ci / layer.groups);
  entry.cm_g = call.of(layer.cm / layer.groups);
  entry.kk = call.of(layer.k * layer.k);
  entry.identity_reduce = layer.identity_reduce != 0;
  entry.aligned = is_aligned(layer.reduce, entry.ci_g * static_cast<int64_t>(size_of(call.dtype)));
  if (grads.scale[3] != nullptr) {
    entry.scale_partial = call.workspace + plan.expand_scale_at;
    call.sum_later(entry.scale_partial, grads.scale[3], entry.co, plan.expand_slices, entry.co);
  }
  return call.of(layer.groups) * ceil_div(entry.cm_g, kTileM) * Columns(entry.kk).tiles(entry.co_g);
}

int describe_reduce(Backward& call, int index, ReduceLayer& entry) {
  const SqueezeLayer& layer = call.layers[index];
  const SqueezeGrads& grads = call.grads[index];
  const BackwardPlan& plan = call.plans.layers[index];
  entry.grad = grads.grad_out;
  entry.expand = layer.expand;
  entry.scale = layer.scale[3];
  entry.co_g = call.of(layer.co / layer.groups);
  entry.ci_g = call.of(layer.ci / layer.groups);
  entry.cm_g = call.of(layer.cm / layer.groups);
  entry.groups = call.of(layer.groups);
  entry.kk = call.of(layer.k * layer.k);
  entry.out = grads.reduce;
  if (plan.reduce_slices > 1) {
    const int64_t count = layer.cm * entry.ci_g;
    entry.out = call.workspace + plan.reduce_at;
    call.sum_later(entry.out, grads.reduce, count, plan.reduce_slices, count);
  }
  return entry.groups * ceil_div(entry.cm_g, kTileM) * ceil_div(entry.ci_g, kTileN) * plan.reduce_slices;
}

int describe_branches(Backward& call, int index, BranchLayer& entry) {
  const SqueezeLayer& layer = call.layers[index];
  const SqueezeGrads& grads = call.grads[index];
  const BackwardPlan& plan = call.plans.layers[index];
  const size_t element = size_of(call.dtype);
  entry.grad = grads.grad_out;
  entry.origin = layer.origin;
  entry.avg = layer.avg;
  entry.prior = layer.prior;
  entry.pointwise = layer.pointwise;
  entry.depthwise = layer.depthwise;
  entry.project = layer.project;
  entry.prior_filter = layer.prior_filter;
  entry.grad_origin = grads.origin;
  entry.grad_avg = grads.avg;
  entry.grad_prior = grads.prior;
  entry.grad_pointwise = grads.pointwise;
  entry.grad_project = grads.project;
  entry.co = call.of(layer.co);
  entry.co_g = call.of(layer.co / layer.groups);
  entry.ci_g = call.of(layer.ci / layer.groups);
  entry.groups = call.of(layer.groups);
  entry.kk = call.of(layer.k * layer.k);
  entry.expansion = call.of(layer.expansion);
  entry.inputs = plan.inputs;
  entry.outputs = plan.outputs;
  entry.scale_partial = call.workspace + plan.scale_at;
  for (int branch : {0, 1, 2, 4, 5}) {
    entry.scale[branch] = layer.scale[branch];
    const char* from = call.workspace + plan.scale_at + branch * layer.co * element;
    call.sum_later(from, grads.scale[branch], kSqueezeBranches * layer.co, plan.input_tiles, layer.co);
  }
  entry.depthwise_partial = grads.depthwise;
  if (grads.depthwise != nullptr && plan.output_tiles > 1) {
    const int64_t count = layer.ci * layer.expansion * entry.kk;
    entry.depthwise_partial = call.workspace + plan.depthwise_at;
    call.sum_later(entry.depthwise_partial, grads.depthwise, count, plan.output_tiles, count);
  }
  return entry.groups * plan.input_tiles * plan.output_tiles;
}

template <class Tile, int kPositions>
Status run_products(Backward& call, Indices first, Indices last) {
  using T = typename Tile::Scalar;
  const Status status = launch_tables<ExpandTable>(
      first, last, [&](int index, ExpandLayer& entry) { return describe_expand(call, index, entry); },
      [&](int blocks, const ExpandTable& table) {
        return RK_LAUNCH((squeeze_grad_expand<Tile, kPositions>), dim3(blocks), dim3(kTileThreads), kSharedBytes<T>,
                         call.stream, table);
      });
  if (status != nullptr) return status;
  return launch_tables<ReduceTable>(
      first, last, [&](int index, ReduceLayer& entry) { return describe_reduce(call, index, entry); },
      [&](int blocks, const ReduceTable& table) {
        return RK_LAUNCH((squeeze_grad_reduce<Tile, kPositions>), dim3(blocks), dim3(kTileThreads),
                         kReduceSharedBytes<T>, call.stream, table);
      });
}

// The layers of one launch share its shared memory, so layers of one size go together.
template <class T>
Status run_branches(Backward& call, std::vector<int> order) {
  auto bytes = [&](int index) {
    const BackwardPlan& plan = call.plans.layers[index];
    const int kk = call.of(call.layers[index].k * call.layers[index].k);
    return branch_tile_bytes(plan, kk, sizeof(T)) + plan.outputs * kTileThreads * sizeof(T);
  };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return bytes(a) < bytes(b); });
  Indices first = order.begin();
  while (first != order.end()) {
    const size_t shared = bytes(*first);
    const Indices last = std::find_if(first, order.cend(), [&](int index) { return bytes(index) != shared; });
    const Status status = launch_tables<BranchTable>(
        first, last, [&](int index, BranchLayer& entry) { return describe_branches(call, index, entry); },
        [&](int blocks, const BranchTable& table) {
          return RK_LAUNCH(squeeze_grad_branches<T>, dim3(blocks), dim3(kTileThreads), shared, call.stream, table);
        });
    if (status != nullptr) return status;
    first = last;
  }
  return nullptr;
}

template <class T>
Status run_sums(const Backward& call) {
  for (size_t first = 0; first < call.sums.size(); first += kSumJobs) {
    SumTable table{};
    table.count = static_cast<int>(std::min<size_t>(kSumJobs, call.sums.size() - first));
    int blocks = 0;
    for (int i = 0; i < table.count; ++i) {
      table.jobs[i] = call.sums[first + i];
      table.jobs[i].first_block = blocks;
      blocks += ceil_div(table.jobs[i].count, kSumThreads);
    }
    if (Status status = RK_LAUNCH(squeeze_sum_slices<T>, dim3(blocks), dim3(kSumThreads), 0, call.stream, table))
      return status;
  }
  return nullptr;
}

}  // namespace

size_t orepa_squeeze_backward_cuda_workspace(const SqueezeLayer* layers, int count, DType dtype) {
  return plan_backward(layers, count, dtype).bytes;
}

Status orepa_squeeze_backward_cuda(const SqueezeLayer* layers, const SqueezeGrads* grads, int count, DType dtype,
                                   int math, void* workspace, void* stream) {
  std::vector<int> branches, products;
  for (int i = 0; i < count; ++i) {
    if (Status problem = check_sizes(layers[i])) return problem;
    const SqueezeLayer& in = layers[i];
    if (in.origin || in.avg || in.prior || in.pointwise || in.project) branches.push_back(i);
    if (layers[i].expand != nullptr) products.push_back(i);
  }
  Backward call{layers, grads, dtype, static_cast<char*>(workspace), stream, plan_backward(layers, count, dtype), {}};
  // The deepest products first: the short tiles of the others fill the last wave.
  std::stable_sort(products.begin(), products.end(),
                   [&](int a, int b) { return layers[a].ci / layers[a].groups > layers[b].ci / layers[b].groups; });
  const auto middle = std::stable_partition(products.begin(), products.end(), [&](int i) { return layers[i].k == 3; });

  return with_tile(dtype, math, [&](auto tile) -> Status {
    using Tile = decltype(tile);
    using T = typename Tile::Scalar;
    constexpr int kFast = sizeof(T) == 4 ? 9 : 0;
    if (Status status = run_products<Tile, kFast>(call, products.begin(), middle)) return status;
    if (Status status = run_products<Tile, 0>(call, middle, products.end())) return status;
    if (Status status = run_branches<T>(call, branches)) return status;
    return run_sums<T>(call);
  });
}

}  // namespace repkern
