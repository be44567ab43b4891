// threads.h - the workers of the CPU methods. The work of one call is split over workers; a worker knows its number
// only.
#pragma once
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "../cost.h"
#include "../interrupt.h"
#include "../problem.h"

namespace lc {

// Calls body(context, worker, workers) for worker = 0 ... workers - 1 at the same time, each with denormals flushed to
// zero. The calling thread is worker 0. workers is less than wished where threads are busy or cannot be made. A worker
// that has not begun when the calling thread returns from body never begins: work is dealt out by Tasks, and a body
// with a Barrier waits there for all workers.
void run_workers(int wished, void (*body)(void* context, int worker, int workers), void* context);

// The same with a lambda body(worker, workers).
template <class F>
LC_INLINE void run_workers(int wished, F&& body) {
  run_workers(
      wished, [](void* f, int w, int workers) { (*static_cast<std::remove_reference_t<F>*>(f))(w, workers); }, &body);
}

// The workers of a call: at most its threads, at most its tasks, and at most what the work pays for.
LC_INLINE int workers_for(const Problem& p, int64_t tasks, double flop) {
  const double paid = flop / kFlopPerWorker;
  const double most = paid < double(tasks) ? paid : double(tasks);
  return most >= p.threads ? p.threads : most > 1 ? int(most) : 1;
}

// Deals the tasks of one call out to its workers. After an interruption the tasks that nobody has begun are left out.
class Tasks {
 public:
  explicit Tasks(const Problem& p) : interrupt_(p.interrupt) {}

  // Calls f(task) for the tasks 0 ... count - 1, each by one of the workers that call this: first those of the worker's
  // own share, which is the same in every call, as its core may have their data in cache; then what others left.
  template <class F>
  LC_INLINE void each(int64_t count, int worker, int workers, F&& f) {
    const int shares = workers < kMost ? workers : kMost;
    for (int s = 0; s < shares; ++s) {
      const int share = (worker + s) % shares;
      for (int64_t i; (i = counters_[share].taken.fetch_add(1, std::memory_order_relaxed) * shares + share) < count;) {
        if (interrupt_ && interrupt_->stops(worker)) return;
        f(i);
      }
    }
  }

 private:
  static constexpr int kMost = 16;
  struct alignas(64) Counter {
    std::atomic<int64_t> taken{0};
  } counters_[kMost];
  Interrupt* interrupt_;
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
