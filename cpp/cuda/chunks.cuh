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
// Gradients are walks too (Aim), up to three side by side, in either direction of time.
#pragma once
#include "../simt/tile.cuh"
#include "chunks.h"
#include "decay.cuh"

namespace lc::cuda {

// What gradients need of a Place besides.
template <class E, bool kGradient>
struct PlaceOfGradient {};
template <class E>
struct PlaceOfGradient<E, true> {
  gptr<const E> factor;
  gptr<float> products, kept;  // of the first token, of the sequence; or null
  float after_weight = 1;
  int first_chunk;  // where in its sequence
  bool still;       // the first token does not decay
};

// What one block works on for one q head, in shared memory: made by one thread, read where it is needed.
template <class E, bool kGradient>
struct Place : PlaceOfGradient<E, kGradient> {
  gptr<const E> q, k, v;  // the first token of the walk, column 0
  gptr<E> o;
  gptr<const float> log_decay;  // or null: it is the same for all tokens
  gptr<const float> before;     // the state before the first token, rows `before_stride` apart; null: zeros
  gptr<float> after;            // of the state after the last token, or null
  gptr<double> log2;            // of the decay over all tokens, or null
  int64_t before_stride, after_stride;
  int chunks, tail;  // tail: tokens of the one that is not full, the last in time
  int silent;        // chunks at the beginning that have no outputs

