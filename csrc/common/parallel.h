// Threads over independent units of work. The thread count comes from torch.get_num_threads(), passed in.
#pragma once
#include <omp.h>

#include <cstdint>

namespace repkern {

// Calls body(unit, thread) for every unit in [0, units), whichever thread is free next. A unit must do the same
// arithmetic whoever runs it, so that results do not depend on the number of threads.
template <class Body>
void parallel_for(int64_t units, int threads, const Body& body) {
  if (threads <= 1 || units <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) body(unit, 0);
    return;
  }
  const int used = static_cast<int64_t>(threads) < units ? threads : static_cast<int>(units);
  int64_t next = 0;
#pragma omp parallel num_threads(used) default(none) shared(next, units, body)
  {
    const int thread = omp_get_thread_num();
    for (;;) {
      int64_t unit;
#pragma omp atomic capture
      unit = next++;
      if (unit >= units) break;
      body(unit, thread);
    }
  }
}

}  // namespace repkern
