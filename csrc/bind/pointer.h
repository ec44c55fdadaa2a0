// Helpers of the bindings: addresses travel as Python integers, a failed Status becomes RuntimeError.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/types.h"

namespace repkern {

// Reads a flat list of integers in the order the fields are written down; running past the end is an error.
class FieldReader {
 public:
  FieldReader(const std::vector<int64_t>& fields, const char* op) : fields_(fields), op_(op) {}

  int64_t integer() {
    if (next_ >= fields_.size()) throw std::invalid_argument(std::string(op_) + ": too few fields");
    return fields_[next_++];
  }
  void* pointer() { return reinterpret_cast<void*>(static_cast<uintptr_t>(integer())); }
  bool done() const { return next_ == fields_.size(); }

 private:
  const std::vector<int64_t>& fields_;
  const char* op_;
  size_t next_ = 0;
};

inline void* as_pointer(int64_t address) { return reinterpret_cast<void*>(static_cast<uintptr_t>(address)); }

inline void throw_unless_ok(Status status, const char* op) {
  if (status != nullptr) throw std::runtime_error(std::string(op) + ": " + status);
}

}  // namespace repkern
