// decay.cuh - the weights of one chunk of tokens, as cpu/decay.h has them, in float32. With cum_i = L_1 + ... + L_i,
// L the log-decays in base 2, within the chunk,
//
//   mask(i, j) = 2^(cum_i - cum_j), j <= i      token j at token i
//   in[i]      = 2^cum_i                        the state before the chunk at token i
//   out[j]     = 2^(cum_last - cum_j)           token j in the state after the chunk
//   total      = 2^cum_last                     the state before in the state after, as a sum, total + rest
//
// Sums are made in float64 and kept as two floats, a multiple of 1/64 and the rest: one alone would lose 1e-4 after a
// step of -160.
#pragma once
#include "segments.cuh"

namespace lc::cuda {

// The log-decays of the n tokens of a chunk as loaded, two a lane (own: which lane this is): the loads have time until
// they become weights. Where the first token is `still`, it has none.
SIMT_DEV float2 load_decay(gptr<const float> from, int64_t stride, int64_t t, int n, int own, bool still = false) {
  const int first = 2 * own;
  const int64_t i = t + first;
  return {first < n && (first || !still) ? from.ld(i * stride) : 0, first + 1 < n ? from.ld((i + 1) * stride) : 0};
}

struct ChunkDecay {
  static constexpr int kNumbers = 4 * kChunk + 4;
  sptr<float> in, out;

  SIMT_DEV explicit ChunkDecay(sptr<float> memory)
      : in(memory.sub(0, kChunk)), out(memory.sub(kChunk, kChunk)), cum_(memory.sub(2 * kChunk, 2 * kChunk + 4)) {}

  SIMT_DEV float mask(int i, int j) const {
    const float high = cum_.ld(i) - cum_.ld(j), low = cum_.ld(kChunk + i) - cum_.ld(kChunk + j);
    const float x = high + low;
    return ex2(x < 0 ? x : 0);
  }
  // Of two tokens, what their weight is in the state before this chunk backward in time, but for the first decay.
  struct SinceFirst {
    const ChunkDecay& decay;
    template <class>
    SIMT_DEV float2 ldv(int i) const {
      return {decay.mask(i, 0), decay.mask(i + 1, 0)};
    }
  };
  SIMT_DEV float total() const { return cum_.ld(2 * kChunk); }
  SIMT_DEV float rest() const { return cum_.ld(2 * kChunk + 1); }

  // By one warp, from the natural logs of n tokens; those behind them do not decay, nor does the first if it is
  // `still`. The log2 of all together.
  SIMT_DEV double set(const Problem& p, float2 log_decay, int n, bool still = false) const {
    const auto log2 = [&](float x) { return log2_decay(p, p.log_decay ? double(x) : p.uniform_log_decay); };
    const double x0 = 2 * lane() < n && (lane() || !still) ? log2(log_decay.x) : 0;
    const double x1 = 2 * lane() + 1 < n ? log2(log_decay.y) : 0;
    const double second = cumulative(x0 + x1), first = second - x1, last = shfl_idx(second, 31);
    const double high0 = ::rint(first * 64) / 64, high1 = ::rint(second * 64) / 64;
    const int at = 2 * lane();
    cum_.stv(at, float2{float(high0), float(high1)});
    cum_.stv(kChunk + at, float2{float(first - high0), float(second - high1)});
    in.stv(at, float2{ex2(float(first)), ex2(float(second))});
    out.stv(at, float2{ex2(float(last - first)), ex2(float(last - second))});
    // A product with 2^last would round, and it is raised to the power of the number of chunks: where the state decays
    // slowly the difference to 1 is added.
    const bool slow = last > -0.5;
    if (!lane()) cum_.stv(2 * kChunk, float2{slow ? 1 : ex2(float(last)), slow ? ex2m1(float(last)) : 0});
    return last;
  }

 private:
  sptr<float> cum_;  // high, low, and the total
};

}  // namespace lc::cuda
