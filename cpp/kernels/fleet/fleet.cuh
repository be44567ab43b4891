// fleet.cuh - GPU: rank by rank. A warp has 16 ranks, a lane has one or two columns of them.
//
//   y_tr = 2^L_t y_{t-1,r} + k_tr v_t,   o_t = scale sum_r q_tr y_tr    L: log2 decays; y_0: S_0
//
//   block: a warp for every 16 ranks, 32 C columns of one q head. A lane keeps y [16, C] in
//   registers. Shared memory, per tile of T tokens: Q, K [T, 16 warps], V [T, 32 C] and the warps'
//   shares of O, [warps, T, 32 C], in the accumulator's type. The shares are added in the order of
//   the warps
//   B N H 5 K V flop. No step waits for another rank: 4 C FMA per rank and token, for half a load
//   Wang et al. 2025 (LeetDecoding), arXiv:2501.02573
#pragma once
#include "../../cuda/problem.cuh"

namespace lc::cuda {

template <class E, int C>
struct FleetForward {
  using T = Accumulator<E>;
  using Vec = std::conditional_t<std::is_same_v<T, double>, double2, float4>;
  static constexpr const char* kName = "fleet forward";
  static constexpr int kRanks = 16, kColumns = 32 * C, kMaxThreads = 512, kMinBlocks = 1;
  struct Params {
    Problem p;
    int first, heads;  // the q heads of each state that this launch serves; head 0 writes the final state
    int tile;          // T, at most 16
  };
  static int warps(const Problem& p) { return int((p.K + kRanks - 1) / kRanks); }
  static int shared_bytes(const Problem& p, int tile) {
    const int ranks = kRanks * warps(p);
    return (ranks * kColumns + tile * (2 * ranks + kColumns + 2)) * int(sizeof(T));
  }

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    const int ranks = nwarps() * kRanks, r0 = warp() * kRanks;
    Smem smem;
    const auto q = smem.alloc<T>(a.tile * ranks), k = smem.alloc<T>(a.tile * ranks);
    const auto v = smem.alloc<T>(a.tile * kColumns), shares = smem.alloc<T>(ranks * kColumns);
    const auto decay = smem.alloc<T>(2 * a.tile), own = shares.sub(r0 * kColumns, kRanks * kColumns);
    const int64_t slices = (p.V + kColumns - 1) / kColumns;
    const int64_t block = bid().x, c0 = block % slices * kColumns, part = a.first + block / slices % a.heads;
    const int64_t hs = block / slices / a.heads % p.Hs, h = hs * group(p) + part;
    const int64_t b = block / slices / a.heads / p.Hs;
    const int columns = int(p.V - c0 < kColumns ? p.V - c0 : kColumns);
    const int live = int(p.K - r0 < kRanks ? p.K - r0 : kRanks);  // ranks of this warp
    const Sequence s = sequence_at(p, b);

    // The state goes through shared memory, since the addresses of 16 rows would take registers. A
    // lane reads only the numbers that it wrote.
    T y[kRanks][C];
    for (int r = 0; r < live; ++r)
      for (int c = lane(); c < kColumns; c += 32) {
        const bool given = p.initial_state && c < columns;
        own.st(r * kColumns + c, given ? row<const T>(p.initial_state, b, hs, r0 + r).ld(c0 + c) : T(0));
      }
    SIMT_UNROLL
    for (int i = 0; i < kRanks * C; ++i) y[i / C][i % C] = i / C < live ? own.ld(lane() + 32 * i) : T(0);

    for (int64_t t = 0; t < s.length; t += a.tile) {
      const int n = int(s.length - t < a.tile ? s.length - t : a.tile);
      load(q, ranks, row<const E>(p.q, s.row, q_head(p, h), s.begin + t), p.q.stride[2], n, int(p.K));
      load(k, ranks, row<const E>(p.k, s.row, k_head(p, hs), s.begin + t), p.k.stride[2], n, int(p.K));
      load(v, kColumns, row<const E>(p.v, s.row, v_head(p, hs), s.begin + t).sub(c0), p.v.stride[2], n, columns);
      if (tid() < n) load_decay(decay.sub(2 * tid(), 2), log2_decay_at(p, s.row, hs, s.begin + t + tid()));
      sync_cta();

      for (int i = 0; i < n; ++i) {
        const T times = decay.ld(2 * i), keep = decay.ld(2 * i + 1);
        T vi[C], o[C] = {};
        SIMT_UNROLL
        for (int j = 0; j < C; ++j) vi[j] = v.ld(i * kColumns + lane() + 32 * j);
        SIMT_UNROLL
        for (int r = 0; r < kRanks; r += kVec) {
          T ki[kVec], qi[kVec];
          unpack(ki, k.template ldv<Vec>(i * ranks + r0 + r));
          unpack(qi, q.template ldv<Vec>(i * ranks + r0 + r));
          SIMT_UNROLL
          for (int x = 0; x < kVec; ++x) SIMT_UNROLL
          for (int j = 0; j < C; ++j) {
            T& state = y[r + x][j];
            state = mul_add(keep, state, mul_add(times, state, ki[x] * vi[j]));
            o[j] = mul_add(qi[x], state, o[j]);
          }
        }
        SIMT_UNROLL
        for (int j = 0; j < C; ++j) own.st(i * kColumns + lane() + 32 * j, o[j]);
      }
      sync_cta();

      for (int i = warp(); i < n; i += nwarps()) {
        const auto to = row<E>(p.o, s.row, h, s.begin + t + i);
        for (int c = lane(); c < columns; c += 32) {
          T sum = 0;
          for (int w = 0; w < nwarps(); ++w) sum += shares.ld((w * kRanks + i) * kColumns + c);
          to.st(c0 + c, narrow<E>(sum * T(p.scale)));
        }
      }
    }

    sync_cta();
    if (p.final_state && !part) {
      SIMT_UNROLL
      for (int i = 0; i < kRanks * C; ++i) own.st(lane() + 32 * i, y[i / C][i % C]);
      for (int r = 0; r < live; ++r)
        for (int c = lane(); c < columns; c += 32)
          row<T>(p.final_state, b, hs, r0 + r).st(c0 + c, own.ld(r * kColumns + c));
    }
  }

 private:
  static constexpr int kVec = 16 / int(sizeof(T));

  static SIMT_DEV void unpack(float (&x)[4], float4 u) {
    x[0] = u.x;
    x[1] = u.y;
    x[2] = u.z;
    x[3] = u.w;
  }
  static SIMT_DEV void unpack(double (&x)[2], double2 u) {
    x[0] = u.x;
    x[1] = u.y;
  }

  // Copies n rows of `live` numbers, and zeros after them up to `width`.
  static SIMT_DEV void load(sptr<T> to, int width, gptr<const E> from, int64_t stride, int n, int live) {
    for (int i = warp(); i < n; i += nwarps())
      for (int c = lane(); c < width; c += 32) to.st(i * width + c, c < live ? widen(from.ld(i * stride + c)) : T(0));
  }

  // y is multiplied by times + keep. A decay close to 1 is stored as 2^L - 1 and 1, since the
  // rounding error of 2^L would be raised to the number of tokens. Other decays are stored as 2^L
  // and 0, so that a decay of 0 forgets exactly.
  static SIMT_DEV void load_decay(sptr<T> decay, double log2) {
    constexpr double kSlow = -0.0145;  // log2 0.99
    const bool keep = log2 > kSlow;
    decay.st(0, keep ? ex2m1(T(log2)) : ex2(T(log2)));
    decay.st(1, T(keep));
  }
};

}  // namespace lc::cuda