  Place() = default;
  SIMT_DEV Place(const Problem& p, const Walk& w, int64_t block, int parts, int part, bool writes) {
    const Segments cut{w.length};
    const bool backward = kGradient && w.backward;
    const int64_t hs = block / parts % p.Hs, slot = block / parts / p.Hs, share = kGradient ? w.share : 1;
    if (parts > 1) part = int(block % parts);
    const int64_t h = hs * group(p) + part;
    const int64_t b = w.segment < 0 ? cut.owner(p, slot) : slot;
    const Sequence s = sequence_at(p, b);
    const int64_t segment = w.segment < 0 ? slot - cut.first_slot(p, b) : w.segment, count = cut.count(s);
    const int64_t warm_up = w.warm_up ? memory(p, cut, s, hs / share) : 0;
    // In the order of the walk:
    const int64_t left = segment * w.length, right = segment + 1 == count ? s.length : left + w.length;
    const int64_t begin = backward ? s.length - right : left, end = backward ? s.length - left : right;
    const int64_t start = begin > warm_up ? begin - warm_up : 0;
    const bool last = backward ? !segment : segment + 1 == count;
    const bool nothing = segment >= count || (w.alone && (last || warm_up));
    const int64_t tokens = nothing ? 0 : end - start;

    const int64_t token = s.begin + (backward ? s.length - 1 - start : start), n = backward ? -token : token;
    q = row<const E>(p.q, s.row, q_head(p, h), n);
    k = row<const E>(p.k, s.row, k_head(p, hs), n);
    v = row<const E>(p.v, s.row, v_head(p, hs), n);
    o = row<E>(p.o, s.row, h, n);
    log_decay = {nullptr};
    if (p.log_decay) log_decay = row<const float>(p.log_decay, s.row, hs / share, backward ? n - 1 : n);
    chunks = int((tokens + kChunk - 1) / kChunk), tail = int(tokens - (chunks - 1) * int64_t(kChunk));
    silent = w.alone ? chunks : int((begin - start + kChunk - 1) / kChunk);

    const int64_t size = p.K * p.V, state = (slot * p.Hs + hs) * size, dense = kGradient && w.turned ? p.K : p.V;
    before = {nullptr}, before_stride = dense, after = {nullptr}, after_stride = dense, log2 = {nullptr};
    if constexpr (kGradient) {
      this->factor = {nullptr}, this->kept = {nullptr}, this->products = {nullptr};
      this->first_chunk = int(backward ? (s.length - start + kChunk - 1) / kChunk - 1 : start / kChunk);
      this->still = backward && !start;
      if (!p.o && !w.products) silent = chunks;
    }
    if (nothing) return;
    if (w.alone) log2 = {w.log2 + slot * p.Hs + hs};
    if (!w.alone && (start ? !warm_up : bool(p.initial_state))) {
      if (w.before)
        before = {w.before + state + (start ? 0 : backward ? count - 1 - segment : -segment) * p.Hs * size};
      else if (hs % share == 0)
        before = row<const float>(p.initial_state, b, hs / share, 0), before_stride = p.initial_state.stride[2];
    }
    if constexpr (kGradient) {
      if (w.products) {
        this->factor = row<const E>(w.factor, s.row, h * w.factor_heads / p.H, n);
        this->products = {w.products + h * lc::tokens(p) + s.row * p.N + token};
      }
      if (w.kept && !part) this->kept = {w.kept + (Segments{kKept}.first_slot(p, b) * p.Hs + hs) * size};
    }
    if (!writes || (parts > 1 && part)) return;
    if (!last)
      after = {w.after ? w.after + state : nullptr};
    else if (p.final_state)
      after = row<float>(p.final_state, b, hs, 0), after_stride = p.final_state.stride[2];
    if constexpr (kGradient)
      if (backward && last && s.length) this->after_weight = ex2(float(log2_decay_at(p, s.row, hs / share, -s.begin)));
  }
};

// One problem of a launch, and how its work is dealt out.
struct Pass {
  Problem p;
  Walk walk;
  int parts, part;      // q heads of a state that blocks share; where that is one, which
  bool writes;          // states
  int columns, slices;  // of V for one block, a multiple of 16; blocks that share them
  unsigned blocks;
  bool q_aligned, k_aligned, v_aligned, o_aligned, factor_aligned;  // to 16 bytes, every row
};

template <class E, class X, int K, int kColumns, Aim kAim>  // K padded
struct ChunkWalk {
  static constexpr bool kGradient = kAim != Aim::outputs, kDecays = kAim == Aim::decays;
  static constexpr const char* kName = kGradient ? "chunks of gradients" : "chunks forward";
  // Fewer warps where the factor would leave no room in shared memory; as many passes in one launch as there are
  // registers to find one's own.
  static constexpr int kWarps = kDecays && sizeof(E) == 4 && K > 64 ? 2 : 4;
  static constexpr int kPasses = !kGradient || K > 128 ? 1 : kDecays ? 2 : 3;
  static constexpr int C = kChunk, V = kWarps * kColumns;
  static constexpr int kMaxThreads = 32 * kWarps;
  static constexpr int kMinBlocks = is_16_bit<X> && K <= 64 && kColumns == 16 && !kGradient ? 3 : 2;
  using Own = std::conditional_t<is_16_bit<E>, E, X>;  // what inputs are as operands
  using Score = std::conditional_t<is_16_bit<X>, X, float>;
  using At = Place<E, kGradient>;
  static constexpr int kQ = C * (K > V ? K : V), kFactor = kQ + C * (K + V);  // q and later o, k, v, factor
  static constexpr int kStage = kFactor + (kDecays ? C * V : 0);
  static constexpr bool kOnlyOne = 2 * kStage * sizeof(E) > 227 * 1024;  // there is no room for a second stage
  // There are 255 registers. V^T is held for all of S; log-decays are loaded a chunk before their use.
  static constexpr bool kHolds = K <= 128 || !std::is_same_v<Own, float>;
  static constexpr bool kAhead = K <= 128 && !(kGradient && K > 64 && sizeof(E) == 4);
  static constexpr int shared_bytes(int stages) {
    return stages * kStage * int(sizeof(E)) + C * C * int(sizeof(Score)) + 2 * ChunkDecay::kNumbers * 4 +
           (kDecays ? kWarps * C * 4 : 0) + int(sizeof(At)) + 128;
  }

  struct Params {
    Pass pass[kPasses];
    int stages;  // chunks in shared memory, 1 to 3
  };

