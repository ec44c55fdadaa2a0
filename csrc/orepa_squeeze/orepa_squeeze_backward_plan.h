// How the CUDA backward divides a layer among blocks, and where its partial sums lie in the workspace.
#pragma once
#include <algorithm>
#include <vector>

#include "orepa_squeeze/orepa_squeeze_tile.cuh"

namespace repkern {
namespace squeeze {

// Depth of one stage of the grad_reduce product: four 3x3 kernels, padded to slabs. Less in fp64: a block on sm_120
// gets 99 KB.
constexpr int reduce_depth(size_t element) { return element == 4 ? 40 : 24; }
constexpr int kStepsPerSlice = 16;                      // stages one block of that product adds up
constexpr int kBranchInputs = 16, kBranchOutputs = 32;  // the (i, o) tile of the other branches
constexpr size_t kBranchTileBytes = 48 << 10, kBranchTileLimit = 80 << 10;

// The depth of the grad_reduce product is (o, position): channels whole where they fit into a stage, else in chunks.
struct DepthSteps {
  int chunks, chunk, channels;

  __host__ __device__ DepthSteps(int kk, int depth) {
    chunks = ceil_div(kk, depth);
    chunk = ceil_div(kk, chunks);
    channels = depth / chunk;
  }
  __host__ __device__ int count(int co_g) const { return ceil_div(co_g, channels) * chunks; }
};

// One layer's share. Offsets in bytes.
struct BackwardPlan {
  int reduce_slices = 0, expand_slices = 0, input_tiles = 0, output_tiles = 0;
  int inputs = kBranchInputs, outputs = kBranchOutputs;
  size_t reduce_at = 0, expand_scale_at = 0, depthwise_at = 0, scale_at = 0;
};

struct BackwardPlans {
  std::vector<BackwardPlan> layers;
  size_t bytes = 0;
};

inline size_t branch_tile_bytes(const BackwardPlan& plan, int kk, size_t element) {
  return static_cast<size_t>(plan.inputs) * plan.outputs * kk * element;
}

inline BackwardPlan plan_tiles(const SqueezeLayer& layer, size_t element) {
  const int co_g = static_cast<int>(layer.co / layer.groups), ci_g = static_cast<int>(layer.ci / layer.groups);
  const int kk = static_cast<int>(layer.k * layer.k);
  BackwardPlan plan;
  if (layer.expand != nullptr) {
    plan.reduce_slices = ceil_div(DepthSteps(kk, reduce_depth(element)).count(co_g), kStepsPerSlice);
    plan.expand_slices = ceil_div(static_cast<int>(layer.cm / layer.groups), kTileM) * Columns(kk).chunks;
  }
  while (plan.outputs > 1 && branch_tile_bytes(plan, kk, element) > kBranchTileBytes) plan.outputs /= 2;
  while (plan.inputs > 1 && branch_tile_bytes(plan, kk, element) > kBranchTileLimit) plan.inputs /= 4;
  plan.input_tiles = ceil_div(ci_g, plan.inputs);
  plan.output_tiles = ceil_div(co_g, plan.outputs);
  return plan;
}

inline BackwardPlans plan_backward(const SqueezeLayer* layers, int count, DType dtype) {
  const size_t element = size_of(dtype);
  BackwardPlans plans;
  auto take = [&](int64_t elements) {
    const size_t at = plans.bytes;
    plans.bytes += (static_cast<size_t>(elements) * element + 63) / 64 * 64;
    return at;
  };
  for (int i = 0; i < count; ++i) {
    const SqueezeLayer& layer = layers[i];
    BackwardPlan plan = plan_tiles(layer, element);
    if (plan.reduce_slices > 1) plan.reduce_at = take(plan.reduce_slices * layer.cm * (layer.ci / layer.groups));
    plan.expand_scale_at = take(plan.expand_slices * layer.co);
    if (layer.project != nullptr && plan.output_tiles > 1) {
      plan.depthwise_at = take(plan.output_tiles * layer.ci * layer.expansion * layer.k * layer.k);
    }
    plan.scale_at = take(static_cast<int64_t>(plan.input_tiles) * kSqueezeBranches * layer.co);
    plans.layers.push_back(plan);
  }
  return plans;
}

}  // namespace squeeze
}  // namespace repkern
