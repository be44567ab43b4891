// threads.cpp - runs workers on the threads of the process's OpenMP runtime, or else on a pool of
// its own. The pool survives a fork, and works with fewer threads if no more can be made.
#include "threads.h"

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../openmp.h"
#include "../thread_count.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#define LC_POSIX 1
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lc {
namespace {

// Flushes denormals to zero while it lives. Decays underflow by design, and arithmetic on denormals
// is up to 26 times slower.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // FTZ | DAZ
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__) && defined(__GNUC__)
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" ::"r"(before_ | (1ull << 24)));  // FZ
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  unsigned long long before_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

void pause() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}

// Spins while `condition` holds, for at most about the time that waking a thread takes. A wait then
// costs at most twice as much as the better choice between spinning and sleeping. Returns whether
// the condition has ended.
template <class F>
bool spin_while(F&& condition) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::microseconds kMost{50};
  for (const Clock::time_point end = Clock::now() + kMost; condition();) {
    for (int i = 0; i < 16 && condition(); ++i) pause();
    if (Clock::now() > end) return !condition();
    std::this_thread::yield();  // another thread may need this core
  }
  return true;
}

#if defined(LC_POSIX)

// Whether `count` more threads can be made now. An OpenMP runtime ends the process if it cannot
// make a thread, so this function makes them first and ends them again. It does so once per calling
// thread, because each calling thread has runtime threads of its own.
bool room_for(int count) {
  static thread_local int proven = 0;
  if (count <= proven) return true;
  std::vector<pthread_t> made;
  made.reserve(size_t(count));
  std::mutex gate;
  {
    const std::lock_guard<std::mutex> closed(gate);
    const auto pass = [](void* g) -> void* {
      const std::lock_guard<std::mutex> through(*static_cast<std::mutex*>(g));
      return nullptr;
    };
    for (pthread_t id; int(made.size()) < count && !pthread_create(&id, nullptr, pass, &gate);) made.push_back(id);
  }
  for (pthread_t id : made) pthread_join(id, nullptr);
  if (int(made.size()) == count) proven = count;
  return proven == count;
}

#endif

// The arguments of one run_workers call, on the stack of the calling thread.
struct Job {
  void (*body)(void* context, int worker, int workers);
  void* context;
  int workers;
  const Cores* cores;
};

// One thread of the pool. It spins briefly for its next job and then sleeps. Its caller waits for
// the end of a job in the same way.
class Thread {
 public:
  // Returns whether the thread could be made.
  bool start() {
#if defined(LC_POSIX)
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return false;
    pthread_attr_setstacksize(&attributes, kStackBytes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigset_t all, before;  // the threads of the program handle signals, this one blocks them
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t id;
    const auto run = [](void* self) -> void* {
      static_cast<Thread*>(self)->loop();
      return nullptr;
    };
    const int failed = pthread_create(&id, &attributes, run, this);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    return !failed;
#else
    try {
      std::thread([this] { loop(); }).detach();
      return true;
    } catch (const std::system_error&) {
      return false;
    }
#endif
  }

  void give(const Job& job, int worker) {
    job_ = &job;
    worker_ = worker;
    set(kGiven);
  }

  // Takes the job back if this thread has not begun it, since the other workers have then done all
  // tasks. Otherwise waits for the end of the job. A build that counts lets every worker begin, so
  // that counts do not depend on timing.
  void finish() {
#ifndef LC_COUNT
    int expected = kGiven;
    if (phase_.compare_exchange_strong(expected, kIdle, std::memory_order_acquire)) return;
#endif
    if (spin_while([&] { return phase_.load(std::memory_order_acquire) != kIdle; })) return;
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return phase_.load(std::memory_order_acquire) == kIdle; });
  }

 private:
  static constexpr size_t kStackBytes = 2 << 20;

  // The caller gives a job. The thread begins it and ends it, or the caller takes it back.
  enum Phase { kIdle, kGiven, kBegun };

  void loop() {
    const FlushDenormals guard;
    for (;;) {
      if (!spin_while([&] { return phase_.load(std::memory_order_acquire) != kGiven; })) {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return phase_.load(std::memory_order_acquire) == kGiven; });
      }
      int expected = kGiven;
      if (!phase_.compare_exchange_strong(expected, kBegun, std::memory_order_acquire)) continue;
      const Job& job = *job_;
      follow(*job.cores);
      job.body(job.context, worker_, job.workers);
      set(kIdle);
    }
  }

  void set(Phase phase) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      phase_.store(phase, std::memory_order_release);
    }
    changed_.notify_one();
  }

  // Moves this thread to the cores that the caller may use.
  void follow([[maybe_unused]] const Cores& cores) {
#if defined(__linux__)
    if (!cores.size || (cores.size == cores_.size && !std::memcmp(cores.set, cores_.set, cores.size))) return;
    if (!sched_setaffinity(0, cores.size, reinterpret_cast<const cpu_set_t*>(cores.set))) cores_ = cores;
#endif
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<int> phase_{kIdle};
  const Job* job_ = nullptr;
  int worker_ = 0;
  Cores cores_ = {};
};