  static SIMT_DEV void run(const Params& params) {
    const Pass& a = params.pass[kPasses > 1 ? unsigned(bid().x) % kPasses : 0];
    if (kGradient && block() >= a.blocks) return;
    Smem smem;
    const Shared<Score, C, C> A{smem.alloc<Score>(C * C, 128)};
    const auto weights = smem.alloc<float>(2 * ChunkDecay::kNumbers);
    const auto sums = smem.alloc<float>(kDecays ? kWarps * C : 0);
    const auto place = smem.alloc<At>(1);
    const auto ring = smem.alloc<E>(params.stages * kStage, 128);
    if (!tid()) place.st(0, At(a.p, a.walk, block() / unsigned(a.slices), a.parts, a.part, a.writes));
    sync_cta();
    walk_head(a, params.stages, ring, A, weights, sums, place);
  }

 private:
  static SIMT_DEV sptr<E> stage(int stages, sptr<E> ring, int i) {
    return ring.sub(kOnlyOne ? 0 : i % stages * kStage, kStage);
  }
  static SIMT_DEV unsigned block() { return unsigned(bid().x) / kPasses; }
  static SIMT_DEV bool backward(const Pass& a) { return kGradient && a.walk.backward; }

  // Chunk i to its stage of the ring.
  static SIMT_DEV void fetch(const Pass& a, int stages, sptr<E> ring, sptr<At> place, int i) {
    const Problem& p = a.p;
    const At at = place.ld(0);
    if (i < at.chunks) {
      const int n = tokens(a, at, i), c0 = block_column(a), columns = columns_of_block(a);
      const int64_t t = first_token(a, at, i);
      const auto to = stage(stages, ring, i);
      const auto [q, k, v] = operands(to);
      if (i >= at.silent) load_async(q, at.q.sub(t * p.q.stride[2]), p.q.stride[2], n, int(p.K), a.q_aligned);
      load_async(k, at.k.sub(t * p.k.stride[2]), p.k.stride[2], n, int(p.K), a.k_aligned);
      load_async(v, at.v.sub(t * p.v.stride[2] + c0), p.v.stride[2], n, columns, a.v_aligned,
                 kGradient ? V : a.columns);
      if constexpr (kDecays) {
        const int64_t stride = a.walk.factor.stride[2];
        if (i >= at.silent)
          load_async(factor(to), at.factor.sub(t * stride + c0), stride, n, columns, a.factor_aligned);
      }
    }
    cp_commit();
  }
  struct Operands {
    Shared<E, C, K> q, k;
    Shared<E, C, V> v;
  };
  static SIMT_DEV Operands operands(sptr<E> stage) {
    return {{stage.sub(0, C * K)}, {stage.sub(kQ, C * K)}, {stage.sub(kQ + C * K, C * V)}};
  }
  static SIMT_DEV Shared<E, C, V> factor(sptr<E> stage) { return {stage.sub(kFactor, C * V)}; }
  static SIMT_DEV int tokens(const Pass& a, const At& at, int i) {
    if (backward(a)) return i >= at.chunks ? 0 : i ? C : at.tail;
    return i + 1 < at.chunks ? C : i < at.chunks ? at.tail : 0;
  }
  static SIMT_DEV int64_t first_token(const Pass& a, const At& at, int i) {
    return fresh(int64_t(i) * C - (backward(a) && i ? C - at.tail : 0));
  }
  static SIMT_DEV float2 decay_of(const Pass& a, sptr<At> place, int i) {
    const At at = place.ld(0);
    if (!a.p.log_decay) return {0, 0};
    return load_decay(at.log_decay, a.p.log_decay.stride[2], first_token(a, at, i), tokens(a, at, i),
                      kAhead ? lane() : fresh(lane()), is_still(at, i));
  }
  static SIMT_DEV bool is_still(const At& at, int i) {
    if constexpr (kGradient) return at.still && !i;
    return false;
  }
  static SIMT_DEV ChunkDecay weights_of(sptr<float> weights, int i) {
    return ChunkDecay(weights.sub((i & 1) * ChunkDecay::kNumbers, ChunkDecay::kNumbers));
  }

