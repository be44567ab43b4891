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

// What one block works on for one q head, in shared memory: made by one thread, read where it is needed.
template <class E>
struct Place {
  gptr<const E> q, k, v;  // token `start` of the segment, column 0
  gptr<E> o;
  gptr<const float> log_decay;  // or null: it is the same for all tokens
  gptr<const float> before;     // the state before `start`, rows `before_stride` apart; null: zeros
  gptr<float> after;            // of the state after the last token, or null
  gptr<double> log2;            // of the decay over all tokens, or null
  int64_t before_stride, after_stride;
  int chunks, tail;  // tail: tokens of the last one
  int silent;        // chunks at the beginning that have no outputs

  Place() = default;
  SIMT_DEV Place(const Problem& p, const Walk& w, int64_t block, int parts, int part, bool writes) {
    const Segments cut{w.length};
    const int64_t hs = block / parts % p.Hs, slot = block / parts / p.Hs;
    if (parts > 1) part = int(block % parts);
    const int64_t h = hs * group(p) + part;
    const int64_t b = w.segment < 0 ? cut.owner(p, slot) : slot;
    const Sequence s = sequence_at(p, b);
    const int64_t segment = w.segment < 0 ? slot - cut.first_slot(p, b) : w.segment, count = cut.count(s);
    const int64_t warm_up = w.warm_up ? memory(p, cut, s, hs) : 0, begin = segment * w.length;
    const int64_t start = !warm_up ? begin : begin > warm_up ? begin - warm_up : 0;
    const bool last = segment + 1 == count, nothing = segment >= count || (w.alone && (last || warm_up));
    const int64_t tokens = nothing ? 0 : (last ? s.length : begin + w.length) - start;

    q = row<const E>(p.q, s.row, q_head(p, h), s.begin + start);
    k = row<const E>(p.k, s.row, k_head(p, hs), s.begin + start);
    v = row<const E>(p.v, s.row, v_head(p, hs), s.begin + start);
    o = row<E>(p.o, s.row, h, s.begin + start);
    log_decay = {nullptr};
    if (p.log_decay) log_decay = row<const float>(p.log_decay, s.row, hs, s.begin + start);
    chunks = int((tokens + kChunk - 1) / kChunk), tail = int(tokens - (chunks - 1) * int64_t(kChunk));
    silent = w.alone ? chunks : int((begin - start) / kChunk);

    const int64_t size = p.K * p.V, state = (slot * p.Hs + hs) * size;
    before = {nullptr}, before_stride = p.V, after = {nullptr}, after_stride = p.V, log2 = {nullptr};
    if (nothing) return;
    if (w.alone) log2 = {w.log2 + slot * p.Hs + hs};
    if (!w.alone && (start ? !warm_up : bool(p.initial_state))) {
      if (w.before)
        before = {w.before + state - (start ? 0 : segment * p.Hs * size)};
      else
        before = row<const float>(p.initial_state, b, hs, 0), before_stride = p.initial_state.stride[2];
    }
    if (!writes || (parts > 1 && part)) return;
    if (!last)
      after = {w.after ? w.after + state : nullptr};
    else if (p.final_state)
      after = row<float>(p.final_state, b, hs, 0), after_stride = p.final_state.stride[2];
  }
};

template <class E, class X, int K, int kColumns>  // K padded
struct ChunkWalk {
  static constexpr const char* kName = "chunks forward";
  static constexpr int C = kChunk, V = 4 * kColumns;
  static constexpr int kMaxThreads = 128;
  static constexpr int kMinBlocks = is_16_bit<X> && K <= 64 && kColumns == 16 ? 3 : 2;
  using Own = std::conditional_t<is_16_bit<E>, E, X>;  // what inputs are as operands
  using Score = std::conditional_t<is_16_bit<X>, X, float>;
  static constexpr int kQ = C * (K > V ? K : V), kStage = kQ + C * (K + V);  // q and later o, k, v
  static constexpr bool kOnlyOne = 2 * kStage * sizeof(E) > 227 * 1024;      // there is no room for a second stage
  static constexpr bool kHolds = K <= 128 || !std::is_same_v<Own, float>;  // V^T for all of S; there are 255 registers
  static constexpr bool kAhead = K <= 128;  // log-decays are loaded a chunk before their use
  static constexpr int shared_bytes(int stages) {
    return stages * kStage * int(sizeof(E)) + C * C * int(sizeof(Score)) + 2 * ChunkDecay::kNumbers * 4 +
           int(sizeof(Place<E>)) + 128;
  }

