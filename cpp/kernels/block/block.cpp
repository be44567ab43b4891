// block.cpp - CPU: block after block of C tokens, all heads in each; states wait in memory.
//
//   O = scale (diag(in) Q S + A V),   A_ij = [j <= i] mask_ij q_i.k_j    for each head of a block
//   S = total S + (diag(out) K)^T V                       weights in, mask, out, total: cpu/decay.h
//
//   Q, K [C, K]   V, O [C, V]   A [C, C]   S [K, V], one per (sequence, head), in the workspace
//   B H N ((C+1)(K+V) + 4KV) flop, as chunk. Every state goes to memory and back in every block.
//   Tokens are read once for all heads, in the order of their memory in a [B, N, H, D] tensor.
//   tasks: the (sequence, state) pairs of one worker, or pieces of their columns; they never wait
//   LeetDecoding (block-based), arXiv:2501.02573; TransNormerLLM (inference), arXiv:2307.14995
#include "../../cpu/cost.h"
#include "../../cpu/scratch.h"
#include "../../cpu/state.h"
#include "../../cpu/threads.h"
#include "../../methods.h"

namespace lc::LC_ISA {
namespace {

double flop(const Problem& p) {
  return double(p.B) * flop(p, chunk_work(mean_length(p), bool(p.initial_state), bool(p.final_state)));
}

template <class E>
struct BlockWorker {
  using T = Accumulator<E>;
  const Problem& p;
  Tokens<E> chunk;
  T* o_copy;

  BlockWorker(const Problem& problem, Arena& arena)
      : p(problem), chunk(arena, p), o_copy(arena.take<T>(C * padded<T>(p.V))) {}

  State<E> state(T* states, const Task& task) const {
    State<E> s(p, states + task.state * State<E>::size(p));
    s.take(task);
    return s;
  }

  // The outputs and the new state of the block of one task that begins at token t.
  void block(const Task& task, State<E>& state, const Sequence& s, int64_t t) {
    chunk.decay.begin_head(p, s, task.hs);
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

  // The tasks first, first + step, ... of the plan: initial states, all blocks, final states.
  void run(T* states, const Plan& plan, int64_t first, int64_t step) {
    int64_t longest = 0;
    for (int64_t i = first; i < plan.tasks; i += step) {
      const Task task(p, plan, i);
      State<E> s = state(states, task);
      s.load_initial(task.b, task.hs);
      longest = std::max(longest, sequence(p, task.b).length);
    }
    for (int64_t t = 0; t < longest; t += C)
      for (int64_t i = first; i < plan.tasks; i += step) {
        const Task task(p, plan, i);
        const Sequence s = sequence(p, task.b);
        if (t >= s.length) continue;
        State<E> S = state(states, task);
        S.live = t > 0 || p.initial_state;
        block(task, S, s, t);
      }
    for (int64_t i = first; p.final_state && i < plan.tasks; i += step) {
      const Task task(p, plan, i);
      State<E> s = state(states, task);
      s.live = sequence(p, task.b).length > 0 || p.initial_state;
      s.store_final(task.b, task.hs);
    }
  }
};

int workers(const Problem& p) { return workers_for(p, p.B * p.Hs * vectors<float>(p.V), flop(p)); }

template <class E>
struct BlockStates {
  Accumulator<E>* states;
  BlockStates(const Problem& p, Arena& arena) : states(arena.take<Accumulator<E>>(p.B * p.Hs * State<E>::size(p))) {}
};

size_t workspace(const Problem& p) {
  return scratch_bytes<BlockStates>(p, 1) + scratch_bytes<BlockWorker>(p, workers(p));
}

void run(const Problem& p) {
  Tasks shares(p);
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    run_workers(workers(p), [&](int index, int granted) {
      const Plan plan = make_plan(p, granted, /*split_heads=*/false);
      Arena arena(p.workspace);
      const BlockStates<E> shared(p, arena);
      BlockWorker<E> worker = cut<BlockWorker, E>(p, arena, index);
      worker.chunk.clear_scores();
      // Shares are tasks, since a worker may never begin: another one then takes its share.
      shares.each(granted, index, granted, [&](int64_t share) { worker.run(shared.states, plan, share, granted); });
    });
  });
}

Cost cost(const Problem& p) {
  const double blocks = double(tokens(p)) / C, states = 2 * blocks * double(p.Hs) * state_bytes(p);
  return predict(p,
                 {flop(p), states, /*depth=*/mean_length(p) / C,
                  /*tasks=*/double(p.H) * (double(p.B) + 5 * blocks)},
                 /*efficiency=*/0.8, workers(p));
}

}  // namespace

extern const Method block_cpu = {
    {"block", "cpu", "block after block, all heads in each; states in memory", "LeetDecoding, arXiv:2501.02573"},
    {Feature::forward | kAllTypes | kAllDecays | kSequences | kMamba2},
    refuses_nothing,
    cost,
    workspace,
    run};

}  // namespace lc::LC_ISA