  // Of V: the first column of this warp among those of the block; of the block; and how many there are from there on.
  // Passes of one launch may have fewer columns than there are warps for.
  static SIMT_DEV int warp_column() { return fresh(tid()) / 32 * kColumns; }
  static SIMT_DEV int slice(const Pass& a) { return int(block() % unsigned(a.slices)); }
  static SIMT_DEV int block_column(const Pass& a) { return slice(a) * a.columns; }
  static SIMT_DEV int columns_of_block(const Pass& a) {
    const int rest = int(a.p.V) - block_column(a);
    return kGradient && rest > a.columns ? a.columns : rest;
  }
  static SIMT_DEV int columns_left(const Pass& a) { return columns_of_block(a) - warp_column(); }
  // Strips of A are dealt out one way and the other, so that warps of two blocks together have equal work; the one with
  // least makes the weights of the next chunk.
  static SIMT_DEV int flip() { return bid().x & 1 ? C / 16 - 1 : 0; }
  static SIMT_DEV bool is_keeper() { return fresh(tid()) / 32 == (flip() ? nwarps() - 1 : 0); }

  static SIMT_DEV void walk_head(const Pass& a, int stages, sptr<E> ring, const Shared<Score, C, C>& A,
                                 sptr<float> weights, sptr<float> sums, sptr<At> place) {
    for (int i = 0; i + 1 < stages; ++i) fetch(a, stages, ring, place, i);
    float2 next = decay_of(a, place, 0);
    if (is_keeper()) {
      keep(a, weights, place, next, 0);
      if (kAhead) next = decay_of(a, place, 1);
    }
    Strip<kColumns, K> S;
    zero(S);
    if (const auto before = place.ld(0).before; before.p) {
      const Steps step(a, place.ld(0).before_stride);
      const auto from = before.sub((block_column(a) + warp_column()) * step.column);
      const int columns = columns_left(a), rows = int(a.p.K);
      map(S,
          [&](int c, int r, float) { return c < columns && r < rows ? from.ld(r * step.row + c * step.column) : 0.f; });
    }

    if constexpr (kDecays) keep_state(a, place, 0, S);
    for (int i = 0; i < place.ld(0).chunks; ++i) {
      if (stages == 1) sync_cta(), fetch(a, stages, ring, place, i);
      if (stages == 3)
        cp_wait<1>();
      else
        cp_wait<0>();
      sync_cta();  // this chunk is there, and everyone has done with the one before
      if (stages > 1) fetch(a, stages, ring, place, i + stages - 1);
      if (is_keeper() && i + 1 < place.ld(0).chunks) {
        keep(a, weights, place, kAhead ? next : decay_of(a, place, i + 1), i + 1);
        if (kAhead) next = decay_of(a, place, i + 2);
      }
      const auto now = stage(stages, ring, i);
      const auto [q, k, v] = operands(now);
      const Shared<E, C, V> o{now.sub(0, C * V)};
      const ChunkDecay decay = weights_of(weights, i);
      if (i >= place.ld(0).silent) {
        const auto own = sums.sub(kDecays ? warp() * C : 0, kDecays ? C : 0);
        if (kDecays) own.stv(2 * lane(), float2{0, 0}), sync_warp();
        for (int strip = warp(); strip < C / 16; strip += nwarps()) {
          const int i0 = 16 * (strip ^ flip());
          SIMT_UNROLL
          for (int j0 = 0; j0 < C; j0 += C / 2)
            if (j0 <= i0) score(a, A, now, decay, i0, j0, own);
        }
        Strip<kColumns, C> O;
        zero(O);
        if constexpr (kDecays)
          multiply(a, own, O, S, q, factor(now), decay);
        else
          mma_nt(O, operand<X>(S), q);
        map(O, [&](int, int j, float x) { return x * decay.in.ld(j); });
        sync_cta();  // A is there, and q is read
        if constexpr (kDecays) write_products(a, place, i, sums);
        if (!kGradient || a.p.o) {
          mma_nt<true>(O, operand_t<X>(v, warp_column()), A);
          const float scale = output_scale(a);
          map(O, [&](int, int, float x) { return x * scale; });
          store_t(o, warp_column(), O);
          sync_warp();
          const At at = place.ld(0);
          const int64_t stride = a.p.o.stride[2];
          write_rows<kColumns>(at.o.sub(first_token(a, at, i) * stride + block_column(a) + warp_column()), stride, o,
                               warp_column(), tokens(a, at, i), columns_left(a), a.o_aligned);
        }
      }
      if (i + 1 < place.ld(0).chunks || place.ld(0).after.p || backward(a)) advance(a, S, v, k, decay);
      if constexpr (kDecays) keep_state(a, place, i + 1, S);
    }
    cp_wait<0>();

    if (const auto after = place.ld(0).after; after.p) {
      float weight = 1;
      if constexpr (kGradient) weight = place.ld(0).after_weight;
      store_state(a, after, {a, place.ld(0).after_stride}, S, weight);
    }
  }