// The threads of the library. A call takes idle threads and lets the pool grow up to the number it
// wishes for. It works with as many threads as it gets. A pool is never freed, because its threads
// run until the process ends.
class Pool {
 public:
  // Adds idle threads to `taken` until it has `wished` of them or no more are to be had. The caller
  // has reserved memory in `taken`.
  void take(size_t wished, std::vector<Thread*>& taken) {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (taken.size() < wished && !idle_.empty()) {
      taken.push_back(idle_.back());
      idle_.pop_back();
    }
    while (taken.size() < wished && all_.size() < wished && grow()) taken.push_back(all_.back().get());
  }

  void give_back(const std::vector<Thread*>& taken) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = taken.size(); i-- > 0;) idle_.push_back(taken[i]);  // the next call gets the same worker 1
  }

 private:
  // Returns whether one more thread was made.
  bool grow() try {
    idle_.reserve(all_.size() + 1);  // so that give_back does not allocate
    all_.push_back(std::make_unique<Thread>());
    if (all_.back()->start()) return true;
    all_.pop_back();
    return false;
  } catch (const std::bad_alloc&) {
    return false;
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Thread>> all_;
  std::vector<Thread*> idle_;
};

// The pool of this process. A forked child has the memory of its parent's pools but none of their
// threads, and a thread that no longer exists may hold a lock. The child therefore drops the
// parent's pool and makes a new one at its first call. It does not use the OpenMP runtime, which
// would wait forever for its lost threads.
std::atomic<Pool*> current{nullptr};
#if defined(LC_POSIX)
[[maybe_unused]] const int watches_forks =
    pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_relaxed); });
#endif

Pool& pool() {
  Pool* here = current.load(std::memory_order_acquire);
  if (here) return *here;
  auto made = std::make_unique<Pool>();
  if (current.compare_exchange_strong(here, made.get(), std::memory_order_acq_rel)) return *made.release();
  return *here;
}

// Runs the job on the threads of the process's OpenMP runtime. Returns false, with nothing done, if
// there is none to use.
bool run_on_openmp(int wished, const Job& job) {
#if defined(LC_POSIX)
  const OpenMP* runtime = openmp();
  if (!runtime || forked() || !room_for(wished - 1)) return false;
  struct Region {
    const OpenMP& runtime;
    const Job& job;
  } region = {*runtime, job};
  const auto body = [](void* context) {
    const Region& r = *static_cast<const Region*>(context);
    const FlushDenormals guard;
    r.job.body(r.job.context, r.runtime.thread_num(), r.runtime.num_threads());
  };
  runtime->parallel(body, &region, unsigned(wished), 0);
  return true;
#else
  return false;
#endif
}

}  // namespace

void run_workers(int wished, void (*body)(void* context, int worker, int workers), void* context) {
  std::vector<Thread*> threads;
  if (wished > 1) {
    if (run_on_openmp(wished, {body, context, wished, nullptr})) return;
    threads.reserve(size_t(wished) - 1);
    pool().take(size_t(wished) - 1, threads);
  }
  const FlushDenormals guard;
  const Job job = {body, context, int(threads.size()) + 1, &last_seen_cores()};
  for (size_t i = 0; i < threads.size(); ++i) threads[i]->give(job, int(i) + 1);
  body(context, 0, job.workers);
  for (Thread* thread : threads) thread->finish();
  if (!threads.empty()) pool().give_back(threads);
}

void Barrier::wait(int workers) {
  const unsigned phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == workers) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  const auto waits = [&] { return phase_.load(std::memory_order_acquire) == phase; };
  if (!spin_while(waits))
    while (waits()) std::this_thread::yield();
}

}  // namespace lc
