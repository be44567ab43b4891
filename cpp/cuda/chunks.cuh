// chunks.cuh - GPU: one block takes one segment of one head, 16 or 32 columns of V a warp, chunk by chunk of C = 64
// tokens. All is transposed, so that everything is a Strip and the state never leaves float32 registers:
//
//   A    = [j <= i] mask_ij q_i.k_j                      [C, C]     strips of 16 tokens, to shared memory
//   O^T  = scale (S^T Q^T diag(in) + V^T A^T)            [V, C]
//   S^T  = total S^T + (rest S^T + V^T diag(out) K)      [V, K]     weights in, mask, out, total, rest: decay.cuh
//
// The chunk's own sum first: the matrix unit truncates, so that sums of several chunks must not be made in it.
// Computed operands (A, S) are rounded to X: bf16 for bf16; tf32 for f16, whose range they may exceed, and for float on
// request; else float, which is three products of tf32. Two barriers a chunk; a ring of chunks in shared memory.
#pragma once
#include "../simt/tile.cuh"
#include "chunks.h"
#include "decay.cuh"

namespace lc::cuda {

// What one block works on.
struct Place {
  Sequence s;
  int64_t b, hs, slot, first_head, last_head;
  int64_t start, begin, end;  // tokens; outputs from `begin` on
  bool last;                  // segment of the sequence
  gptr<const float> before;   // the state before `start`, rows `stride` apart; null: zeros
  int64_t stride;

  SIMT_DEV Place(const Problem& p, const Walk& w, int64_t block, int heads) {
    const Segments cut{w.length};
    const int64_t parts = w.alone ? 1 : group(p) / heads, part = block % parts;
    hs = block / parts % p.Hs, slot = block / parts / p.Hs;
    b = w.segment < 0 ? cut.owner(p, slot) : slot;
    s = sequence_at(p, b);
    const int64_t segment = w.segment < 0 ? slot - cut.first_slot(p, b) : w.segment;
    const int64_t warm_up = w.warm_up ? memory(p, cut, s, hs) : 0;
    last = segment + 1 == cut.count(s);
    begin = segment * w.length, end = last ? s.length : begin + w.length;
    start = !warm_up ? begin : begin > warm_up ? begin - warm_up : 0;
    first_head = hs * group(p) + part * heads, last_head = first_head + (w.alone ? 1 : heads);
    if (segment >= cut.count(s) || (w.alone && (last || warm_up))) last_head = first_head;  // nothing to do

    before = {nullptr}, stride = p.V;
    if (w.alone || (start ? bool(warm_up) : !p.initial_state)) return;
    if (w.before)
      before = {w.before + ((start ? slot : slot - segment) * p.Hs + hs) * p.K * p.V};
    else
      before = row<const float>(p.initial_state, b, hs, 0), stride = p.initial_state.stride[2];
  }
};

template <class E, class X, int K, int kColumns>  // K padded
struct ChunkWalk {
  static constexpr const char* kName = "chunks forward";
  static constexpr int C = kChunk, V = 4 * kColumns;
  static constexpr int kMaxThreads = 128;
  static constexpr int kMinBlocks = K > 128 || kColumns > 16 || !is_16_bit<X> ? 2 : K > 64 ? 3 : 4;
  using Own = std::conditional_t<is_16_bit<E>, E, X>;  // what inputs are as operands
  using Score = std::conditional_t<is_16_bit<X>, X, float>;
  static constexpr int kQ = C * (K > V ? K : V), kStage = kQ + C * (K + V);  // q and later o, k, v
  static constexpr int shared_bytes(int stages) {
    return stages * kStage * int(sizeof(E)) + C * C * int(sizeof(Score)) + 2 * ChunkDecay::kNumbers * 4;
  }

  struct Params {
    Problem p;
    Walk walk;
    int heads;                                        // q heads of one block, all of one state
    int columns, slices;                              // of V for one block, a multiple of 16; blocks that share them
    int stages;                                       // chunks in shared memory, 1 to 3
    bool q_aligned, k_aligned, v_aligned, o_aligned;  // to 16 bytes, every row
  };

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    const Place at(p, a.walk, bid().x / a.slices, a.heads);
    const int64_t c0 = int64_t(bid().x) % a.slices * a.columns + warp() * kColumns;
    const int own = int(p.V - c0 < kColumns ? p.V - c0 : kColumns);  // columns of this warp; may be none
    const bool writes = at.last ? bool(p.final_state) && !a.walk.alone : a.walk.after != nullptr;
    const int flip = bid().x & 1 ? 3 : 0;  // so that warps of two blocks together have equal work in A
    const bool keeper = warp() == (flip ? nwarps() - 1 : 0);

    Smem smem;
    const auto ring = smem.alloc<E>(a.stages * kStage, 128);
    const Shared<Score, C, C> A{smem.alloc<Score>(C * C, 128)};
    const auto weights = smem.alloc<float>(2 * ChunkDecay::kNumbers);
    const auto decay_of = [&](int i) {
      return ChunkDecay(weights.sub(i * ChunkDecay::kNumbers, ChunkDecay::kNumbers));
    };