  // How far rows and columns of a state in memory are apart, whose rows there are `stride` apart.
  struct Steps {
    int64_t row, column;
    SIMT_DEV Steps(const Pass& a, int64_t stride)
        : row(kGradient && a.walk.turned ? 1 : stride), column(kGradient && a.walk.turned ? stride : 1) {}
  };
  static SIMT_DEV void store_state(const Pass& a, gptr<float> to, const Steps& step, const Strip<kColumns, K>& S,
                                   float weight) {
    const auto own = to.sub((block_column(a) + warp_column()) * step.column);
    const int columns = columns_left(a), rows = int(a.p.K);
    each(S, [&](int c, int r, float x) {
      if (c < columns && r < rows) own.st(r * step.row + c * step.column, kGradient ? x * weight : x);
    });
  }
  // The state before chunk i of the walk, where it is one of those to be kept. What two walks share, the one it is
  // after in time keeps.
  static SIMT_DEV void keep_state(const Pass& a, sptr<At> place, int i, const Strip<kColumns, K>& S) {
    const At at = place.ld(0);
    constexpr int kEvery = kKept / kChunk;
    const int chunk = backward(a) ? at.first_chunk - i + 1 : at.first_chunk + i;
    if (!at.kept.p || chunk % kEvery || (backward(a) ? i <= at.silent : i < at.silent || i >= at.chunks)) return;
    const int64_t size = a.p.K * a.p.V;
    store_state(a, at.kept.sub(chunk / kEvery * a.p.Hs * size), {a, a.walk.turned ? a.p.K : a.p.V}, S, 1);
  }
  static SIMT_DEV float output_scale(const Pass& a) { return backward(a) ? 1 : float(a.p.scale); }
  static SIMT_DEV float key_scale(const Pass& a) { return backward(a) ? float(a.p.scale) : 1; }

  static SIMT_DEV bool is_precise(const Pass& a) { return K > 128 || std::is_same_v<Own, float> || a.walk.precise; }
  // The products of what comes through the state. Sums over chunks are made of them and of products of states, and if
  // these disagreed, errors would add up. So S counts with all its digits, and the factor is rounded as it is where it
  // becomes part of the states of the other direction.
  static SIMT_DEV void multiply(const Pass& a, sptr<float> sums, Strip<kColumns, C>& O, const Strip<kColumns, K>& S,
                                const Shared<E, C, K>& q, const Shared<E, C, V>& factor, const ChunkDecay& decay) {
    if constexpr (std::is_same_v<X, float>)
      mma_nt</*kLower=*/false, /*kRounded=*/true>(O, operand<float>(S), q);
    else
      mma_nt(O, in_two<X>(operand<float>(S)), q);
    const auto columns = operand_t<E>(factor, warp_column());
    const ChunkDecay::SinceFirst weights{decay};
    if (is_precise(a))
      add_products(sums, O, weighted<float>(columns, weights), decay.in.ld(0));
    else
      add_products(sums, O, weighted<Own>(columns, weights), decay.in.ld(0));
  }
  // What the warps have added up for chunk i.
  static SIMT_DEV void write_products(const Pass& a, sptr<At> place, int i, sptr<float> sums) {
    const At at = place.ld(0);
    const int64_t t = first_token(a, at, i), of_slice = slice(a) * a.p.H * lc::tokens(a.p);
    const int n = tokens(a, at, i);
    const float scale = output_scale(a);
    for (int j = tid(); j < n; j += nthreads()) {
      float sum = 0;
      for (int m = 0; m < nwarps(); ++m) sum += sums.ld(m * C + j);
      at.products.st(of_slice + (backward(a) ? -(t + j) : t + j), scale * sum);
    }
  }

