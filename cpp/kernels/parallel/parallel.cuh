// parallel.cuh - GPU: the quadratic form, in tiles of 64 x 64 scores that stay in shared memory.
//
//   o_i = scale (sum_{j <= i} 2^(G_i - G_j) (q_i.k_j) v_j + 2^G_i q_i S_0)   G: sums of log2 decays
//   S_N = sum_j 2^(G_N - G_j) k_j v_j^T + 2^G_N S_0
//
//   A block goes from its own tile of tokens back to the first, or until all weights are 0. An
//   exponent is the sum of the query's in its tile, the key's to the end of its tile, and a running
//   double
//   block: 256 threads with 4 x 4 numbers of every product, for [64, 128] outputs; a second launch
//   computes [64 ranks, 128] of S_N. (2 * 64 * 68 + 64) T bytes
//   B H N (N+1)(K+V) flop, FMA in the accumulator's type T; Katharopoulos et al. 2020,
//   arXiv:2006.16236
#pragma once
#include "../../cuda/problem.cuh"
#include "../../cuda/staging.cuh"

namespace lc::cuda {

// The outputs, or the final states.
template <class E, bool kStates>
struct Parallel {
  using T = Accumulator<E>;
  static constexpr const char* kName = kStates ? "parallel final states" : "parallel";
  static constexpr int kTile = 64, kWide = 2;  // tokens, ranks or columns of a tile; tiles of columns in a block
  static constexpr int kMaxThreads = 256, kMinBlocks = sizeof(T) == 8 ? 1 : 2;
  struct Params {
    Problem p;
  };

  static LC_INLINE int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }
  static LC_INLINE int64_t slices(const Problem& p) { return (tiles(p.V) + kWide - 1) / kWide; }
  // Tiles of tokens in all sequences. The tiles of a packed sequence b start at number begin / 64 +
  // b, which may leave some numbers unused.
  static LC_INLINE int64_t token_tiles(const Problem& p) { return p.cu_bits ? p.N / kTile + p.B : tiles(p.N) * p.B; }
  static int shared_bytes() {
    return (2 * kTile * kPitch + kTile) * int(sizeof(T)) + (kTile + 1) * int(sizeof(double));
  }

  static SIMT_DEV void run(const Params& a) {
    if constexpr (kStates)
      final_state(a.p);
    else
      outputs(a.p);
  }

 private:
  static constexpr int kPitch = padded(kTile);
  using Four = Packed<T, 4>;

  struct Memory {
    sptr<T> left, right;  // operands of a product, [64, 68] each
    sptr<T> weight;       // [64]: weights of the keys of a tile
    sptr<double> cum;     // [65]: sums of log2 decays up to each token of the block's own tile; then a tile's total
    SIMT_DEV Memory() {
      Smem smem;
      left = smem.alloc<T>(kTile * kPitch, sizeof(Four));
      right = smem.alloc<T>(kTile * kPitch, sizeof(Four));
      weight = smem.alloc<T>(kTile);
      cum = smem.alloc<double>(kTile + 1);
    }
    SIMT_DEV double total() const { return cum.ld(kTile); }
  };

  static SIMT_DEV int at_most_a_tile(int64_t n) { return int(n < kTile ? n : kTile); }
  // A thread's rows and columns in products: four from `slow` on and four from `fast` on.
  // Neighbouring threads share `slow` and differ in `fast`.
  static SIMT_DEV int slow() { return tid() / 16 * 4; }
  static SIMT_DEV int fast() { return tid() % 16 * 4; }

