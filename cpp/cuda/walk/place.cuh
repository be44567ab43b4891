// place.cuh - where a block of a walk reads and writes: its task of the launch, and its place in
// the tensors.
#pragma once
#include "../segments.cuh"
#include "walk.h"

namespace lc::cuda {

// One walk of a launch, and how its work is divided among blocks.
struct Task {
  Problem p;
  Walk walk;
  int parts, part;      // blocks that share the q heads of a state, one head each; with one block, the head it takes
  bool writes;          // whether blocks write states
  int columns, slices;  // columns of V for one block, a multiple of 16; blocks that share the columns of V
  unsigned blocks;
  bool q_aligned, k_aligned, v_aligned, o_aligned, gate_aligned,
      factor_aligned;  // whether every row is aligned to 16 bytes
};

// Distances of the rows and of the columns of a state in memory.
struct Steps {
  int64_t row, column;
};
SIMT_DEV Steps steps(const View& state, bool transposed) {
  return transposed ? Steps{state.stride[3], state.stride[2]} : Steps{state.stride[2], state.stride[3]};
}
// The states of a Walk are dense.
SIMT_DEV Steps dense_steps(const Problem& p, const Walk& w) { return w.transposed ? Steps{1, p.K} : Steps{p.V, 1}; }

// The members of a Place that only outputs have, or only gradients.
template <class E, bool kGradient>
struct PlaceOfAim {
  gptr<const E> gate;  // first token of the walk, column 0
  int64_t head;        // the q head
};
template <class E>
struct PlaceOfAim<E, true> {
  gptr<const E> factor;     // first token of the walk, or null
  gptr<float> products;     // first token of the walk, or null
  gptr<float> checkpoints;  // first checkpoint of the sequence, or null
  float after_weight = 1;   // decay of the state after the walk
  int first_chunk;          // first chunk of the walk, counted in its sequence
  bool skip_first_decay;    // whether the first token of the walk does not decay
};

// The place of a block for one q head. One thread computes it and stores it in shared memory.
template <class E, bool kGradient>
struct Place : PlaceOfAim<E, kGradient> {
  gptr<const E> q, k, v;        // first token of the walk, column 0
  gptr<E> o;                    // first token of the walk, column 0
  gptr<const float> log_decay;  // first token of the walk; null if all tokens have the same
  gptr<const float> length;     // first token of the walk; null if tokens have no lengths
  gptr<const float> before;     // state before the first token; null: zeros
  gptr<float> after;            // state after the last token, or null
  gptr<double> log2;            // log2 of the decay over all tokens, or null
  int chunks;                   // chunks of the walk
  int tail;                     // tokens of the last chunk in time, which may not be full
  int first_output;             // first chunk with outputs; the chunks before it only make the state
  bool after_is_final;          // whether `after` is the final state, not a state of the Walk

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
    const int64_t warm_up = w.warm_up ? horizon(p, cut, s, hs / share) : 0;
    // Positions count in the direction of the walk from here on.
    const int64_t left = segment * w.length, right = segment + 1 == count ? s.length : left + w.length;
    const int64_t begin = backward ? s.length - right : left, end = backward ? s.length - left : right;
    const int64_t start = begin > warm_up ? begin - warm_up : 0;
    const bool last = backward ? !segment : segment + 1 == count;
    const bool nothing = segment >= count || (w.states_only && (last || warm_up));
    const int64_t tokens = nothing ? 0 : end - start;

    const int64_t token = s.begin + (backward ? s.length - 1 - start : start), n = backward ? -token : token;
    q = row<const E>(p.q, s.row, q_head(p, h), n);
    k = row<const E>(p.k, s.row, k_head(p, hs), n);
    v = row<const E>(p.v, s.row, v_head(p, hs), n);
    o = row<E>(p.o, s.row, h, n);
    log_decay = {nullptr};
    if (p.log_decay) log_decay = row<const float>(p.log_decay, s.row, hs / share, backward ? n - 1 : n);
    length = {nullptr};
    if (p.dt) length = row<const float>(p.dt, s.row, hs / share, n);
    chunks = int((tokens + kChunk - 1) / kChunk);
    tail = int(tokens - (chunks - 1) * int64_t(kChunk));
    first_output = w.states_only ? chunks : int((begin - start + kChunk - 1) / kChunk);

    const int64_t size = p.K * p.V, state = (slot * p.Hs + hs) * size;
    before = {nullptr};
    after = {nullptr};
    after_is_final = last;
    log2 = {nullptr};
    if constexpr (kGradient) {
      this->factor = {nullptr};
      this->checkpoints = {nullptr};
      this->products = {nullptr};
      this->first_chunk = int(backward ? (s.length - start + kChunk - 1) / kChunk - 1 : start / kChunk);
      this->skip_first_decay = backward && !start;
      if (!p.o && !w.products) first_output = chunks;
    } else {
      this->gate = row<const E>(p.gate, s.row, h, n);
      this->head = h;
    }
    if (nothing) return;
    if (w.states_only) log2 = {w.log2 + slot * p.Hs + hs};
    if (!w.states_only && (start ? !warm_up : bool(p.initial_state))) {
      if (w.before) {
        before = {w.before + state + (start ? 0 : backward ? count - 1 - segment : -segment) * p.Hs * size};
      } else if (hs % share == 0) {
        before = row<const float>(p.initial_state, b, hs / share, 0);
      }
    }
    if constexpr (kGradient) {
      if (w.products) {
        this->factor = row<const E>(w.factor, s.row, h * w.factor_heads / p.H, n);
        this->products = {w.products + h * lc::tokens(p) + s.row * p.N + token};
      }
      if (w.checkpoints && !part)
        this->checkpoints = {w.checkpoints + (Segments{kCheckpoint}.first_slot(p, b) * p.Hs + hs) * size};
    }
    if (!writes || (parts > 1 && part)) return;
    if (!last) {
      after = {w.after ? w.after + state : nullptr};
    } else if (p.final_state) {
      after = row<float>(p.final_state, b, hs, 0);
    }
    if constexpr (kGradient)
      if (backward && last && s.length) this->after_weight = ex2(float(log2_decay_at(p, s.row, hs / share, -s.begin)));
  }
};

}  // namespace lc::cuda
