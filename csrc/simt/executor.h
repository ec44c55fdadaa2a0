// Runs a CUDA kernel on the host: one fiber per thread, block after block. What it checks: docs/simt.md.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"
#include "types.h"

namespace simt {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 99 << 10;  // what one block can get on every architecture built for (sm_120 has least)
constexpr size_t kSlotBytes = 32;

// A place in the kernel's source.
struct Place {
  const char* what;
  const char* file;
  int line;
};

enum class State { ready, at_block, at_warp, done };
enum class Order { forward, reverse, random1, random2 };

// A copy that was issued and not yet waited for.
struct PendingCopy {
  void* to;
  const void* from;
  unsigned bytes, valid;  // bytes beyond `valid` become zero
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  unsigned linear = 0;
  State state = State::ready;
  Place place{};
  unsigned mask = 0;
  alignas(16) unsigned char slot[kSlotBytes];
  std::vector<std::vector<PendingCopy>> copies;  // the last group is the open one
};

struct FreeShared {
  void operator()(unsigned char* p) const { ::operator delete(p, std::align_val_t(128)); }
};

// The launch in progress.
struct Launch {
  const char* kernel = "";
  dim3 grid, block;
  unsigned count = 0;
  uint3 block_index{};
  std::vector<std::unique_ptr<Thread>> threads;
  std::unique_ptr<unsigned char, FreeShared> shared;
  std::function<void()> body;
  Order order = Order::forward;
  uint64_t random = 0;
  std::string error;
};
inline Launch launch_state;
inline Thread* current = nullptr;

inline std::string name_of(const Thread& t) {
  char text[64];
  std::snprintf(text, sizeof text, "thread (%u,%u,%u)", t.index.x, t.index.y, t.index.z);
  return text;
}

inline std::string place_of(const Thread& t) {
  if (t.place.file == nullptr) return "the start of the kernel";
  return std::string(t.place.what) + " at " + t.place.file + ":" + std::to_string(t.place.line);
}

inline void fail(const std::string& text) {
  if (!launch_state.error.empty()) return;
  const uint3 b = launch_state.block_index;
  char where[96];
  std::snprintf(where, sizeof where, ", block (%u,%u,%u): ", b.x, b.y, b.z);
  launch_state.error = "simt: kernel " + std::string(launch_state.kernel) + where + text;
}

// Called by the running thread: wait, and let the others go on.
inline void wait(State state, unsigned mask, Place place) {
  current->state = state;
  current->mask = mask;
  current->place = place;
  current->fiber.leave(false);
}

inline void block_barrier(Place place) { wait(State::at_block, 0, place); }

inline void warp_barrier(unsigned mask, Place place) {
  if ((mask >> (current->linear % kWarp) & 1) == 0) {
    fail(name_of(*current) + " is not in the mask of its own " + place.what + " at " + place.file + ":" +
         std::to_string(place.line));
  }
  wait(State::at_warp, mask, place);
}

inline void fiber_main() {
  current->fiber.arrived();
  launch_state.body();
  current->state = State::done;
  current->fiber.leave(true);
  std::abort();
}

inline bool same(const Place& a, const Place& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// Lets a warp go on when every lane its mask names has arrived. Returns whether any did.
inline bool release_warps() {
  Launch& s = launch_state;
  bool released = false;
  for (unsigned i = 0; i < s.count; ++i) {
    Thread& first = *s.threads[i];
    if (first.state != State::at_warp) continue;
    const unsigned base = i - i % kWarp;
    bool complete = true;
    for (unsigned lane = 0; lane < kWarp && base + lane < s.count; ++lane) {
      if ((first.mask >> lane & 1) == 0) continue;
      Thread& other = *s.threads[base + lane];
      if (other.state == State::done) {
        fail(name_of(other) + " returned while " + name_of(first) + " waits for it at " + place_of(first));
        return false;
      }
      if (other.state != State::at_warp) {
        complete = false;
      } else if (other.mask != first.mask || !same(other.place, first.place)) {
        fail("lanes of one warp diverged: " + name_of(first) + " waits at " + place_of(first) + ", " + name_of(other) +
             " at " + place_of(other));
        return false;
      }
    }
    if (!complete) continue;
    for (unsigned lane = 0; lane < kWarp && base + lane < s.count; ++lane) {
      if (first.mask >> lane & 1) s.threads[base + lane]->state = State::ready;
    }
    released = true;
  }
  return released;
}

// Every thread waits or is done and no warp could go on: the block barrier, or an error.
inline void release_block() {
  Launch& s = launch_state;
  Thread *waiting = nullptr, *other = nullptr, *finished = nullptr;
  for (unsigned i = 0; i < s.count; ++i) {
    Thread& t = *s.threads[i];
    if (t.state == State::done) {
      finished = finished ? finished : &t;
    } else if (waiting == nullptr) {
      waiting = &t;
    } else if (t.state != waiting->state || !same(t.place, waiting->place)) {
      other = other ? other : &t;
    }
  }
  if (waiting == nullptr) return;
  if (other != nullptr) {
    fail("divergent barrier: " + name_of(*waiting) + " waits in " + place_of(*waiting) + ", " + name_of(*other) +
         " in " + place_of(*other));
  } else if (finished != nullptr) {
    fail(name_of(*finished) + " returned (last seen in " + place_of(*finished) + ") while " + name_of(*waiting) +
         " waits in " + place_of(*waiting));
  } else if (waiting->state != State::at_block) {
    fail("deadlock: " + name_of(*waiting) + " waits in " + place_of(*waiting) + " for lanes that never come");
  } else {
    for (unsigned i = 0; i < s.count; ++i) s.threads[i]->state = State::ready;
  }
}

inline uint64_t next_random() {
  uint64_t& r = launch_state.random;
  r ^= r << 13;
  r ^= r >> 7;
  r ^= r << 17;
  return r;
}

inline void arrange(std::vector<unsigned>& order) {
  const unsigned count = static_cast<unsigned>(order.size());
  switch (launch_state.order) {
    case Order::forward:
    case Order::reverse:
      return;
    default:
      for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  }
}

inline void run_block() {
  Launch& s = launch_state;
  std::vector<unsigned> order(s.count);
  for (unsigned i = 0; i < s.count; ++i) {
    order[i] = s.order == Order::reverse ? s.count - 1 - i : i;
    Thread& t = *s.threads[i];
    t.linear = i;
    t.index = {i % s.block.x, i / s.block.x % s.block.y, i / (s.block.x * s.block.y)};
    t.state = State::ready;
    t.place = {};
    t.copies.assign(1, {});
    t.fiber.start(fiber_main);
  }
  for (unsigned done = 0; done < s.count;) {
    arrange(order);
    bool ran = false;
    done = 0;
    for (unsigned i : order) {
      Thread& t = *s.threads[i];
      if (t.state == State::ready) {
        current = &t;
        t.fiber.enter();
        ran = true;
      }
      done += t.state == State::done;
    }
    const bool released = release_warps();
    if (s.error.empty() && !released && done < s.count) release_block();
    if (!s.error.empty()) return;
    if (!ran) return fail("deadlock");
  }
}

inline Order order_from_environment() {
  const char* name = std::getenv("REPKERN_SIMT_ORDER");
  const char* names[] = {"forward", "reverse", "random1", "random2"};
  for (int i = 0; name != nullptr && i < 4; ++i) {
    if (std::strcmp(name, names[i]) == 0) return static_cast<Order>(i);
  }
  if (name != nullptr && *name != '\0') {
    fail("REPKERN_SIMT_ORDER must be forward, reverse, random1 or random2, got '" + std::string(name) + "'");
  }
  return Order::forward;
}

inline std::string check_shape(dim3 grid, dim3 block, size_t shared) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads)
    return "a block must have 1 to 1024 threads, got " + std::to_string(threads);
  if (uint64_t(grid.x) * grid.y * grid.z == 0) return "the grid is empty";
  if (grid.y > 65535 || grid.z > 65535) return "grid.y and grid.z must be at most 65535";
  if (shared > kMaxShared) return "a block gets at most 101376 bytes of shared memory, asked " + std::to_string(shared);
  return "";
}

