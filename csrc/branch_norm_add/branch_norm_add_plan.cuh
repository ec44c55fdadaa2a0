// Host side: the vector width that shapes and addresses allow, and how channels and positions are dealt to blocks.
#pragma once
#include <algorithm>
#include <array>

#include "branch_norm_add/branch_norm_add_reduce.cuh"

namespace repkern {
namespace norm {

// Not measured yet: what keeps a large GPU busy, and what one block does as fast as three launches.
constexpr int64_t kWantedBlocks = 1024, kEnoughBlocks = 128;
constexpr int64_t kShortWalk = 8, kLongWalk = 32;  // vectors of a map a thread walks over
constexpr int64_t kMostSplits = 65535;
constexpr int64_t kLongestChain = 512;  // values a thread adds up one after the other
constexpr int kMostWidth = 128;         // channels of a block

struct Plan {
  Grid grid;
  dim3 blocks, threads;
  int width;

  // One block has all positions of its channels: statistics and sum, or both halves of the backward, in one launch.
  bool alone() const { return grid.splits == 1; }
  int warps() const { return static_cast<int>(threads.x * threads.y) / 32; }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t power_of_two_from(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

// A plane of one position is the same in both layouts; rows are read in whole lines.
inline bool by_rows(const NormParams& p) { return p.channels_last != 0 || p.p == 1; }

inline Plan plan_with(const NormParams& p, int vector, int64_t lanes) {
  const bool rows = by_rows(p);
  const int64_t width = rows ? lanes * vector : 1;
  const int64_t columns = rows ? divide_up(p.c, width) : p.c;
  const int64_t positions = rows ? p.n * p.p : p.n * p.p / vector;
  const int64_t threads = std::min<int64_t>(kThreads, std::max<int64_t>(32, power_of_two_from(positions * lanes)));
  const int64_t walk = divide_up(positions, threads / lanes);
  int64_t splits = 1;
  if (walk > kLongWalk || (walk > kShortWalk && columns < kEnoughBlocks)) {
    const int64_t chain = rows ? walk : walk * vector;
    splits = std::min(divide_up(kWantedBlocks, columns), divide_up(walk, kShortWalk / 2));
    splits = std::min(std::max(splits, divide_up(chain, kLongestChain)), kMostSplits);
  }
  Plan plan{};
  plan.grid.channels = p.c;
  plan.grid.plane = p.p;
  plan.grid.channel_stride = rows ? 1 : p.p;
  plan.grid.positions = static_cast<unsigned>(positions);
  plan.grid.per_split = static_cast<unsigned>(divide_up(positions, splits));
  plan.grid.splits = static_cast<int>(divide_up(positions, plan.grid.per_split));
  plan.grid.per_plane = WideDivisor(rows ? 1u : static_cast<unsigned>(p.p / vector));
  plan.blocks = dim3(static_cast<unsigned>(columns), static_cast<unsigned>(plan.grid.splits));
  plan.threads = dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(threads / lanes));
  plan.width = static_cast<int>(width);
  return plan;
}

inline Plan make_plan(const NormParams& p, int vector) {
  if (!by_rows(p)) return plan_with(p, vector, 1);
  const auto lanes = [&](int64_t bytes) {
    const int64_t wanted = std::max<int64_t>(1, bytes / static_cast<int64_t>(size_of(p.dtype)) / vector);
    return std::min({wanted, power_of_two_from(divide_up(p.c, vector)), int64_t(32), int64_t(kMostWidth / vector)});
  };
  // Full lines of 128 bytes while one block can have all rows, else longer pieces of fewer rows.
  const Plan narrow = plan_with(p, vector, lanes(128));
  return narrow.alone() ? narrow : plan_with(p, vector, lanes(512));
}

// Blocks that merge the splits' parts of `values` numbers a channel.
inline dim3 merge_blocks(const NormParams& p, int values) {
  return dim3(static_cast<unsigned>(divide_up(p.c, 32)), static_cast<unsigned>(values));
}
inline dim3 merge_threads(const Plan& plan) {
  return dim3(32, static_cast<unsigned>(std::min<int64_t>(kMergeRows, power_of_two_from(plan.grid.splits))));
}

inline Status check_sizes(const NormParams& p) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  if (p.n * p.p >= kLimit) return "a channel has 2^31 values or more, which the CUDA kernels do not index";
  if (p.c >= kLimit) return "2^31 channels or more are not supported by the CUDA kernels";
  return nullptr;
}

// Every width the kernels are built for, widest first. Planes of 14 x 14 halves hold no whole number of 16 bytes.
inline std::array<int, 3> vectors_of(const NormParams& p) {
  if (p.dtype == DType::f64) return {1, 1, 1};
  if (p.dtype == DType::f32) return {4, 1, 1};
  return by_rows(p) ? std::array<int, 3>{8, 1, 1} : std::array<int, 3>{8, 2, 1};
}

// The addresses of maps, OR-ed: what divides this divides all of them.
inline uintptr_t addresses(const NormParams& p) {
  uintptr_t all = 0;
  for (int64_t b = 0; b < p.branches; ++b) {
    all |= reinterpret_cast<uintptr_t>(p.branch[b].y) | reinterpret_cast<uintptr_t>(p.branch[b].grad);
  }
  return all;
}

inline int vector_for(const NormParams& p, uintptr_t all_addresses) {
  for (int vector : vectors_of(p)) {
    const bool fits = (by_rows(p) ? p.c : p.p) % vector == 0;
    if (fits && all_addresses % (vector * size_of(p.dtype)) == 0) return vector;
  }
  return 1;
}

// call(Kind) for the dtype, the layout and the width.
template <class T, class Call>
Status with_kind_of(const NormParams& p, int vector, Call call) {
  constexpr int kWide = sizeof(T) == 8 ? 1 : 16 / sizeof(T);
  const bool rows = by_rows(p);
  if constexpr (sizeof(T) == 2) {
    if (vector == 2) return call(Kind<T, 2, false>());
  }
  if constexpr (kWide != 1) {
    if (vector == kWide) return rows ? call(Kind<T, kWide, true>()) : call(Kind<T, kWide, false>());
  }
  return rows ? call(Kind<T, 1, true>()) : call(Kind<T, 1, false>());
}

// call(a value of the element type).
template <class Call>
Status with_element(DType dtype, Call call) {
  switch (dtype) {
    case DType::f64:
      return call(double());
    case DType::f32:
      return call(float());
    case DType::bf16:
      return call(__nv_bfloat16());
    default:
      return call(__half());
  }
}

template <class Call>
Status with_kind(const NormParams& p, int vector, Call call) {
  return with_element(p.dtype,
                      [&](auto element) -> Status { return with_kind_of<decltype(element)>(p, vector, call); });
}

// The largest `bytes(plan)` over the widths, since which one runs depends on addresses.
template <class Bytes>
size_t workspace_for(const NormParams& p, Bytes bytes) {
  size_t most = 0;
  for (int vector : vectors_of(p)) {
    if ((by_rows(p) ? p.c : p.p) % vector == 0) most = std::max(most, bytes(make_plan(p, vector)));
  }
  return most;
}

inline size_t wide_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

}  // namespace norm
}  // namespace repkern
