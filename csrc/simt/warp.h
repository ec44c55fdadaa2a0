// Warp-wide functions, atomics and asynchronous copies.
#pragma once
#include "executor.h"

namespace simt {

// Every lane of `mask` publishes `mine`; read(lane) gives another lane's value.
template <class T, class Read>
auto exchange(unsigned mask, const T& mine, Place place, Read read) {
  static_assert(sizeof(T) <= kSlotBytes, "a lane publishes at most one slot");
  std::memcpy(current->slot, &mine, sizeof mine);
  warp_barrier(mask, place);
  const unsigned base = current->linear - current->linear % kWarp;
  auto lane_value = [&](unsigned lane) {
    T value;
    std::memcpy(&value, launch_state.threads[base + lane]->slot, sizeof value);
    return value;
  };
  auto answer = read(lane_value);
  warp_barrier(mask, place);
  return answer;
}

inline unsigned lane() { return current->linear % kWarp; }

// The value of lane `source`; its own where the source is not in the mask or not in the block.
template <class T>
T shuffle(unsigned mask, T mine, unsigned source, Place place) {
  const unsigned base = current->linear - lane();
  const bool there = (mask >> source & 1) && base + source < launch_state.count;
  return exchange(mask, mine, place, [&](auto at) { return there ? at(source) : mine; });
}

template <class T>
T shfl(Place place, unsigned mask, T v, int source, int width = 32) {
  return shuffle(mask, v, lane() / width * width + static_cast<unsigned>(source) % width, place);
}
template <class T>
T shfl_xor(Place place, unsigned mask, T v, int lanes, int width = 32) {
  const unsigned source = lane() ^ static_cast<unsigned>(lanes);
  return shuffle(mask, v, source / width <= lane() / width ? source : lane(), place);
}
template <class T>
T shfl_down(Place place, unsigned mask, T v, unsigned delta, int width = 32) {
  return shuffle(mask, v, lane() % width + delta < static_cast<unsigned>(width) ? lane() + delta : lane(), place);
}
template <class T>
T shfl_up(Place place, unsigned mask, T v, unsigned delta, int width = 32) {
  return shuffle(mask, v, lane() % width >= delta ? lane() - delta : lane(), place);
}

inline unsigned ballot(Place place, unsigned mask, int predicate) {
  return exchange(mask, predicate != 0, place, [&](auto at) {
    unsigned answer = 0;
    for (unsigned i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1) && current->linear - lane() + i < launch_state.count && at(i)) answer |= 1u << i;
    }
    return answer;
  });
}
inline unsigned lanes_here(unsigned mask) {
  const unsigned base = current->linear - lane(), live = launch_state.count - base;
  return live >= kWarp ? mask : mask & ((1u << live) - 1);
}
inline int any(Place place, unsigned mask, int predicate) { return ballot(place, mask, predicate) != 0; }
inline int all(Place place, unsigned mask, int predicate) { return ballot(place, mask, predicate) == lanes_here(mask); }

// One fiber runs at a time, so a plain read-modify-write is atomic.
template <class T, class F>
T atomic(T* at, F f) {
  const T old = *at;
  *at = f(old);
  return old;
}

inline void copy_async(void* to, const void* from, unsigned bytes, unsigned valid) {
  const auto is_aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  if (!is_aligned(to) || (valid != 0 && !is_aligned(from))) {
    fail(name_of(*current) + " copies " + std::to_string(bytes) +
         " bytes to or from an address that is not aligned to them");
  }
  current->copies.back().push_back({to, from, bytes, valid});
}
inline void copy_commit() { current->copies.emplace_back(); }

// Copies happen here and not earlier: a kernel that reads before it waits reads NaN.
inline void copy_wait(size_t newest_left) {
  auto& groups = current->copies;
  while (groups.size() > newest_left + 1) {
    for (const PendingCopy& c : groups.front()) {
      if (c.valid != 0) std::memcpy(c.to, c.from, c.valid);
      if (c.valid < c.bytes) std::memset(static_cast<char*>(c.to) + c.valid, 0, c.bytes - c.valid);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace simt