  static SIMT_DEV void outputs(const Problem& p) {
    const Memory m;
    const int64_t c0 = bid().x % slices(p) * kWide * kTile, h = bid().x / slices(p) % p.H, hs = h / group(p);
    const auto tile = token_tile(p, bid().x / slices(p) / p.H);
    const int64_t b = tile.b, t = tile.t;
    const Sequence s = sequence_at(p, b);
    if (t < 0 || t >= s.length) return;  // the whole block
    const int n = at_most_a_tile(s.length - t);
    const auto q = row<const E>(p.q, s.row, q_head(p, h), s.begin + t);

    T o[kWide][4][4] = {};  // queries slow() + i, columns fast() + j
    double between = 0;     // log2 of the decay from the end of a tile of keys to the start of the block's own tile
    for (int64_t u = t; u >= 0 && ex2(T(between)) != 0; u -= kTile) {
      const bool own = u == t;
      const int keys = own ? n : kTile;
      const auto k = row<const E>(p.k, s.row, k_head(p, hs), s.begin + u);
      const auto v = row<const E>(p.v, s.row, v_head(p, hs), s.begin + u);
      T score[4][4] = {};  // queries fast() + i, keys slow() + j
      for (int64_t r0 = 0; r0 < p.K; r0 += kTile) {
        const int ranks = at_most_a_tile(p.K - r0);
        sync_cta();
        if (!r0 && !warp()) weigh(m, p, s, hs, u, between, own);
        stage_columns<kTile, kTile>(m.left, q.sub(r0), p.q.stride[2], n, ranks);
        stage_columns<kTile, kTile>(m.right, k.sub(r0), p.k.stride[2], keys, ranks);
        sync_cta();
        multiply(score, m.left, fast(), m.right, slow(), ranks);
      }
      sync_cta();
      SIMT_UNROLL
      for (int j = 0; j < 4; ++j) {
        Four scores;
        SIMT_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (own) {
            const double log2 = m.cum.ld(fast() + i) - m.cum.ld(slow() + j);
            scores.x[i] = slow() + j <= fast() + i ? score[i][j] * ex2(T(log2 < 0 ? log2 : 0)) : 0;
          } else {
            scores.x[i] = score[i][j] * m.weight.ld(slow() + j);
          }
        }
        m.left.stv((slow() + j) * kPitch + fast(), scores);
      }
      T in[4];
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) in[i] = own ? T(1) : ex2(T(m.cum.ld(slow() + i)));
      add_products(o, in, m, v.sub(c0), p.v.stride[2], keys, p.V - c0);
      if (!own) between += m.total();
    }

    if (p.initial_state && ex2(T(between)) != 0) {
      T in[4];
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) in[i] = ex2(T(between + m.cum.ld(slow() + i)));
      for (int64_t r0 = 0; r0 < p.K; r0 += kTile) {
        const int ranks = at_most_a_tile(p.K - r0);
        sync_cta();
        stage_columns<kTile, kTile>(m.left, q.sub(r0), p.q.stride[2], n, ranks);
        add_products(o, in, m, row<const T>(p.initial_state, b, hs, r0).sub(c0), p.initial_state.stride[2], ranks,
                     p.V - c0);
      }
    }

    for_each(o, n, p.V - c0,
             [&](int i, int j, T x) { row<E>(p.o, s.row, h, s.begin + t + i).st(c0 + j, narrow<E>(x * T(p.scale))); });
  }

  static SIMT_DEV void final_state(const Problem& p) {
    const Memory m;
    const int64_t c0 = bid().x % slices(p) * kWide * kTile, tile = bid().x / slices(p), r0 = tile % tiles(p.K) * kTile;
    const int64_t hs = tile / tiles(p.K) % p.Hs, b = tile / tiles(p.K) / p.Hs;
    const int ranks = at_most_a_tile(p.K - r0);
    const Sequence s = sequence_at(p, b);

    T S[kWide][4][4] = {};  // ranks slow() + i, columns fast() + j
    double after = 0;       // log2 of the decay from the end of a tile to the end of the sequence
    for (int64_t t = (tiles(s.length) - 1) * kTile; t >= 0 && ex2(T(after)) != 0; t -= kTile) {
      const int n = at_most_a_tile(s.length - t);
      const auto k = row<const E>(p.k, s.row, k_head(p, hs), s.begin + t).sub(r0);
      sync_cta();
      if (!warp()) weigh(m, p, s, hs, t, after, false);
      sync_cta();
      stage_rows<kTile, kTile>(m.left, k, p.k.stride[2], n, ranks, [&](int j, T x) { return x * m.weight.ld(j); });
      const T one[4] = {1, 1, 1, 1};
      add_products(S, one, m, row<const E>(p.v, s.row, v_head(p, hs), s.begin + t).sub(c0), p.v.stride[2], n, p.V - c0);
      after += m.total();
    }
    const T rest = ex2(T(after));
    const bool add = p.initial_state && rest != 0;
    for_each(S, ranks, p.V - c0, [&](int i, int j, T x) {
      if (add) x = mul_add(rest, row<const T>(p.initial_state, b, hs, r0 + i).ld(c0 + j), x);
      row<T>(p.final_state, b, hs, r0 + i).st(c0 + j, x);
    });
  }

  // Sequence and first token of the i-th tile. Tiles with many keys come first, as far as the
  // shapes tell.
  struct TokenTile {
    int64_t b, t;
  };
  static SIMT_DEV TokenTile token_tile(const Problem& p, int64_t i) {
    i = token_tiles(p) - 1 - i;
    if (!p.cu_bits) return {i % p.B, i / p.B * kTile};
    int64_t b = 0;
    for (int64_t end = p.B; end - b > 1;) {
      const int64_t middle = (b + end) / 2;
      if (sequence_at(p, middle).begin / kTile + middle <= i)
        b = middle;
      else
        end = middle;
    }
    return {b, (i - sequence_at(p, b).begin / kTile - b) * kTile};
  }

  // Computes, by one warp, the total of the log2 decays of the tile from token t on, and either
  // their sums up to each token (sums), or the weight of each token after the tile and a further
  // log2 decay `beyond`. Tokens past the sequence do not decay.
  static SIMT_DEV void weigh(const Memory& m, const Problem& p, const Sequence& s, int64_t hs, int64_t t, double beyond,
                             bool sums) {
    double x[2];
    SIMT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t token = t + 2 * lane() + i;
      x[i] = token < s.length ? log2_decay_at(p, s.row, hs, s.begin + token) : 0;
    }
    const double sum = cumulative(x[0] + x[1]), before = shfl_up(sum, 1), total = shfl_idx(sum, 31);
    const double cum[2] = {lane() ? before + x[0] : x[0], sum};
    SIMT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const double rest = total - cum[i];
      if (sums)
        m.cum.st(2 * lane() + i, cum[i]);
      else
        m.weight.st(2 * lane() + i, ex2(T(beyond + (rest < 0 ? rest : 0))));
    }
    if (!lane()) m.cum.st(kTile, total);
  }

  // x[i][j] += sum_r a[r][i0 + i] b[r][j0 + j] for r < n.
  static SIMT_DEV void multiply(T (&x)[4][4], sptr<T> a, int i0, sptr<T> b, int j0, int n) {
    for (int r = 0; r < n; ++r) {
      const auto left = a.template ldv<Four>(r * kPitch + i0), right = b.template ldv<Four>(r * kPitch + j0);
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) {
        SIMT_UNROLL
        for (int j = 0; j < 4; ++j) x[i][j] = mul_add(left.x[i], right.x[j], x[i][j]);
      }
    }
  }

  // y_i += weight_i m.left^T b, n rows each. b is in global memory and has `columns` columns left.
  template <class F>
  static SIMT_DEV void add_products(T (&y)[kWide][4][4], const T (&weight)[4], const Memory& m, gptr<const F> b,
                                    int64_t stride, int n, int64_t columns) {
    SIMT_UNROLL
    for (int wide = 0; wide < kWide; ++wide) {
      if (wide * kTile >= columns) continue;
      sync_cta();
      stage_rows<kTile, kTile>(m.right, b.sub(wide * kTile), stride, n, at_most_a_tile(columns - wide * kTile),
                               [](int, T x) { return x; });
      sync_cta();
      T x[4][4] = {};
      multiply(x, m.left, slow(), m.right, fast(), n);
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) {
        SIMT_UNROLL
        for (int j = 0; j < 4; ++j) y[wide][i][j] = mul_add(weight[i], x[i][j], y[wide][i][j]);
      }
    }
  }

  // Calls f(i, j, y[i][j]) for this thread's numbers in the first n rows and `columns` columns.
  template <class F>
  static SIMT_DEV void for_each(const T (&y)[kWide][4][4], int n, int64_t columns, F&& f) {
    SIMT_UNROLL
    for (int wide = 0; wide < kWide; ++wide) {
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) {
        SIMT_UNROLL
        for (int j = 0; j < 4; ++j)
          if (slow() + i < n && wide * kTile + fast() + j < columns)
            f(slow() + i, wide * kTile + fast() + j, y[wide][i][j]);
      }
    }
  }
};

}  // namespace lc::cuda
