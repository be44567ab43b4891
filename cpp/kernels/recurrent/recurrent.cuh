// recurrent.cuh - GPU: token by token, 32 at a time: a lane is four tokens, and eight lanes scan a number of the state.
//
//   S_t = 2^L_t S_{t-1} + k_t v_t^T by a scan: 3 steps in a lane, 3 across lanes;   o_t = scale q_t^T S_t
//
//   L: log2 decays. Q^T, K^T [32 ranks, 32], V^T [32 columns, 32] of a tile and S [K, 32] in shared memory, as numbers
//   of the accumulator's type T
//   block: 4 warps, 8 of 32 columns each, for one q head; (3 * 32 * 36 + 32 K) T bytes
//   a warp: four columns side by side, and of those two columns x two ranks one after another: four scans under way
//   B N H 8.5 K V flop, K V / 8 shuffles a token: for short sequences, small head dims, float64
//   Katharopoulos et al. 2020, arXiv:2006.16236; scans: Martin and Cundy 2018, arXiv:1709.04057
#pragma once
#include "../../cuda/problem.cuh"
#include "../../cuda/staging.cuh"

namespace lc::cuda {

template <class E>
struct RecurrentForward {
  using T = Accumulator<E>;
  static constexpr const char* kName = "recurrent forward";
  static constexpr int kTokens = 32, kRanks = 32, kColumns = 32;
  static constexpr int kOwn = 2, kLanes = 8, kSteps = 3;  // columns of a lane; lanes of a scan, and its steps
  static constexpr int kMaxThreads = kColumns / kOwn * kLanes, kMinBlocks = sizeof(T) == 8 ? 2 : 4;
  static constexpr int kTile = kRanks * padded(kTokens);
  struct Params {
    Problem p;
    int heads;  // q heads of one block, all of one state
  };
  static LC_INLINE int64_t pieces(const Problem& p) { return (p.V + kColumns - 1) / kColumns; }
  static LC_INLINE int64_t rows(const Problem& p) { return (p.K + 1) / 2 * 2; }  // two ranks go together
  static int64_t shared_bytes(const Problem& p) { return (3 * kTile + rows(p) * kColumns) * int64_t(sizeof(T)); }

