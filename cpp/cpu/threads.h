// threads.h - the workers of the CPU methods: they run one call at the same time and share out its
// tasks.
#pragma once
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "../cost.h"
#include "../interrupt.h"
#include "../problem.h"

namespace lc {

// Calls body(context, worker, workers) for worker = 0 ... workers - 1 at the same time, each with
// denormals flushed to zero. The calling thread is worker 0. workers is less than wished if threads
// are busy or cannot be made. A worker that has not begun when the calling thread returns from body
// never begins. Work is therefore shared out by Tasks, and a body with a Barrier waits there for
// all workers.
void run_workers(int wished, void (*body)(void* context, int worker, int workers), void* context);

// The same with a lambda body(worker, workers).
template <class F>
LC_INLINE void run_workers(int wished, F&& body) {
  run_workers(
      wished, [](void* f, int w, int workers) { (*static_cast<std::remove_reference_t<F>*>(f))(w, workers); }, &body);
}

// The number of workers of a call: at most its threads, at most its tasks, and at most what its
// work pays for. P is Problem, or another struct with its fields `threads` and `interrupt`.
template <class P>
LC_INLINE int workers_for(const P& p, int64_t tasks, double flop) {
  const double paid = flop / kFlopPerWorker;
  const double most = paid < double(tasks) ? paid : double(tasks);
  return most >= p.threads ? p.threads : most > 1 ? int(most) : 1;
}

// Shares out the tasks of one call among its workers. After an interruption no further task is
// begun.
class Tasks {
 public:
  template <class P>
  explicit Tasks(const P& p) : interrupt_(p.interrupt) {}

  // Calls f(task) once for each task 0 ... count - 1, on one of the workers that call this
  // function. A worker first takes the tasks of its own share, which is the same in every call: its
  // core may have their data in cache. Then it takes tasks that are left in the shares of others.
  template <class F>
  LC_INLINE void each(int64_t count, int worker, int workers, F&& f) {
    const int shares = workers < kMostShares ? workers : kMostShares;
    for (int s = 0; s < shares; ++s) {
      const int share = (worker + s) % shares;
      for (int64_t i; (i = counters_[share].taken.fetch_add(1, std::memory_order_relaxed) * shares + share) < count;) {
        if (interrupt_ && interrupt_->stops(worker)) return;
        f(i);
      }
    }
  }

 private:
  static constexpr int kMostShares = 16;
  struct alignas(64) Counter {
    std::atomic<int64_t> taken{0};
  } counters_[kMostShares];
  Interrupt* interrupt_;
};

// Whether this many tasks of equal size keep all workers busy until nearly the end.
LC_INLINE bool balanced(int64_t tasks, int workers) { return tasks % workers == 0 || tasks >= 4 * workers; }

// Makes workers wait for one another. A waiting worker spins, and yields its core if the wait is
// long.
class Barrier {
 public:
  void wait(int workers);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

}  // namespace lc
