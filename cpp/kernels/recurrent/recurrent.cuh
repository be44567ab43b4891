// recurrent.cuh - GPU: the recurrence, 32 tokens at a time. Eight lanes scan a number of the state.
//
//   S_t = 2^L_t S_{t-1} + k_t v_t^T by a scan: 3 steps in a lane with four tokens, 3 across lanes
//   o_t = scale q_t^T S_t, then skip and gate; v_t times the length of t         L: log2 decays
//
//   Shared memory has Q^T, K^T [32 ranks, 32 tokens] and V^T [32 columns, 32 tokens] of a tile, and
//   S [K, 32], in the accumulator's type T: (3 * 32 * 36 + 32 K) T bytes
//   block: 4 warps of 8 columns for one q head. A lane has two columns and two ranks in flight
//   B N H 8.5 K V flop, K V / 8 shuffles per token: for short sequences, small head dims, float64
//   Katharopoulos et al. 2020, arXiv:2006.16236; scans: Martin and Cundy 2018, arXiv:1709.04057
#pragma once
#include "../../cuda/lengths.cuh"
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
  static LC_INLINE int64_t slices(const Problem& p) { return (p.V + kColumns - 1) / kColumns; }
  static LC_INLINE int64_t rows(const Problem& p) { return (p.K + 1) / 2 * 2; }  // two ranks go together
  static int64_t shared_bytes(const Problem& p) { return (3 * kTile + rows(p) * kColumns) * int64_t(sizeof(T)); }

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    const Block block(a);
    for (int64_t h = block.first_head, end = h + a.heads; h < end; ++h) {
      load_state(p, block);
      for (int64_t t = 0; t < block.s.length; t += kTokens) {
        const int n = int(block.s.length - t < kTokens ? block.s.length - t : kTokens);
        const Weights weight(p, block.s, block.hs, t + token(), n - token());
        Four own_v[kOwn];
        T o[kOwn][4] = {};
        for (int r0 = 0; r0 < p.K; r0 += kRanks) {
          const int ranks = int(p.K - r0 < kRanks ? p.K - r0 : kRanks);
          stage(p, block, h, t, n, r0, ranks);
          if (!r0) {
            SIMT_UNROLL
            for (int j = 0; j < kOwn; ++j)
              own_v[j] = block.v.template ldv<Four>((column() + j) * padded(kTokens) + token());
            if (p.dt) multiply_by_lengths(p, block, t + token(), n - token(), own_v);
          }
          for (int r = 0; r < ranks; r += 2) scan(block, weight, own_v, r0, r, o);
        }
        write_outputs(p, block, h, t, n, o);
      }
      sync_cta();
      if (p.final_state && h + 1 == end && !block.part) write_state(p, block);
      sync_cta();
    }
  }

 private:
  using Four = Packed<T, 4>;
  using Own = Packed<T, kOwn>;

  // A lane's place in its scan, its first token in a tile and its first column.
  static SIMT_DEV int of_scan() { return lane() % kLanes; }
  static SIMT_DEV int token() { return 4 * of_scan(); }
  static SIMT_DEV int column() { return tid() / kLanes * kOwn; }

  // The part of the problem that a block has, and its shared memory.
  struct Block {
    sptr<T> q, k;  // [kRanks, kTokens] of a tile
    sptr<T> v;     // [kColumns, kTokens] of a tile
    sptr<T> S;     // [rows, kColumns]
    int64_t c0, part, hs, b, first_head;
    int columns;
    Sequence s;
    SIMT_DEV explicit Block(const Params& a) {
      const Problem& p = a.p;
      Smem smem;
      q = smem.alloc<T>(kTile, sizeof(Four));
      k = smem.alloc<T>(kTile, sizeof(Four));
      v = smem.alloc<T>(kTile, sizeof(Four));
      S = smem.alloc<T>(int(rows(p)) * kColumns);
      const int64_t parts = group(p) / a.heads, block = bid().x / slices(p);
      c0 = bid().x % slices(p) * kColumns;
      part = block % parts;
      hs = block / parts % p.Hs;
      b = block / parts / p.Hs;
      first_head = hs * group(p) + part * a.heads;
      columns = int(p.V - c0 < kColumns ? p.V - c0 : kColumns);
      s = sequence_at(p, b);
    }
  };

  // Decays of a state, for one lane of a scan.
  struct Weights {
    T step[4];         // from the previous token to token i
    T within[4];       // from before the lane's first token to token i
    T across[kSteps];  // from the last token of the lane 2^i before to this lane's last token
    T before;          // from before the tile to before the lane's first token
    T total_minus_1;   // over the tile, minus 1: the rounding error of 2^L itself would grow with N

    // For a lane with n tokens from token t on. Tokens after them do not decay.
    SIMT_DEV Weights(const Problem& p, const Sequence& s, int64_t hs, int64_t t, int n) {
      double sum = 0;
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const double log2 = i < n ? log2_decay_at(p, s.row, hs, s.begin + t + i) : 0;
        sum += log2;
        step[i] = ex2(T(log2));
        within[i] = ex2(T(sum));
      }
      SIMT_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        const double y = shfl_up(sum, 1 << i);
        if (of_scan() >= 1 << i) sum += y;
      }
      SIMT_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        const double log2 = sum - shfl_up(sum, 1 << i);
        across[i] = ex2(T(log2 < 0 ? log2 : 0));
      }
      const double log2 = shfl_up(sum, 1);
      before = of_scan() ? ex2(T(log2)) : T(1);
      total_minus_1 = T(ex2m1(shfl_idx(sum, lane() | (kLanes - 1))));
    }
  };
  static SIMT_DEV void multiply_by_lengths(const Problem& p, const Block& b, int64_t t, int n, Four (&own_v)[kOwn]) {
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const T length = i < n ? row<const T>(p.dt, b.s.row, b.hs, b.s.begin + t + i).ld(0) : T(0);
      SIMT_UNROLL
      for (int j = 0; j < kOwn; ++j) own_v[j].x[i] *= length;
    }
  }
  static SIMT_DEV void load_state(const Problem& p, const Block& b) {
    for (int i = tid(); i < int(rows(p)) * kColumns; i += nthreads()) {
      const int r = i / kColumns, c = i % kColumns;
      const bool given = p.initial_state && r < p.K && c < b.columns;
      const int64_t at = (b.c0 + c) * p.initial_state.stride[3];
      b.S.st(i, given ? row<const T>(p.initial_state, b.b, b.hs, r).ld(at) : T(0));
    }
  }
  static SIMT_DEV void write_state(const Problem& p, const Block& b) {
    for (int i = tid(); i < int(p.K) * kColumns; i += nthreads()) {
      const int64_t at = (b.c0 + i % kColumns) * p.final_state.stride[3];
      if (i % kColumns < b.columns) row<T>(p.final_state, b.b, b.hs, i / kColumns).st(at, b.S.ld(i));
    }
  }

  // Copies q and k of n tokens from token t on, ranks [r0, r0 + ranks), to shared memory, and v
  // with the first ranks.
  static SIMT_DEV void stage(const Problem& p, const Block& b, int64_t h, int64_t t, int n, int r0, int ranks) {
    const int64_t at = b.s.begin + t;
    sync_cta();
    stage_columns<kTokens, kRanks>(b.q, row<const E>(p.q, b.s.row, q_head(p, h), at).sub(r0), p.q.stride[2], n, ranks);
    stage_columns<kTokens, kRanks>(b.k, row<const E>(p.k, b.s.row, k_head(p, b.hs), at).sub(r0), p.k.stride[2], n,
                                   ranks);
    if (!r0)
      stage_columns<kTokens, kColumns>(b.v, row<const E>(p.v, b.s.row, v_head(p, b.hs), at).sub(b.c0), p.v.stride[2], n,
                                       b.columns);
    sync_cta();
  }

  // Takes ranks r0 + r and r0 + r + 1 of the state through the tile, and adds their part of the
  // outputs to o.
  static SIMT_DEV void scan(const Block& b, const Weights& weight, const Four (&own_v)[kOwn], int r0, int r,
                            T (&o)[kOwn][4]) {
    T x[2][kOwn][4];  // states at this lane's tokens, from the lane's own tokens only
    T sum[2][kOwn];   // the state at the lane's last token, from the tokens of this lane and of the lanes before
    SIMT_UNROLL
    for (int u = 0; u < 2; ++u) {
      const Four key = b.k.template ldv<Four>((r + u) * padded(kTokens) + token());
      SIMT_UNROLL
      for (int j = 0; j < kOwn; ++j) {
        x[u][j][0] = key.x[0] * own_v[j].x[0];
        SIMT_UNROLL
        for (int i = 1; i < 4; ++i) x[u][j][i] = mul_add(weight.step[i], x[u][j][i - 1], key.x[i] * own_v[j].x[i]);
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
          if (of_scan() >= 1 << i) sum[u][j] = mul_add(weight.across[i], y, sum[u][j]);
        }
      }
    }
    Own after[2];
    SIMT_UNROLL
    for (int u = 0; u < 2; ++u) after[u] = read(b, weight, x[u], sum[u], r0, r + u, o);
    sync_warp();
    if (of_scan() == kLanes - 1) {
      SIMT_UNROLL
      for (int u = 0; u < 2; ++u) b.S.stv((r0 + r + u) * kColumns + column(), after[u]);
    }
  }

  // Adds the part of rank r0 + r to the outputs o. Returns the state after this lane.
  static SIMT_DEV Own read(const Block& b, const Weights& weight, const T (&x)[kOwn][4], const T (&sum)[kOwn], int r0,
                           int r, T (&o)[kOwn][4]) {
    const Own before = b.S.template ldv<Own>((r0 + r) * kColumns + column());
    const Four query = b.q.template ldv<Four>(r * padded(kTokens) + token());
    Own after;
    SIMT_UNROLL
    for (int j = 0; j < kOwn; ++j) {
      const T y = shfl_up(sum[j], 1);
      const T start = mul_add(weight.before, before.x[j], of_scan() ? y : T(0));
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) o[j][i] = mul_add(query.x[i], mul_add(weight.within[i], start, x[j][i]), o[j][i]);
      after.x[j] = before.x[j] + mul_add(weight.total_minus_1, before.x[j], sum[j]);
    }
    return after;
  }

  static SIMT_DEV void write_outputs(const Problem& p, const Block& b, int64_t h, int64_t t, int n,
                                     const T (&o)[kOwn][4]) {
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (token() + i >= n) continue;
      const int64_t n_of_row = b.s.begin + t + token() + i, c0 = b.c0 + column();
      const auto to = row<E>(p.o, b.s.row, h, n_of_row);
      SIMT_UNROLL
      for (int j = 0; j < kOwn; ++j) {
        if (column() + j >= b.columns) continue;
        T x = o[j][i] * T(p.scale);
        if (p.skip) x = mul_add(skip_at<T>(p, h, c0 + j), b.v.ld((column() + j) * padded(kTokens) + token() + i), x);
        if (p.gate) x *= silu(T(widen(row<const E>(p.gate, b.s.row, h, n_of_row).ld(c0 + j))));
        to.st(c0 + j, narrow<E>(x));
      }
    }
  }
};

}  // namespace lc::cuda
