// scan.cpp - CPU: segments of a sequence in parallel, in three passes with barriers between them:
//
//   1. segments i but the last, from zero, by chunks:  S_i+1 <- total S_i+1 + (diag(out) K)^T V
//   2. a scan over segments, by panels of columns:     S_i+1 <- 2^(sum L of segment i) S_i + S_i+1
//   3. every segment from S_i, as method chunk does:   O = scale (diag(in) Q S + A V), S as in 1
//
//   B N (H ((C+1)(K+V) + 2KV) + Hs 4KV) flop, Hs 2KV more than chunk: for few heads and long N,
//   where chunk has too few tasks. There are at most 16 segments, each of 4 or more chunks. Their
//   number does not depend on the workers, nor do answers. Workspace: K V numbers per segment
//   Mamba-2 (state passing), arXiv:2405.21060; Martin and Cundy 2018 (scans), arXiv:1709.04057
#include "../../cpu/cost.h"
#include "../../cpu/scratch.h"
#include "../../cpu/state.h"
#include "../../cpu/threads.h"
#include "../../methods.h"

namespace lc::LC_ISA {
namespace {

constexpr int64_t kMostSegments = 16, kLeastTokens = 4 * C;

int64_t segments(int64_t tokens) { return std::min(kMostSegments, std::max<int64_t>(1, tokens / kLeastTokens)); }

struct Segment {
  int64_t begin, end;
};

// Segment i of a sequence: whole chunks, except at the end of the sequence.
Segment segment(int64_t length, int64_t i) {
  const int64_t n = segments(length), chunks = (length + C - 1) / C;
  return {chunks * i / n * C, std::min(length, chunks * (i + 1) / n * C)};
}

// The index of the first segment of sequence b among all segments; for b = B an upper bound of
// their number. The upper bound does not depend on the lengths of packed sequences.
int64_t base(const Problem& p, int64_t b) {
  if (!p.cu_bits) return b * segments(p.N);
  if (kMostSegments * p.B <= p.B + p.N / kLeastTokens) return b * kMostSegments;
  return b + (b < p.B ? sequence(p, b).begin : p.N) / kLeastTokens;
}

double flop(const Problem& p) {
  const int64_t length = int64_t(mean_length(p)), n = segments(length);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Segment part = segment(length, i);
    const bool last = i + 1 == n;
    const ChunkWork w = chunk_work(double(part.end - part.begin), i || p.initial_state, last && p.final_state);
    const double alone = last ? 0 : double(part.end - part.begin);
    sum += flop(p, ChunkWork{w.pairs, w.reads, w.writes + alone});
  }
  return double(p.B) * sum;
}

// The state before each segment and the log2 of each segment's decay, in memory that all workers
// share.
template <class E>
struct SegmentStates {
  using T = Accumulator<E>;
  const Problem& p;
  T* states;
  double* log2;

  SegmentStates(const Problem& problem, Arena& arena)
      : p(problem),
        states(arena.take<T>(base(p, p.B) * p.Hs * State<E>::size(p))),
        log2(arena.take<double>(base(p, p.B) * p.Hs)) {}

  int64_t at(int64_t b, int64_t hs, int64_t i) const { return (base(p, b) + i) * p.Hs + hs; }
  State<E> state(int64_t at) const {
    State<E> s(p, states + at * State<E>::size(p));
    s.live = true;
    return s;
  }
};

template <class E>
struct ScanWorker {
  using T = Accumulator<E>;
  const Problem& p;
  Tokens<E> chunk;
  T* o_copy;

  ScanWorker(const Problem& problem, Arena& arena)
      : p(problem), chunk(arena, p), o_copy(arena.take<T>(C * padded<T>(p.V))) {}

  // Pass 1: the state of the tokens of segment i alone.
  void summarise(const SegmentStates<E>& shared, int64_t i, int64_t b, int64_t hs) {
    const Sequence s = sequence(p, b);
    if (i + 1 >= segments(s.length)) return;
    const Segment part = segment(s.length, i);
    State<E> state = shared.state(shared.at(b, hs, i + 1));
    state.live = false;
    double log2 = 0;
    chunk.decay.begin_head(p, s, hs);
    for (int64_t t = part.begin; t < part.end; t += C) {
      chunk.locate(s, t);
      chunk.load_keys(p, s, hs);
      chunk.load_values(p, s, hs, state.panels, state.first, state.last);
      chunk.weigh_keys(p);
      state.advance(chunk);
      log2 += chunk.decay.log2_total;
    }
    shared.log2[shared.at(b, hs, i)] = log2;
  }

