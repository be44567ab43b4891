// thread_count.h - the number of threads of the CPU methods: an explicit number, or the caller's.
#pragma once
#include <cstddef>
#include <string>

namespace lc {

// The number of threads of a call. It is decided once, when the call begins. The first source that
// applies wins:
//
//   1. 1, inside a parallel region of OpenMP
//   2. set_num_threads(n)
//   3. LEETCORE_NUM_THREADS
//   4. `framework`, the number of threads of the caller's framework (> 0), else the OpenMP runtime
//      of the process, else OMP_NUM_THREADS; at most OMP_THREAD_LIMIT and the usable cores
//   5. the usable cores, by the calling thread's affinity and the CPU quota of its control groups
//
// Throws Error if LEETCORE_NUM_THREADS is not a number.
struct ThreadCount {
  int count;
  const char* source;  // "set_num_threads", "LEETCORE_NUM_THREADS", ..., for reports
};
ThreadCount thread_count(int framework);
void set_num_threads(int n);  // n < 1: no explicit number

inline constexpr int kMostThreads = 4096;

// The cores that workers of the calling thread may use, as a set for sched_setaffinity. They are
// those of this thread's last thread_count(). Size 0 means unknown.
struct Cores {
  static constexpr size_t kBytes = 1024;
  unsigned long set[kBytes / sizeof(unsigned long)];
  size_t size;
};
const Cores& last_seen_cores();

// The CPU quota of this process's control groups in cores: the smallest of all levels, infinite
// without any. root is "", or in tests a folder that replaces /.
double cpu_quota(const std::string& root = "");

}  // namespace lc