  static SIMT_DEV void run(const Params& a) {
    using Four = Packed<T, 4>;
    using Own = Packed<T, kOwn>;
    const Problem& p = a.p;
    Smem smem;
    const auto q = smem.alloc<T>(kTile, sizeof(Four)), k = smem.alloc<T>(kTile, sizeof(Four));
    const auto v = smem.alloc<T>(kTile, sizeof(Four)), S = smem.alloc<T>(int(rows(p)) * kColumns);
    const int64_t parts = group(p) / a.heads, block = bid().x / pieces(p), c0 = bid().x % pieces(p) * kColumns;
    const int64_t part = block % parts, hs = block / parts % p.Hs, b = block / parts / p.Hs;
    const int columns = int(p.V - c0 < kColumns ? p.V - c0 : kColumns);
    const int of_scan = lane() % kLanes, token = 4 * of_scan, column = tid() / kLanes * kOwn;
    const Sequence s = sequence_at(p, b);

    for (int64_t h = hs * group(p) + part * a.heads, end = h + a.heads; h < end; ++h) {
      for (int i = tid(); i < int(rows(p)) * kColumns; i += nthreads()) {
        const int r = i / kColumns, c = i % kColumns;
        const bool given = p.initial_state && r < p.K && c < columns;
        S.st(i, given ? row<const T>(p.initial_state, b, hs, r).ld(c0 + c) : T(0));
      }
      for (int64_t t = 0; t < s.length; t += kTokens) {
        const int n = int(s.length - t < kTokens ? s.length - t : kTokens);
        const Weights weight(p, s, hs, t + token, n - token);
        Four own_v[kOwn];
        T o[kOwn][4] = {};
        for (int r0 = 0; r0 < p.K; r0 += kRanks) {
          const int ranks = int(p.K - r0 < kRanks ? p.K - r0 : kRanks);
          sync_cta();
          stage_columns<kTokens, kRanks>(q, row<const E>(p.q, s.row, q_head(p, h), s.begin + t).sub(r0), p.q.stride[2],
                                         n, ranks);
          stage_columns<kTokens, kRanks>(k, row<const E>(p.k, s.row, k_head(p, hs), s.begin + t).sub(r0), p.k.stride[2],
                                         n, ranks);
          if (!r0)
            stage_columns<kTokens, kColumns>(v, row<const E>(p.v, s.row, v_head(p, hs), s.begin + t).sub(c0),
                                             p.v.stride[2], n, columns);
          sync_cta();
          if (!r0) {
            SIMT_UNROLL
            for (int j = 0; j < kOwn; ++j) own_v[j] = v.template ldv<Four>((column + j) * padded(kTokens) + token);
          }
          for (int r = 0; r < ranks; r += 2) {
            Four key[2];
            T x[2][kOwn][4], sum[2][kOwn];  // of this lane's tokens; at its last token, of the lanes before too
            SIMT_UNROLL
            for (int u = 0; u < 2; ++u) {
              key[u] = k.template ldv<Four>((r + u) * padded(kTokens) + token);
              SIMT_UNROLL
              for (int j = 0; j < kOwn; ++j) {
                x[u][j][0] = key[u].x[0] * own_v[j].x[0];
                SIMT_UNROLL
                for (int i = 1; i < 4; ++i)
                  x[u][j][i] = mul_add(weight.step[i], x[u][j][i - 1], key[u].x[i] * own_v[j].x[i]);
                sum[u][j] = x[u][j][3];
              }
            }
            SIMT_UNROLL
            for (int i = 0; i < kSteps; ++i) {
              SIMT_UNROLL
              for (int u = 0; u < 2; ++u) {
                SIMT_UNROLL
                for (int j = 0; j < kOwn; ++j) {
                  const T y = shfl_up(sum[u][j], 1 << i);
                  if (of_scan >= 1 << i) sum[u][j] = mul_add(weight.across[i], y, sum[u][j]);
                }
              }
            }
            Own after[2];
            SIMT_UNROLL
            for (int u = 0; u < 2; ++u) {
              const Own before = S.template ldv<Own>((r0 + r + u) * kColumns + column);
              const Four query = q.template ldv<Four>((r + u) * padded(kTokens) + token);
              SIMT_UNROLL
              for (int j = 0; j < kOwn; ++j) {
                const T y = shfl_up(sum[u][j], 1);
                const T start = mul_add(weight.before, before.x[j], of_scan ? y : T(0));
                SIMT_UNROLL
                for (int i = 0; i < 4; ++i)
                  o[j][i] = mul_add(query.x[i], mul_add(weight.within[i], start, x[u][j][i]), o[j][i]);
                after[u].x[j] = before.x[j] + mul_add(weight.total_minus_1, before.x[j], sum[u][j]);
              }
            }
            sync_warp();
            if (of_scan == kLanes - 1) {
              SIMT_UNROLL
              for (int u = 0; u < 2; ++u) S.stv((r0 + r + u) * kColumns + column, after[u]);
            }
          }
        }
        SIMT_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (token + i >= n) continue;
          const auto to = row<E>(p.o, s.row, h, s.begin + t + token + i);
          SIMT_UNROLL
          for (int j = 0; j < kOwn; ++j)
            if (column + j < columns) to.st(c0 + column + j, narrow<E>(o[j][i] * T(p.scale)));
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
  // What decays leave of a state, for one lane of a scan.
  struct Weights {
    T step[4];         // from the token before to token i
    T within[4];       // from before the lane's first token to token i
    T across[kSteps];  // from the last token of the lane 2^i before to the last one here
    T before;          // from before the tile to before the lane's first token
    T total_minus_1;   // over the tile, less 1: added to the state, as the error of 2^L would grow with N

    // Of the lane with the n tokens from token t on; what is not there decays by nothing.
    SIMT_DEV Weights(const Problem& p, const Sequence& s, int64_t hs, int64_t t, int n) {
      double sum = 0;
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const double log2 = i < n ? log2_decay_at(p, s.row, hs, s.begin + t + i) : 0;
        sum += log2;
        step[i] = ex2(T(log2)), within[i] = ex2(T(sum));
      }
      const int of_scan = lane() % kLanes;
      SIMT_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        const double y = shfl_up(sum, 1 << i);
        if (of_scan >= 1 << i) sum += y;
      }
      SIMT_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        const double log2 = sum - shfl_up(sum, 1 << i);
        across[i] = ex2(T(log2 < 0 ? log2 : 0));
      }
      const double log2 = shfl_up(sum, 1);
      before = of_scan ? ex2(T(log2)) : T(1);
      total_minus_1 = T(ex2m1(shfl_idx(sum, lane() | (kLanes - 1))));
    }
  };
};

}  // namespace lc::cuda
