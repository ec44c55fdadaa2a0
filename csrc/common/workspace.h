// Hands out pieces of the workspace. With a null base it only counts, so one function both plans and measures.
#pragma once
#include <cstddef>
#include <cstdint>

namespace repkern {
namespace {  // internal linkage: code of one instruction set must not be linked into another

class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  // 64-byte aligned; null while counting.
  template <class T>
  T* take(int64_t count) {
    char* here = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(here);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace repkern