  struct Params {
    Problem p;
    Walk walk;
    int parts, part;                                  // q heads of a state that blocks share; where that is one, which
    bool writes;                                      // states
    int columns, slices;                              // of V for one block, a multiple of 16; blocks that share them
    int stages;                                       // chunks in shared memory, 1 to 3
    bool q_aligned, k_aligned, v_aligned, o_aligned;  // to 16 bytes, every row
  };

  static SIMT_DEV void run(const Params& a) {
    Smem smem;
    const Shared<Score, C, C> A{smem.alloc<Score>(C * C, 128)};
    const auto weights = smem.alloc<float>(2 * ChunkDecay::kNumbers);
    const auto place = smem.alloc<Place<E>>(1);
    const auto ring = smem.alloc<E>(a.stages * kStage, 128);
    if (!tid()) place.st(0, Place<E>(a.p, a.walk, unsigned(bid().x) / unsigned(a.slices), a.parts, a.part, a.writes));
    sync_cta();
    walk_head(a, ring, A, weights, place);
  }

 private:
  static SIMT_DEV sptr<E> stage(const Params& a, sptr<E> ring, int i) {
    return ring.sub(kOnlyOne ? 0 : i % a.stages * kStage, kStage);
  }

  // Chunk i to its stage of the ring.
  static SIMT_DEV void fetch(const Params& a, sptr<E> ring, sptr<Place<E>> place, int i) {
    const Problem& p = a.p;
    const Place<E> at = place.ld(0);
    if (i < at.chunks) {
      const int n = tokens(at, i), c0 = block_column(a);
      const int64_t t = fresh(int64_t(i) * C);
      const auto to = stage(a, ring, i);
      const Shared<E, C, K> q{to.sub(0, C * K)}, k{to.sub(kQ, C * K)};
      const Shared<E, C, V> v{to.sub(kQ + C * K, C * V)};
      if (i >= at.silent) load_async(q, at.q.sub(t * p.q.stride[2]), p.q.stride[2], n, int(p.K), a.q_aligned);
      load_async(k, at.k.sub(t * p.k.stride[2]), p.k.stride[2], n, int(p.K), a.k_aligned);
      load_async(v, at.v.sub(t * p.v.stride[2] + c0), p.v.stride[2], n, int(p.V) - c0, a.v_aligned, a.columns);
    }
    cp_commit();
  }
  static SIMT_DEV int tokens(const Place<E>& at, int i) { return i + 1 < at.chunks ? C : i < at.chunks ? at.tail : 0; }
  static SIMT_DEV float2 decay_of(const Params& a, sptr<Place<E>> place, int i) {
    const Place<E> at = place.ld(0);
    if (!a.p.log_decay) return {0, 0};
    return load_decay(at.log_decay, a.p.log_decay.stride[2], fresh(int64_t(i) * C), tokens(at, i),
                      kAhead ? lane() : fresh(lane()));
  }
  static SIMT_DEV ChunkDecay weights_of(sptr<float> weights, int i) {
    return ChunkDecay(weights.sub((i & 1) * ChunkDecay::kNumbers, ChunkDecay::kNumbers));
  }

  // Of V: the first column of this warp among those of the block; of the block; and how many there are from there on.
  static SIMT_DEV int warp_column() { return fresh(tid()) / 32 * kColumns; }
  static SIMT_DEV int block_column(const Params& a) { return int(bid().x % unsigned(a.slices)) * a.columns; }
  static SIMT_DEV int columns_left(const Params& a) { return int(a.p.V) - block_column(a) - warp_column(); }
  // Strips of A are dealt out one way and the other, so that warps of two blocks together have equal work; the one with
  // least makes the weights of the next chunk.
  static SIMT_DEV int flip() { return bid().x & 1 ? C / 16 - 1 : 0; }
  static SIMT_DEV bool is_keeper() { return fresh(tid()) / 32 == (flip() ? nwarps() - 1 : 0); }

