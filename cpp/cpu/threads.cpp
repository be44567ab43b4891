#include "threads.h"

#include <algorithm>
#include <cstdlib>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
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

int default_threads() {
  if (const char* text = std::getenv("LEETCORE_NUM_THREADS")) {
    const int n = std::atoi(text);
    if (n > 0) return n;
  }
#ifdef _OPENMP
  return std::max(1, omp_get_num_procs());
#else
  return 1;
#endif
}

std::atomic<int> requested{0};
std::atomic<bool> orphaned{false};  // a forked child of a process whose OpenMP workers did not come along

void watch_forks() {
#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
  static const int once = pthread_atfork(nullptr, nullptr, [] { orphaned = true; });
  (void)once;
#endif
}

void pause() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}

}  // namespace

int num_threads() {
  if (orphaned) return 1;
  const int n = requested;
  static const int fallback = default_threads();
  return n > 0 ? n : fallback;
}

void set_num_threads(int n) { requested = n; }

const char* openmp_version() {
#ifdef _OPENMP
  static const std::string text = std::to_string(_OPENMP);
  return text.c_str();
#else
  return "no";
#endif
}

int workers_for(int64_t tasks, double flop) {
  constexpr double kFlopPerWorker = 1e6;  // about 10 us of one core
  const double most = std::min({double(num_threads()), double(tasks), flop / kFlopPerWorker});
  return std::max(1, int(most));
}

void run_workers(int wished, void (*body)(void* context, int worker, int workers), void* context) {
#ifdef _OPENMP
  if (wished > 1) {
    watch_forks();
    const int dynamic = omp_get_dynamic();
    omp_set_dynamic(0);  // of the calling thread: all or none
#pragma omp parallel num_threads(wished)
    {
      const FlushDenormals guard;
      const int worker = omp_get_thread_num();
      if (omp_get_num_threads() == wished)
        body(context, worker, wished);
      else if (worker == 0)
        body(context, 0, 1);
    }
    omp_set_dynamic(dynamic);
    return;
  }
#endif
  const FlushDenormals guard;
  body(context, 0, 1);
}

void Barrier::wait(int workers) {
  const unsigned phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == workers) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
    if (spins < 4096)
      pause();
    else
      std::this_thread::yield();
  }
}

}  // namespace lc