inline void run_grid(dim3 grid, size_t shared) {
  Launch& s = launch_state;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        // Exact size, so that AddressSanitizer sees the first byte beyond; all ones, so that unwritten floats are NaN.
        s.shared.reset(static_cast<unsigned char*>(::operator new(std::max<size_t>(shared, 1), std::align_val_t(128))));
        std::memset(s.shared.get(), 0xFF, shared);
        s.block_index = {x, y, z};
        run_block();
        if (!s.error.empty()) return;
      }
}

// Runs body() once per thread of the grid. Null on success, else the report (valid until this thread's next failure).
inline const char* launch(const char* kernel, dim3 grid, dim3 block, size_t shared, std::function<void()> body) {
  static std::mutex one_at_a_time;
  static thread_local std::string report;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  Launch& s = launch_state;
  s.kernel = kernel;
  s.grid = grid;
  s.block = block;
  s.count = block.x * block.y * block.z;
  s.body = std::move(body);
  s.block_index = {};
  s.error.clear();
  s.order = order_from_environment();
  s.random = 0x9E3779B97F4A7C15ull * (static_cast<uint64_t>(s.order) + 1);
  const std::string problem = check_shape(grid, block, shared);
  if (!problem.empty()) fail(problem);
  if (s.error.empty()) {
    while (s.threads.size() < s.count) s.threads.push_back(std::make_unique<Thread>());
    run_grid(grid, shared);
  }
  s.shared.reset();
  s.body = nullptr;
  current = nullptr;
  if (s.error.empty()) return nullptr;
  report = s.error;
  return report.c_str();
}

}  // namespace simt
