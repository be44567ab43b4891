// scan_states.cuh - GPU: states of segments become states before segments, one thread a number.
//
//   S_i+1 <- 2^(sum L over segment i) S_i + S_i+1,   S_0 the initial state; backward in time from the last segment
//
//   states [slot, Hs, K, V], of each segment on its own before, before each segment after; log2 [slot, Hs]
//   grid: (256 numbers, sequence and state); 2 K V flop for each segment
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

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    const Walk& w = a.walk;
    const Segments cut{w.length};
    const int64_t size = p.K * p.V, pieces = (size + kMaxThreads - 1) / kMaxThreads, pair = int64_t(bid().x) / pieces;
    const int64_t b = pair / p.Hs, hs = pair % p.Hs, at = int64_t(bid().x) % pieces * kMaxThreads + tid();
    if (at >= size) return;
    const Sequence s = sequence_at(p, b);
    const int64_t segments = cut.count(s), slot = cut.first_slot(p, b) + (w.backward ? segments - 1 : 0);
    const int64_t step = (w.backward ? -1 : 1) * p.Hs;
    // Of heads that forget a segment within one only the initial state is read.
    const int64_t count = memory(p, cut, s, hs / w.share) ? 1 : segments;
    const gptr<float> states = gptr<float>{w.after}.sub((slot * p.Hs + hs) * size + at);
    const gptr<const double> log2 = gptr<const double>{w.log2}.sub(slot * p.Hs + hs);
    float state = 0;
    if (p.initial_state && hs % w.share == 0) {
      const int64_t columns = w.turned ? p.K : p.V;
      state = row<const float>(p.initial_state, b, hs / w.share, at / columns).ld(at % columns);
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

// What comes after walk(p, alone).
inline void scan_states(const Problem& p, const Walk& alone) {
  const int64_t pieces = (p.K * p.V + ScanStates::kMaxThreads - 1) / ScanStates::kMaxThreads;
  start<ScanStates>(p, dim3(unsigned(p.B * p.Hs * pieces)), ScanStates::kMaxThreads, 0, {p, alone});
}

}  // namespace lc::cuda
