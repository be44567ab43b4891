// thread_count.h - how many threads the CPU methods use: an explicit number of leetcore, else the caller's.
#pragma once
#include <cstddef>
#include <string>

namespace lc {

// The number of threads of a call, decided once, at its beginning; the first source that applies wins:
//
//   1. 1, inside a parallel region of OpenMP
//   2. set_num_threads(n)
//   3. LEETCORE_NUM_THREADS
//   4. `framework`, the number of threads of the caller's framework (> 0), else the OpenMP runtime of the
//      process, else OMP_NUM_THREADS; never more than OMP_THREAD_LIMIT, nor than the cores the process may use
//   5. the cores the process may use, by the affinity of the calling thread and the CPU quota of its control groups
//
// Throws Error if LEETCORE_NUM_THREADS is not a number.
struct ThreadCount {
  int count;
  const char* source;  // "set_num_threads", "LEETCORE_NUM_THREADS", "framework", ..., for people
};
ThreadCount thread_count(int framework);
void set_num_threads(int n);  // n < 1: no explicit number

inline constexpr int kMostThreads = 4096;

// The cores that threads may use which work for the calling thread: a set as sched_setaffinity takes it, as the last
// thread_count() of this thread saw them. Size 0: not known.
struct Cores {
  static constexpr size_t kBytes = 1024;
  unsigned long set[kBytes / sizeof(unsigned long)];
  size_t size;
};
const Cores& last_seen_cores();

// The CPU quota of the control groups of this process in cores, the least of all levels; infinite without one.
// root: "", or in tests a folder that takes the place of /.
double cpu_quota(const std::string& root = "");

}  // namespace lc
