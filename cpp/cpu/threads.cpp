// threads.cpp - a pool of threads that survives a fork and does with fewer threads where no more can be made.
#include "threads.h"

#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

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

// Decays underflow by design, and arithmetic on denormals is up to 26 times slower.
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

// A spin costs about 30 ns.
constexpr int kSpins = 2048;

void pause() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}

// Spins while `condition` holds, some 20 to 50 us at most. Returns whether it ended.
template <class F>
bool spin_while(F&& condition) {
  for (int i = 0; i < kSpins; ++i) {
    if (!condition()) return true;
    pause();
  }
  return !condition();
}

// What run_workers was asked for, on the stack of the calling thread.
struct Job {
  void (*body)(void* context, int worker, int workers);
  void* context;
  int workers;
  const Cores* cores;
};

// One thread of the pool. It spins for its next job for a moment and then sleeps, as its caller does for its end.
class Thread {
 public:
  // Whether a thread could be made.
  bool start() {
#if defined(LC_POSIX)
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return false;
    pthread_attr_setstacksize(&attributes, kStackBytes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigset_t all, before;  // signals are for threads of the program
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t id;
    const int failed = pthread_create(
        &id, &attributes, [](void* self) -> void* { return static_cast<Thread*>(self)->loop(), nullptr; }, this);
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
    worker_ = worker;
    set(&job);
  }

  void finish() {
    if (spin_while([&] { return job_.load(std::memory_order_acquire) != nullptr; })) return;
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return !job_.load(std::memory_order_acquire); });
  }

 private:
  static constexpr size_t kStackBytes = 2 << 20;

  void loop() {
    const FlushDenormals guard;
    for (;;) {
      if (!spin_while([&] { return !job_.load(std::memory_order_acquire); })) {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return job_.load(std::memory_order_acquire) != nullptr; });
      }
      const Job& job = *job_.load(std::memory_order_acquire);
      follow(*job.cores);
      job.body(job.context, worker_, job.workers);
      set(nullptr);
    }
  }

  void set(const Job* job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_.store(job, std::memory_order_release);
    }
    changed_.notify_one();
  }

  // To the cores that the caller may use.
  void follow([[maybe_unused]] const Cores& cores) {
#if defined(__linux__)
    if (!cores.size || (cores.size == cores_.size && !std::memcmp(cores.set, cores_.set, cores.size))) return;
    if (!sched_setaffinity(0, cores.size, reinterpret_cast<const cpu_set_t*>(cores.set))) cores_ = cores;
#endif
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<const Job*> job_{nullptr};
  int worker_ = 0;
  Cores cores_ = {};
};

// The threads that wait for work. A call takes idle ones, has new ones made if the pool is smaller than it wishes for,
// and does with what it got. A pool is never freed: its threads run until the process ends.
class Pool {
 public:
  // At most `wished` threads, put into `taken`, which has room for them.
  void take(size_t wished, std::vector<Thread*>& taken) {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (taken.size() < wished && !idle_.empty()) taken.push_back(idle_.back()), idle_.pop_back();
    while (taken.size() < wished && all_.size() < wished && grow()) taken.push_back(all_.back().get());
  }

  void give_back(const std::vector<Thread*>& taken) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = taken.size(); i-- > 0;) idle_.push_back(taken[i]);  // worker 1 is the same thread again
  }

 private:
  // Whether there is one thread more.
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

// A forked child has the memory of its parent's pool and none of its threads; a lock in it may be held by a thread that
// is gone. So the child leaves that pool alone and makes one of its own with its first call.
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

}  // namespace

void run_workers(int wished, void (*body)(void* context, int worker, int workers), void* context) {
  const FlushDenormals guard;
  std::vector<Thread*> threads;
  if (wished > 1) {
    threads.reserve(size_t(wished) - 1);
    pool().take(size_t(wished) - 1, threads);
  }
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
