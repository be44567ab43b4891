// decay.cuh - the weights of one chunk of tokens, as in cpu/decay.h, in float32. With
// cum_i = L_1 + ... + L_i, L the log-decays in base 2 within the chunk,
//
//   mask(i, j)   = 2^(cum_i - cum_j), j <= i    weight of token j at token i
//   in[i]        = 2^cum_i                      weight of the state before the chunk at token i
//   out[j]       = 2^(cum_last - cum_j)         weight of token j in the state after the chunk
//   total + rest = 2^cum_last                   weight of the state before in the state after
//
// If tokens have lengths, mask(i, j) and out[j] are multiplied by the length of token j. A walk
// backward in time multiplies row i of its outputs by the length of token i instead.
//
// The sums cum are made in float64. Each is stored as two floats, a multiple of 1/64 and the
// remainder: a single float would lose 1e-4 after a step of -160.
#pragma once
#include "segments.cuh"

namespace lc::cuda {

// Loads the log-decays or the lengths of the n tokens of a chunk from token t on, two per lane
// (own: the lane). The values are used later, by ChunkDecay, so that the loads have time. With
// skip_first the first token has 0.
SIMT_DEV float2 load_pair(gptr<const float> from, int64_t stride, int64_t t, int n, int own, bool skip_first = false) {
  const int first = 2 * own;
  const int64_t i = t + first;
  return {first < n && (first || !skip_first) ? from.ld(i * stride) : 0, first + 1 < n ? from.ld((i + 1) * stride) : 0};
}

// Whose weights the lengths of tokens multiply.
enum class Lengths { none, of_inputs, of_outputs };

struct ChunkDecay {
  static constexpr int kNumbers = 4 * kChunk + 4;
  sptr<float> out, length;
  Lengths lengths;
  bool has_unit;

  SIMT_DEV ChunkDecay(sptr<float> memory, Lengths multiply, bool divides)
      : out(memory.sub(0, kChunk)),
        length(memory.sub(kChunk, kChunk)),
        lengths(multiply),
        has_unit(divides && multiply == Lengths::of_inputs),
        cum_(memory.sub(2 * kChunk, 2 * kChunk + 4)) {}

  SIMT_DEV float mask(int i, int j) const {
    const float x = between(i, j);
    return lengths == Lengths::of_inputs ? x * length.ld(j) : x;
  }
  // Weights of tokens i and i + 1 in the state that a backward walk carries into this chunk, before
  // the first token's decay is applied; times their lengths if `with_lengths`.
  struct SinceFirst {
    const ChunkDecay& decay;
    bool with_lengths;
    template <class>
    SIMT_DEV float2 ldv(int i) const {
      const float2 x{decay.between(i, 0), decay.between(i + 1, 0)};
      return with_lengths ? float2{x.x * decay.length.ld(i), x.y * decay.length.ld(i + 1)} : x;
    }
  };
  SIMT_DEV float in(int i) const { return ex2(cum_.ld(i) + cum_.ld(kChunk + i)); }
  SIMT_DEV float total() const { return cum_.ld(2 * kChunk); }
  SIMT_DEV float rest() const { return cum_.ld(2 * kChunk + 1); }
  // A power of two near the greatest length, by which `out` is divided if products are of f16,
  // which has a small range.
  SIMT_DEV float unit() const { return has_unit ? cum_.ld(2 * kChunk + 2) : 1; }

  // Computes the weights from the natural log-decays of n tokens, by one warp. Tokens after them do
  // not decay, nor does the first token with skip_first. Returns the log2 of the decay over the
  // chunk.
  SIMT_DEV double set(const Problem& p, float2 log_decay, int n, bool skip_first = false) const {
    const auto log2 = [&](float x) { return log2_decay(p, p.log_decay ? double(x) : p.uniform_log_decay); };
    const double x0 = 2 * lane() < n && (lane() || !skip_first) ? log2(log_decay.x) : 0;
    const double x1 = 2 * lane() + 1 < n ? log2(log_decay.y) : 0;
    const double second = cumulative(x0 + x1), first = second - x1, last = shfl_idx(second, 31);
    const double high0 = ::rint(first * 64) / 64, high1 = ::rint(second * 64) / 64;
    const int at = 2 * lane();
    cum_.stv(at, float2{float(high0), float(high1)});
    cum_.stv(kChunk + at, float2{float(first - high0), float(second - high1)});
    out.stv(at, float2{ex2(float(last - first)), ex2(float(last - second))});
    // A state is multiplied by 2^last once per chunk, so the rounding error of 2^last would grow
    // with the number of chunks. Where the state decays slowly, total is 1 and rest is the
    // difference to 1.
    const bool slow = last > -0.5;
    if (!lane()) cum_.stv(2 * kChunk, float2{slow ? 1 : ex2(float(last)), slow ? ex2m1(float(last)) : 0});
    return last;
  }
  // Multiplies the weights by the lengths of two tokens per lane, by the warp that has called
  // `set`.
  SIMT_DEV void set_lengths(float2 own) const {
    const int at = 2 * lane();
    length.stv(at, own);
    if (lengths != Lengths::of_inputs) return;
    if (has_unit) {
      const float u = power_near(warp_max(own.x > own.y ? own.x : own.y));
      if (!lane()) cum_.st(2 * kChunk + 2, u);
      own = {own.x / u, own.y / u};
    }
    const auto x = out.ldv<float2>(at);
    out.stv(at, float2{x.x * own.x, x.y * own.y});
  }

 private:
  // 2^(cum_i - cum_j), j <= i.
  SIMT_DEV float between(int i, int j) const {
    const float high = cum_.ld(i) - cum_.ld(j), low = cum_.ld(kChunk + i) - cum_.ld(kChunk + j);
    const float x = high + low;
    return ex2(x < 0 ? x : 0);
  }
  // The greatest power of two that is at most x; 1 for 0, infinity and NaN.
  static SIMT_DEV float power_near(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    u &= 0x7f800000u;
    if (!u || u == 0x7f800000u) u = 0x3f800000u;
    std::memcpy(&x, &u, sizeof x);
    return x;
  }

  sptr<float> cum_;  // high parts, low parts, total, rest, unit
};

}  // namespace lc::cuda