  // Pass 2: turns the states of single segments into the states before segments, in one panel of
  // columns.
  void accumulate(const SegmentStates<E>& shared, int64_t b, int64_t hs, int panel) {
    const int64_t n = segments(sequence(p, b).length);
    if (n == 1) return;
    shared.state(shared.at(b, hs, 0)).one_panel(panel).load_initial(b, hs);
    for (int64_t i = 1; i < n; ++i) {
      State<E> before = shared.state(shared.at(b, hs, i - 1)).one_panel(panel);
      State<E> after = shared.state(shared.at(b, hs, i)).one_panel(panel);
      before.live = i > 1 || p.initial_state;
      after.combine(shared.log2[shared.at(b, hs, i - 1)], before, after);
    }
  }

  // Pass 3: the outputs of segment i, and the final state if it is the last segment.
  void outputs(const SegmentStates<E>& shared, int64_t i, int64_t b, int64_t hs) {
    const Sequence s = sequence(p, b);
    if (i >= segments(s.length)) return;
    const Segment part = segment(s.length, i);
    const bool last = i + 1 == segments(s.length);
    State<E> state = shared.state(shared.at(b, hs, i));
    if (segments(s.length) == 1)
      state.load_initial(b, hs);
    else
      state.live = i > 0 || p.initial_state;
    chunk.decay.begin_head(p, s, hs);
    for (int64_t t = part.begin; t < part.end; t += C) {
      chunk.locate(s, t);
      chunk.load_keys(p, s, hs);
      chunk.load_values(p, s, hs, state.panels, state.first, state.last);
      for (int64_t h = hs * group(p); h < (hs + 1) * group(p); ++h) {
        chunk.load_queries(p, s, h);
        chunk.score(p);
        write_output(p, chunk, state, s, h, o_copy);
      }
      if (t + C < part.end || (last && p.final_state)) {
        chunk.weigh_keys(p);
        state.advance(chunk);
      }
    }
    if (last && p.final_state) state.store_final(b, hs);
  }
};

int workers(const Problem& p) { return workers_for(p, base(p, p.B) * p.Hs, flop(p)); }

size_t workspace(const Problem& p) {
  return scratch_bytes<SegmentStates>(p, 1) + scratch_bytes<ScanWorker>(p, workers(p));
}

void run(const Problem& p) {
  Tasks segment_states(p), prefixes(p), segment_outputs(p);
  Barrier barrier;
  const int64_t most = segments(p.N), states = p.B * p.Hs;
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    const int64_t panels = Panels(vectors<Accumulator<E>>(p.V)).count;
    run_workers(workers(p), [&](int index, int granted) {
      Arena arena(p.workspace);
      const SegmentStates<E> shared(p, arena);
      ScanWorker<E> worker = cut<ScanWorker, E>(p, arena, index);
      worker.chunk.clear_scores();
      segment_states.each(states * (most - 1), index, granted,
                          [&](int64_t i) { worker.summarise(shared, i / states, i % states / p.Hs, i % p.Hs); });
      barrier.wait(granted);
      prefixes.each(most > 1 ? states * panels : 0, index, granted, [&](int64_t i) {
        worker.accumulate(shared, i / panels / p.Hs, i / panels % p.Hs, int(i % panels));
      });
      barrier.wait(granted);
      segment_outputs.each(states * most, index, granted,
                           [&](int64_t i) { worker.outputs(shared, i / states, i % states / p.Hs, i % p.Hs); });
    });
  });
}

Cost cost(const Problem& p) {
  const double n = mean_length(p), count = double(segments(int64_t(n))), chunks = double(tokens(p)) / C;
  const double states = 4 * double(p.B) * count * double(p.Hs) * state_bytes(p);
  const double again = double(tokens(p)) * type_bytes(p.type) * double(p.Hk * p.K + p.Hv * p.V) * (1 - 1 / count);
  return predict(p,
                 {flop(p), states + again, /*depth=*/2 * n / C / count + count,
                  /*tasks=*/double(p.H) * (double(p.B) * count + 7 * chunks)},
                 /*efficiency=*/0.8, workers(p));
}

}  // namespace

extern const Method scan_cpu = {
    {"scan", "cpu", "segments in parallel, a scan over their states, then the outputs", "Mamba-2, arXiv:2405.21060"},
    {Feature::forward | kAllTypes | kAllDecays | kSequences | kMamba2},
    refuses_nothing,
    cost,
    workspace,
    run};

}  // namespace lc::LC_ISA
