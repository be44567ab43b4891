// interrupt.h - whether the caller wants a call to end early.
#pragma once
#include <atomic>
#include <chrono>

namespace lc {

// Asks the caller of one call whether to stop, and passes the answer on to all workers. Only worker
// 0, the calling thread, asks, at most once every kPeriod, because the answer may need a lock of
// the caller.
class Interrupt {
 public:
  using Asked = int (*)(void* context);
  Interrupt(Asked asked, void* context) : asked_(asked), context_(context), next_(Clock::now() + kPeriod) {}

  bool stops(int worker) {
    if (worker == 0 && !stopped()) {
      const Clock::time_point now = Clock::now();
      if (now >= next_) {
        next_ = now + kPeriod;
        stopped_.store(asked_(context_) != 0, std::memory_order_relaxed);
      }
    }
    return stopped();
  }
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kPeriod{50};
  const Asked asked_;
  void* const context_;
  Clock::time_point next_;
  std::atomic<bool> stopped_{false};
};

}  // namespace lc
