// counted.h - counts of what a call did, in the build that tests predicted costs (LC_COUNT,
// tests/cpp/cost_test.cpp). In every other build these functions are empty.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../problem.h"

#ifdef LC_COUNT
#include <atomic>
#endif

namespace lc {

#ifdef LC_COUNT

inline struct Counted {
  std::atomic<int64_t> flop;
  std::atomic<int64_t> workspace;  // bytes from the start of the workspace to the end of the last piece
} counted;

LC_INLINE void count_flop(int64_t n) { counted.flop += n; }
LC_INLINE void count_workspace(size_t used) {
  if (counted.workspace < int64_t(used)) counted.workspace = int64_t(used);
}

#else

LC_INLINE void count_flop(int64_t) {}
LC_INLINE void count_workspace(size_t) {}

#endif

}  // namespace lc
