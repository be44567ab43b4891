// scan_states.cuh - GPU: turns the states of single segments into the states before segments, one
// thread per number.
//
//   S_i+1 <- 2^(sum L over segment i) S_i + S_i+1      S_0: the initial state
//
//   A walk backward in time starts from the last segment. states [slot, Hs, K, V]: on entry the
//   state of each segment from zero, on return the state before it; log2 [slot, Hs]
//   grid: (256 numbers, sequence and state); 2 K V flop per segment
//   parallel scans of linear recurrences, Martin and Cundy 2018, arXiv:1709.04057
#pragma once
#include "launch.h"
#include "segments.cuh"

namespace lc::cuda {

struct ScanStates {
  static constexpr const char* kName = "scan states";
  static constexpr int kMaxThreads = 256, kMinBlocks = 4, kAhead = 4;
  struct Params {
    Problem p;
    Walk walk;
  };
  static LC_INLINE int64_t blocks_per_state(const Problem& p) { return (p.K * p.V + kMaxThreads - 1) / kMaxThreads; }

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    const Walk& w = a.walk;
    const Segments cut{w.length};
    const int64_t size = p.K * p.V, blocks = blocks_per_state(p), pair = int64_t(bid().x) / blocks;
    const int64_t b = pair / p.Hs, hs = pair % p.Hs, at = int64_t(bid().x) % blocks * kMaxThreads + tid();
    if (at >= size) return;
    const Sequence s = sequence_at(p, b);
    const int64_t segments = cut.count(s), slot = cut.first_slot(p, b) + (w.backward ? segments - 1 : 0);
    const int64_t step = (w.backward ? -1 : 1) * p.Hs;
    // Heads that forget a segment within a segment read only the initial state.
    const int64_t count = horizon(p, cut, s, hs / w.share) ? 1 : segments;
    const gptr<float> states = gptr<float>{w.after}.sub((slot * p.Hs + hs) * size + at);
    const gptr<const double> log2 = gptr<const double>{w.log2}.sub(slot * p.Hs + hs);
    float state = 0;
    if (p.initial_state && hs % w.share == 0) {
      const int64_t columns = w.transposed ? p.K : p.V;
      state =
          row<const float>(p.initial_state, b, hs / w.share, at / columns).ld(at % columns * p.initial_state.stride[3]);
    }
    for (int64_t i = 0; i < count; i += kAhead) {
      float own[kAhead];
      SIMT_UNROLL
      for (int j = 0; j < kAhead; ++j) own[j] = i + j + 1 < count ? states.ld((i + j) * step * size) : 0;
      SIMT_UNROLL
      for (int j = 0; j < kAhead; ++j) {
        if (i + j >= count) continue;
        states.st((i + j) * step * size, state);
        if (i + j + 1 < count) state += mul_add(ex2m1(float(log2.ld((i + j) * step))), state, own[j]);
      }
    }
  }
};

// Runs after walk(p, w) with w.states_only.
inline void scan_states(const Problem& p, const Walk& w) {
  const int64_t blocks = p.B * p.Hs * ScanStates::blocks_per_state(p);
  start<ScanStates>(p, dim3(unsigned(blocks)), ScanStates::kMaxThreads, 0, {p, w});
}

}  // namespace lc::cuda
