// recurrent.cuh - GPU: token by token, 32 at a time: a lane is a token, and a warp scans one number of the state.
//
//   x_t = k_tr v_tc;   S_t = 2^L_t S_{t-1} + x_t by a scan of 5 steps;   o_tc = scale sum_r q_tr S_t       L: log2
//   decays
//
//   Q, K [32, 32 ranks] and V [32, 32] of a tile and S [K, 32] in shared memory, as numbers of the accumulator's type T
//   block: 4 warps, 8 of 32 columns each, for one q head; (2 * 32 * 33 + 32 * 33 + 32 K) T bytes
//   B N H (12 + 2) K V flop, 5 K V shuffles a token: for short sequences, small head dims, float64
//   Katharopoulos et al. 2020, arXiv:2006.16236; scans: Martin and Cundy 2018, arXiv:1709.04057
#pragma once
#include "../../cuda/problem.cuh"

namespace lc::cuda {

template <class E>
struct RecurrentForward {
  using T = Accumulator<E>;
  static constexpr const char* kName = "recurrent forward";
  static constexpr int kTokens = 32, kRanks = 32, kColumns = 32, kOwn = 8;  // kOwn: columns of one warp
  static constexpr int kMaxThreads = 32 * kColumns / kOwn, kMinBlocks = 2, kStride = 33;
  struct Params {
    Problem p;
    int heads;  // q heads of one block, all of one state
  };
  static int shared_bytes(const Problem& p) { return (3 * kTokens * kStride + int(p.K) * kColumns) * int(sizeof(T)); }

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    Smem smem;
    const auto q = smem.alloc<T>(kTokens * kStride), k = smem.alloc<T>(kTokens * kStride);
    const auto v = smem.alloc<T>(kTokens * kStride), S = smem.alloc<T>(int(p.K) * kColumns);
    const int64_t pieces = (p.V + kColumns - 1) / kColumns, parts = group(p) / a.heads;
    const int64_t block = bid().x, c0 = block % pieces * kColumns, part = block / pieces % parts;
    const int64_t hs = block / pieces / parts % p.Hs, b = block / pieces / parts / p.Hs;
    const int columns = int(p.V - c0 < kColumns ? p.V - c0 : kColumns), first = warp() * kOwn;
    const Sequence s = sequence_at(p, b);

    for (int64_t h = hs * group(p) + part * a.heads, end = h + a.heads; h < end; ++h) {
      for (int i = tid(); i < int(p.K) * kColumns; i += nthreads()) {
        const int r = i / kColumns, c = i % kColumns;
        S.st(i, p.initial_state && c < columns ? row<const T>(p.initial_state, b, hs, r).ld(c0 + c) : T(0));
      }
      for (int64_t t = 0; t < s.length; t += kTokens) {
        const int n = int(s.length - t < kTokens ? s.length - t : kTokens);
        const double log2 = lane() < n ? log2_decay_at(p, s.row, hs, s.begin + t + lane()) : 0;
        const double cum = cumulative(log2);
        const T in_minus_1 = T(ex2m1(cum));  // added, not multiplied by: the error of 2^L would grow with N
        T power[5];                          // [i]: token t - 2^i at token t
        SIMT_UNROLL
        for (int i = 0; i < 5; ++i) {
          const double before = shfl_up(cum, 1 << i);
          power[i] = ex2(T(cum - before < 0 ? cum - before : 0));
        }

        T o[kOwn] = {};
        for (int r0 = 0; r0 < p.K; r0 += kRanks) {
          const int ranks = int(p.K - r0 < kRanks ? p.K - r0 : kRanks);
          sync_cta();
          load(q, row<const E>(p.q, s.row, q_head(p, h), s.begin + t).sub(r0), p.q.stride[2], n, ranks);
          load(k, row<const E>(p.k, s.row, k_head(p, hs), s.begin + t).sub(r0), p.k.stride[2], n, ranks);
          if (!r0) load(v, row<const E>(p.v, s.row, v_head(p, hs), s.begin + t).sub(c0), p.v.stride[2], n, columns);
          sync_cta();
          SIMT_UNROLL
          for (int j = 0; j < kOwn; ++j) {
            const T own = v.ld(lane() * kStride + first + j);
            for (int r = 0; r < ranks; ++r) {
              const int at = (r0 + r) * kColumns + first + j;
              T x = k.ld(lane() * kStride + r) * own;
              SIMT_UNROLL
              for (int i = 0; i < 5; ++i) {
                const T y = shfl_up(x, 1 << i);
                if (lane() >= 1 << i) x = mul_add(power[i], y, x);
              }
              const T before = S.ld(at);
              x = before + mul_add(in_minus_1, before, x);
              o[j] = mul_add(q.ld(lane() * kStride + r), x, o[j]);
              sync_warp();
              if (lane() == 31) S.st(at, x);  // rows past the sequence are zero and decay by nothing
            }
          }
        }
        if (lane() < n) {
          const auto to = row<E>(p.o, s.row, h, s.begin + t + lane());
          SIMT_UNROLL
          for (int j = 0; j < kOwn; ++j)
            if (first + j < columns) to.st(c0 + first + j, narrow<E>(o[j] * T(p.scale)));
        }
      }
      sync_cta();
      if (p.final_state && h + 1 == end && !part)
        for (int i = tid(); i < int(p.K) * kColumns; i += nthreads())
          if (i % kColumns < columns) row<T>(p.final_state, b, hs, i / kColumns).st(c0 + i % kColumns, S.ld(i));
      sync_cta();
    }
  }

 private:
  // n rows of a tile, zeros behind them and behind their `columns` numbers.
  static SIMT_DEV void load(sptr<T> to, gptr<const E> from, int64_t stride, int n, int columns) {
    for (int i = tid(); i < kTokens * 32; i += nthreads()) {
      const int row = i / 32, column = i % 32;
      to.st(row * kStride + column, row < n && column < columns ? widen(from.ld(row * stride + column)) : T(0));
    }
  }
};

}  // namespace lc::cuda
