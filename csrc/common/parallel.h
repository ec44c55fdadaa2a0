// Threads over independent units of work. The thread count comes from torch.get_num_threads(), passed in.
#pragma once
#include <cstdint>

namespace repkern {

// Calls body(unit, thread) for every unit in [0, units), static partition: the same unit always does the same
// arithmetic, so results do not depend on the number of threads.
template <class Body>
void parallel_for(int64_t units, int threads, const Body& body) {
  if (threads <= 1 || units <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) body(unit, 0);
    return;
  }
  const int used = static_cast<int64_t>(threads) < units ? threads : static_cast<int>(units);
#pragma omp parallel for num_threads(used) schedule(static, 1)
  for (int thread = 0; thread < used; ++thread) {
    const int64_t begin = units * thread / used, end = units * (thread + 1) / used;
    for (int64_t unit = begin; unit < end; ++unit) body(unit, thread);
  }
}

}  // namespace repkern
