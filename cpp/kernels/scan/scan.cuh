// scan.cuh - GPU: states of segments become states before segments, one thread a number.
//
//   S_i+1 <- 2^(sum L over segment i) S_i + S_i+1,   S_0 the initial state
//
//   states [slot, Hs, K, V], of each segment on its own before, before each segment after; log2 [slot, Hs]
//   grid: (256 numbers, sequence and state); 2 K V flop for each segment
//   parallel scans of linear recurrences, Martin and Cundy 2018, arXiv:1709.04057
#pragma once
#include "../../cuda/segments.cuh"

namespace lc::cuda {

struct ScanStates {
  static constexpr const char* kName = "scan states";
  static constexpr int kMaxThreads = 256, kMinBlocks = 4, kAhead = 4;
  struct Params {
    Problem p;
    Segments cut;
    float* states;
    const double* log2;
  };

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    const int64_t size = p.K * p.V, pieces = (size + kMaxThreads - 1) / kMaxThreads, pair = int64_t(bid().x) / pieces;
    const int64_t b = pair / p.Hs, hs = pair % p.Hs, at = int64_t(bid().x) % pieces * kMaxThreads + tid();
    if (at >= size) return;
    const Sequence s = sequence_at(p, b);
    const int64_t slot = a.cut.first_slot(p, b), step = p.Hs * size;
    // Of heads that forget a segment within one only the initial state is read.
    const int64_t count = memory(p, a.cut, s, hs) ? 1 : a.cut.count(s);
    const gptr<float> states = gptr<float>{a.states}.sub((slot * p.Hs + hs) * size + at);
    const gptr<const double> log2 = gptr<const double>{a.log2}.sub(slot * p.Hs + hs);
    float state = p.initial_state ? row<const float>(p.initial_state, b, hs, at / p.V).ld(at % p.V) : 0;
    for (int64_t i = 0; i < count; i += kAhead) {
      float own[kAhead];
      SIMT_UNROLL
      for (int j = 0; j < kAhead; ++j) own[j] = i + j + 1 < count ? states.ld((i + j) * step) : 0;
      SIMT_UNROLL
      for (int j = 0; j < kAhead; ++j) {
        if (i + j >= count) continue;
        states.st((i + j) * step, state);
        if (i + j + 1 < count) state += mul_add(ex2m1(float(log2.ld((i + j) * p.Hs))), state, own[j]);
      }
    }
  }
};

}  // namespace lc::cuda