  static SIMT_DEV void walk_head(const Params& a, sptr<E> ring, const Shared<Score, C, C>& A, sptr<float> weights,
                                 sptr<Place<E>> place) {
    for (int i = 0; i + 1 < a.stages; ++i) fetch(a, ring, place, i);
    float2 next = decay_of(a, place, 0);
    if (is_keeper()) {
      keep(a, weights, place, next, 0);
      if (kAhead) next = decay_of(a, place, 1);
    }
    Strip<kColumns, K> S;
    zero(S);
    if (const auto before = place.ld(0).before; before.p) {
      const auto from = before.sub(block_column(a) + warp_column());
      const int64_t stride = place.ld(0).before_stride;
      const int columns = columns_left(a), rows = int(a.p.K);
      map(S, [&](int c, int r, float) { return c < columns && r < rows ? from.ld(r * stride + c) : 0.f; });
    }

    for (int i = 0; i < place.ld(0).chunks; ++i) {
      if (a.stages == 1) sync_cta(), fetch(a, ring, place, i);
      if (a.stages == 3)
        cp_wait<1>();
      else
        cp_wait<0>();
      sync_cta();  // this chunk is there, and everyone has done with the one before
      if (a.stages > 1) fetch(a, ring, place, i + a.stages - 1);
      if (is_keeper() && i + 1 < place.ld(0).chunks) {
        keep(a, weights, place, kAhead ? next : decay_of(a, place, i + 1), i + 1);
        if (kAhead) next = decay_of(a, place, i + 2);
      }
      const auto now = stage(a, ring, i);
      const Shared<E, C, K> q{now.sub(0, C * K)}, k{now.sub(kQ, C * K)};
      const Shared<E, C, V> v{now.sub(kQ + C * K, C * V)}, o{now.sub(0, C * V)};
      const ChunkDecay decay = weights_of(weights, i);
      if (i >= place.ld(0).silent) {
        for (int strip = warp(); strip < C / 16; strip += nwarps()) score(A, q, k, decay, 16 * (strip ^ flip()));
        Strip<kColumns, C> O;
        zero(O);
        mma_nt(O, operand<X>(S), q);
        map(O, [&](int, int j, float x) { return x * decay.in.ld(j); });
        sync_cta();  // A is there, and q is read
        mma_nt<true>(O, operand_t<X>(v, warp_column()), A);
        const float scale = float(a.p.scale);
        map(O, [&](int, int, float x) { return x * scale; });
        store_t(o, warp_column(), O);
        sync_warp();
        const Place<E> at = place.ld(0);
        const int64_t stride = a.p.o.stride[2];
        write_rows<kColumns>(at.o.sub(fresh(int64_t(i) * C) * stride + block_column(a) + warp_column()), stride, o,
                             warp_column(), tokens(at, i), columns_left(a), a.o_aligned);
      }
      if (i + 1 < place.ld(0).chunks || place.ld(0).after.p) advance(S, v, k, decay);
    }
    cp_wait<0>();

    if (const auto after = place.ld(0).after; after.p) {
      const auto to = after.sub(block_column(a) + warp_column());
      const int64_t stride = place.ld(0).after_stride;
      const int columns = columns_left(a), rows = int(a.p.K);
      each(S, [&](int c, int r, float x) {
        if (c < columns && r < rows) to.st(r * stride + c, x);
      });
    }
  }

  // By one warp: the weights of chunk i, and log2 of the decay up to its end.
  static SIMT_DEV void keep(const Params& a, sptr<float> weights, sptr<Place<E>> place, float2 log_decay, int i) {
    const double log2 = weights_of(weights, i).set(a.p, log_decay, tokens(place.ld(0), i));
    const auto sum = place.ld(0).log2;
    if (sum.p && !lane() && !block_column(a)) sum.st(0, i ? sum.ld(0) + log2 : log2);
  }

  // Rows [i0, i0 + 16) of A, as far as pieces of it are read.
  static SIMT_DEV void score(const Shared<Score, C, C>& A, const Shared<E, C, K>& q, const Shared<E, C, K>& k,
                             const ChunkDecay& decay, int i0) {
    SIMT_UNROLL
    for (int j0 = 0; j0 < C; j0 += C / 2) {
      if (j0 > i0) continue;
      Strip<16, C / 2> strip;
      zero(strip);
      mma_nt(strip, operand<Own>(q, i0), k.template rows<C / 2>(j0));
      map(strip, [&](int i, int j, float x) { return j0 + j <= i0 + i ? x * decay.mask(i0 + i, j0 + j) : 0.f; });
      store<X>(A, i0, j0, strip);
    }
  }

  static SIMT_DEV void advance(Strip<kColumns, K>& S, const Shared<E, C, V>& v, const Shared<E, C, K>& k,
                               const ChunkDecay& decay) {
    const auto values = [&] { return weighted<Own>(operand_t<E>(v, warp_column()), decay.out); };
    const float total = decay.total(), rest = decay.rest();
    const auto add = [&](const auto& left, int j) {
      Strip<kColumns, 32> sum;
      zero(sum);
      mma(sum, left, k, j);
      merge(S, j, sum, [&](float x, float y) { return mul_add(x, total, mul_add(x, rest, y)); });
    };
    if constexpr (kHolds) {
      const auto held = hold<kColumns, C>(values());
      SIMT_UNROLL
      for (int j = 0; j < K; j += 32) add(held, j);
    } else {
      SIMT_UNROLL
      for (int j = 0; j < K; j += 32) add(values(), j);
    }
  }
};

}  // namespace lc::cuda
