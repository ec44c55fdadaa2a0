// What the optimizer steps with Grad Mult share: many tensors as one table, updated by one launch over one list of
// chunks. The math: docs/ops/grad_mult_sgd.md.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace repkern {

// The codes are fixed: repkern/ops/_grad_mult.py has them as integers.
enum class GradMultKind : int64_t { none = 0, scale = 1, centre = 2, dense = 3 };

// Plain columns instead of structs, so that Python fills them with few calls: element [column][tensor].
struct GradMultTable {
  int64_t tensors;
  const int64_t* addresses;  // [9, tensors]: param, grad, three kinds of state, step, multiplier, centre; first step
  const double* numbers;     // [3, tensors]: learning rate, weight decay, identity
  const int64_t* shapes;     // [7, tensors]: size, kind, row, taps, inner, diagonal, dtype
  const int32_t* chunks;     // [chunk_count, 2]: tensor, number of the chunk in it
  int64_t chunk_count, chunk_size;
  const float* grad_scale;  // [1] or null
  const float* found_inf;   // [1] or null
};

// One tensor: `size` numbers in memory order, `row` of them per output channel. Position r of a row belongs to kernel
// position r / inner % taps and to input channel r / taps (inner = 1: contiguous) or r % inner (channels_last). The
// identity's input channel is that of the output channel modulo `diagonal`.
struct GradMultTensor {
  void* param;
  const void* grad;
  void* state[3];
  float* step;             // [1]
  const void* multiplier;  // [Co] for channels, like `param` when dense
  const void* centre;      // [Co]
  bool first_step;
  double lr, weight_decay, identity;
  int64_t size;
  GradMultKind kind;
  int64_t row, taps, inner, diagonal;
  DType dtype;
};

#ifdef __CUDACC__
#define RK_ON_BOTH static __host__ __device__ __forceinline__
#else
#define RK_ON_BOTH [[maybe_unused]] static inline
#endif

RK_ON_BOTH GradMultTensor grad_mult_tensor(const GradMultTable& table, int64_t at) {
  const int64_t n = table.tensors, *a = table.addresses + at, *s = table.shapes + at;
  const double* x = table.numbers + at;
  GradMultTensor t;
  t.param = reinterpret_cast<void*>(a[0]);
  t.grad = reinterpret_cast<const void*>(a[n]);
  for (int i = 0; i < 3; ++i) t.state[i] = reinterpret_cast<void*>(a[(2 + i) * n]);
  t.step = reinterpret_cast<float*>(a[5 * n]);
  t.multiplier = reinterpret_cast<const void*>(a[6 * n]);
  t.centre = reinterpret_cast<const void*>(a[7 * n]);
  t.first_step = a[8 * n] != 0;
  t.lr = x[0], t.weight_decay = x[n], t.identity = x[2 * n];
  t.size = s[0], t.kind = GradMultKind(s[n]), t.row = s[2 * n], t.taps = s[3 * n];
  t.inner = s[4 * n], t.diagonal = s[5 * n], t.dtype = DType(s[6 * n]);
  return t;
}

// Where in the row of output channel `o` the identity has its one.
RK_ON_BOTH int64_t grad_mult_diagonal(const GradMultTensor& t, int64_t o) {
  const int64_t channel = o % t.diagonal;
  return t.inner == 1 ? channel * t.taps + t.taps / 2 : t.taps / 2 * t.inner + channel;
}

}  // namespace repkern
