// The table of the optimizer steps as a flat list of integers, in the order of GradMultTable.
#pragma once
#include "bind/pointer.h"
#include "common/grad_mult.h"

namespace repkern {

inline GradMultTable read_grad_mult_table(const std::vector<int64_t>& fields, const char* op) {
  FieldReader in(fields, op);
  GradMultTable t;
  t.tensors = in.integer();
  t.addresses = static_cast<const int64_t*>(in.pointer());
  t.numbers = static_cast<const double*>(in.pointer());
  t.shapes = static_cast<const int64_t*>(in.pointer());
  t.chunks = static_cast<const int32_t*>(in.pointer());
  t.chunk_count = in.integer();
  t.chunk_size = in.integer();
  t.grad_scale = static_cast<const float*>(in.pointer());
  t.found_inf = static_cast<const float*>(in.pointer());
  return t;
}

}  // namespace repkern
