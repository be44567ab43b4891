// arena.h - the memory of a call, cut into pieces by the code that measures it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "counted.h"

namespace lc {

// Cuts pieces, each aligned to 64 bytes, from the memory at `base`. With base nullptr it only adds
// up their sizes.
class Arena {
 public:
  LC_INLINE explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  LC_INLINE T* take(int64_t count) {
    char* here = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (base_) count_workspace(used_);
    return reinterpret_cast<T*>(here);
  }
  LC_INLINE size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace lc