    for (int64_t h = at.first_head; h < at.last_head; ++h) {
      const auto q_rows = row<const E>(p.q, at.s.row, q_head(p, h), at.s.begin);
      const auto k_rows = row<const E>(p.k, at.s.row, k_head(p, at.hs), at.s.begin);
      const auto v_rows = row<const E>(p.v, at.s.row, v_head(p, at.hs), at.s.begin).sub(c0 - warp() * kColumns);
      const int v_columns = int(p.V - c0) + warp() * kColumns;
      const auto fetch = [&](int64_t t, int stage) {
        if (t < at.end) {
          const int n = int(at.end - t < C ? at.end - t : C), from = stage * kStage;
          const Shared<E, C, K> q{ring.sub(from, C * K)}, k{ring.sub(from + kQ, C * K)};
          const Shared<E, C, V> v{ring.sub(from + kQ + C * K, C * V)};
          if (t >= at.begin && !a.walk.alone)
            load_async(q, q_rows.sub(t * p.q.stride[2]), p.q.stride[2], n, int(p.K), a.q_aligned);
          load_async(k, k_rows.sub(t * p.k.stride[2]), p.k.stride[2], n, int(p.K), a.k_aligned);
          load_async(v, v_rows.sub(t * p.v.stride[2]), p.v.stride[2], n, v_columns, a.v_aligned, a.columns);
        }
        cp_commit();
      };

      for (int i = 0; i + 1 < a.stages; ++i) fetch(at.start + i * C, i);
      double log2 = 0;
      RawDecay raw;
      if (keeper) {
        log2 = decay_of(0).set(p, load_decay(p, at.s, at.hs, at.start, at.end));
        raw = load_decay(p, at.s, at.hs, at.start + C, at.end);
      }
      Strip<kColumns, K> S;
      zero(S);
      if (at.before.p)
        map(S, [&](int c, int r, float) { return c < own && r < p.K ? at.before.ld(r * at.stride + c0 + c) : 0.f; });

      int stage = 0, parity = 0;
      for (int64_t t = at.start; t < at.end; t += C) {
        if (a.stages == 1) sync_cta(), fetch(t, 0);
        if (a.stages == 3)
          cp_wait<1>();
        else
          cp_wait<0>();
        sync_cta();  // this chunk is there, and everyone has done with the one before
        if (a.stages > 1) fetch(t + (a.stages - 1) * C, stage ? stage - 1 : a.stages - 1);
        const auto now = ring.sub(stage * kStage, kStage);
        const Shared<E, C, K> q{now.sub(0, C * K)}, k{now.sub(kQ, C * K)};
        const Shared<E, C, V> v{now.sub(kQ + C * K, C * V)}, o{now.sub(0, C * V)};
        const ChunkDecay decay = decay_of(parity);
        const bool outputs = t >= at.begin && !a.walk.alone;

        Strip<kColumns, C> O;
        if (outputs) {
          for (int i = warp(); i < C / 16; i += nwarps()) {
            const int i0 = 16 * (i ^ flip);
            SIMT_UNROLL
            for (int j0 = 0; j0 < C; j0 += C / 2) {
              if (j0 > i0) continue;
              Strip<16, C / 2> strip;
              zero(strip);
              mma_nt(strip, operand<Own>(q, i0), k.template rows<C / 2>(j0));
              map(strip,
                  [&](int di, int dj, float x) { return j0 + dj <= i0 + di ? x * decay.mask(i0 + di, j0 + dj) : 0.f; });
              store<X>(A, i0, j0, strip);
            }
          }
          zero(O);
          mma_nt(O, operand<X>(S), q);
          map(O, [&](int, int i, float x) { return x * decay.in.ld(i); });
        }
        if (keeper && t + C < at.end) {
          log2 += decay_of(parity ^ 1).set(p, raw);
          raw = load_decay(p, at.s, at.hs, t + 2 * C, at.end);
        }
        if (outputs) {
          sync_cta();  // A is there, and q is read
          mma_nt<true>(O, operand_t<X>(v, warp() * kColumns), A);
          map(O, [&](int, int, float x) { return x * float(p.scale); });
          store_t(o, warp() * kColumns, O);
          sync_warp();
          write_rows<kColumns>(row<E>(p.o, at.s.row, h, at.s.begin + t).sub(c0), p.o.stride[2], o, warp() * kColumns,
                               int(at.end - t < C ? at.end - t : C), own, a.o_aligned);
        }
        if (writes || t + C < at.end) {
          const auto values = weighted<Own, kColumns, C>(operand_t<E>(v, warp() * kColumns), decay.out);
          const float total = decay.total(), rest = decay.rest();
          SIMT_UNROLL
          for (int j = 0; j < K; j += 32) {
            Strip<kColumns, 32> sum;
            zero(sum);
            mma(sum, values, k, j);
            merge(S, j, sum, [&](float x, float y) { return mul_add(x, total, mul_add(x, rest, y)); });
          }
        }
        stage = stage + 1 < a.stages ? stage + 1 : 0, parity ^= 1;
      }
      cp_wait<0>();
      sync_cta();

      if (writes && h + 1 == at.last_head && (a.walk.alone || at.first_head == at.hs * group(p))) {
        const int64_t state = (at.slot * p.Hs + at.hs) * p.K * p.V;
        const auto to = at.last ? row<float>(p.final_state, at.b, at.hs, 0) : gptr<float>{a.walk.after + state};
        const int64_t stride = at.last ? p.final_state.stride[2] : p.V;
        each(S, [&](int c, int r, float x) {
          if (c < own && r < p.K) to.st(r * stride + c0 + c, x);
        });
      }
      if (keeper && a.walk.alone && c0 - warp() * kColumns == 0 && !lane())
        gptr<double>{a.walk.log2}.st(at.slot * p.Hs + at.hs, log2);
    }
  }
};

}  // namespace lc::cuda
