// chunk.cpp - CPU: chunks of C tokens, matrix products inside a chunk, one state between chunks.
//
//   O = scale (diag(in) Q S + A V),   A_ij = [j <= i] mask_ij q_i.k_j
//   S = total S + (diag(out) K)^T V                    weights in, mask, out, total: cpu/decay.h
//
//   Q, K [C, K]   V, O [C, V]   A [C, C]   S [K, V] in column panels, one register tile wide
//   B H N ((C+1)(K+V) + 4KV) flop; scratch per worker K V + C (C + 2K + 2V) numbers for every N
//   tasks: (sequence, state) pairs; if those are few, parts of their q heads, then of V's columns
//   Lightning Attention-2, arXiv:2401.04658; GLA, arXiv:2312.06635
#include "../../cpu/cost.h"
#include "../../cpu/scratch.h"
#include "../../cpu/state.h"
#include "../../cpu/threads.h"
#include "../../methods.h"
#include "chunk_backward.h"

namespace lc::LC_ISA {
namespace {

double flop(const Problem& p) {
  return double(p.B) * flop(p, chunk_work(mean_length(p), bool(p.initial_state), bool(p.final_state)));
}

template <class E>
struct ChunkWorker {
  using T = Accumulator<E>;
  const Problem& p;
  Tokens<E> chunk;
  State<E> state;
  T* o_copy;

  ChunkWorker(const Problem& problem, Arena& arena)
      : p(problem),
        chunk(arena, p),
        state(p, arena.take<T>(State<E>::size(p))),
        o_copy(arena.take<T>(C * padded<T>(p.V))) {}

  void run(const Task& task) {
    const Sequence s = sequence(p, task.b);
    state.take(task);
    state.load_initial(task.b, task.hs);
    chunk.decay.begin_head(p, s, task.hs);
    for (int64_t t = 0; t < s.length; t += C) {
      chunk.locate(s, t);
      chunk.load_keys(p, s, task.hs);
      chunk.load_values(p, s, task.hs, state.panels, state.first, state.last);
      for (int64_t h = task.first_head; h < task.last_head; ++h) {
        chunk.load_queries(p, s, h);
        chunk.score(p);
        write_output(p, chunk, state, s, h, o_copy);
      }
      if (t + C < s.length || task.writes_state) {
        chunk.weigh_keys(p);
        state.advance(chunk);
      }
    }
    if (task.writes_state) state.store_final(task.b, task.hs);
  }
};

int workers(const Problem& p) { return workers_for(p, p.B * p.H * vectors<float>(p.V), flop(p)); }

size_t workspace(const Problem& p) {
  return p.op == LC_BACKWARD ? backward::workspace(p) : scratch_bytes<ChunkWorker>(p, workers(p));
}

void run(const Problem& p) { p.op == LC_BACKWARD ? backward::run(p) : run_tasks<ChunkWorker>(p, workers(p)); }

Cost cost(const Problem& p) {
  if (p.op == LC_BACKWARD) return backward::cost(p);
  const double tasks = double(p.H) * (double(p.B) + 5 * double(tokens(p)) / C);
  return predict(p, {flop(p), /*extra_bytes=*/0, /*depth=*/mean_length(p) / C, tasks}, /*efficiency=*/0.8, workers(p));
}

}  // namespace

extern const Method chunk_cpu = {
    {"chunk", "cpu", "chunks of 64 tokens: matrix products inside, one state in cache between",
     "Lightning Attention-2, arXiv:2401.04658"},
    {Feature::forward | Feature::backward | Feature::decay_gradients | kAllTypes | kAllDecays | kSequences},
    refuses_nothing,
    cost,
    workspace,
    run,
    "lightning"};

}  // namespace lc::LC_ISA
