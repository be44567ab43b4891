// threads.h - threads of the CPU methods. The work of one call is split over workers; a worker knows its number only.
#pragma once
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "../problem.h"

namespace lc {

int num_threads();
void set_num_threads(int n);  // n < 1: the default
const char* openmp_version();

// Calls body(context, worker, workers) for worker = 0 ... workers - 1 at the same time, each with denormals flushed to
// zero. Where fewer threads than wished for can be had (inside another parallel region, say), workers is 1.
void run_workers(int wished, void (*body)(void* context, int worker, int workers), void* context);

// The same with a lambda body(worker, workers).
template <class F>
LC_INLINE void run_workers(int wished, F&& body) {
  run_workers(
      wished, [](void* f, int w, int workers) { (*static_cast<std::remove_reference_t<F>*>(f))(w, workers); }, &body);
}

// As many workers as threads, but not more than tasks, nor than the work pays for: waking one costs some microseconds.
int workers_for(int64_t tasks, double flop);

// Deals the tasks of one call out to its workers.
class Tasks {
 public:
  // Calls f(task) for the tasks 0 ... count - 1, each by one of the workers that call this: first those of the worker's
  // own share, which is the same in every call, as its core may have their data in cache; then what others left.
  template <class F>
  LC_INLINE void each(int64_t count, int worker, int workers, F&& f) {
    const int shares = workers < kMost ? workers : kMost;
    for (int s = 0; s < shares; ++s) {
      const int share = (worker + s) % shares;
      for (int64_t i; (i = counters_[share].taken.fetch_add(1, std::memory_order_relaxed) * shares + share) < count;)
        f(i);
    }
  }

 private:
  static constexpr int kMost = 16;
  struct alignas(64) Counter {
    std::atomic<int64_t> taken{0};
  } counters_[kMost];
};

// Whether so many equal tasks keep so many workers busy to the end, or nearly.
LC_INLINE bool balanced(int64_t tasks, int workers) { return tasks % workers == 0 || tasks >= 4 * workers; }

// Lets a few workers wait for one another, often: it spins, and yields the core when that takes long.
class Barrier {
 public:
  void wait(int workers);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

#ifdef LC_COUNT
inline struct Counted {
  std::atomic<int64_t> flop, workspace;
} counted;
#endif

// A 64-byte aligned scratch area cut into pieces, measured by the same code that cuts it: with base nullptr it only
// adds up.
class Arena {
 public:
  LC_INLINE explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  LC_INLINE T* take(int64_t count) {
    char* here = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
#ifdef LC_COUNT
    if (base_ && counted.workspace < int64_t(used_)) counted.workspace = int64_t(used_);
#endif
    return reinterpret_cast<T*>(here);
  }
  LC_INLINE size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace lc