  // By one warp: the weights of chunk i, and log2 of the decay up to its end.
  static SIMT_DEV void keep(const Pass& a, sptr<float> weights, sptr<At> place, float2 log_decay, int i) {
    const At at = place.ld(0);
    const double log2 = weights_of(weights, i).set(a.p, log_decay, tokens(a, at, i), is_still(at, i));
    const auto sum = place.ld(0).log2;
    if (sum.p && !lane() && !block_column(a)) sum.st(0, i ? sum.ld(0) + log2 : log2);
  }

  // A from (i0, j0) on, half of 16 rows of it.
  static SIMT_DEV void score(const Pass& a, const Shared<Score, C, C>& A, sptr<E> stage, const ChunkDecay& decay,
                             int i0, int j0, sptr<float> sums) {
    const auto [q, k, v] = operands(stage);
    Strip<16, C / 2> strip;
    zero(strip);
    mma_nt(strip, operand<Own>(q, i0), k.template rows<C / 2>(j0));
    map(strip, [&](int i, int j, float x) { return j0 + j <= i0 + i ? x * decay.mask(i0 + i, j0 + j) : 0.f; });
    if constexpr (kDecays) {
      if (!backward(a)) {
        Strip<16, C / 2> w;
        zero(w);
        mma_nt(w, operand<Own>(factor(stage), i0), v.template rows<C / 2>(j0));
        merge(w, 0, strip, [](float x, float y) { return x * y; });
        map(w, [&](int i, int j, float x) { return j0 + j < i0 + i ? x : 0.f; });
        add_rows(sums, i0, w);
        add_columns(sums, j0, w, -1);
      }
    }
    if constexpr (kGradient) {
      const float scale = key_scale(a);
      map(strip, [&](int, int, float x) { return x * scale; });
    }
    store<X>(A, i0, j0, strip);
  }

  static SIMT_DEV void advance(const Pass& a, Strip<kColumns, K>& S, const Shared<E, C, V>& v, const Shared<E, C, K>& k,
                               const ChunkDecay& decay) {
    if constexpr (kDecays) {
      if (is_precise(a)) {
        SIMT_UNROLL
        for (int j = 0; j < K; j += 32) {
          const auto values = weighted<float>(operand_t<E>(v, warp_column()), decay.out);
          if constexpr (std::is_same_v<Own, float>)
            add<true>(a, S, values, k, decay, j);
          else
            add(a, S, in_two<Own>(values), k, decay, j);
        }
        return;
      }
    }
    const auto values = [&] { return weighted<Own>(operand_t<E>(v, warp_column()), decay.out); };
    if constexpr (kHolds) {
      const auto held = hold<kColumns, C>(values());
      SIMT_UNROLL
      for (int j = 0; j < K; j += 32) add(a, S, held, k, decay, j);
    } else {
      SIMT_UNROLL
      for (int j = 0; j < K; j += 32) add(a, S, values(), k, decay, j);
    }
  }
  // Of S^T, columns [j, j + 32).
  template <bool kRounded = false, class Values>
  static SIMT_DEV void add(const Pass& a, Strip<kColumns, K>& S, const Values& values, const Shared<E, C, K>& k,
                           const ChunkDecay& decay, int j) {
    const float total = decay.total(), rest = decay.rest(), scale = key_scale(a);
    Strip<kColumns, 32> sum;
    zero(sum);
    mma<kRounded>(sum, values, k, j);
    merge(S, j, sum, [&](float x, float y) { return mul_add(x, total, mul_add(x, rest, kGradient ? y * scale : y)); });
  }
};

}  // namespace lc::cuda
