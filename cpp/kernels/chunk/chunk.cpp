// chunk.cpp - CPU: chunks of C tokens, matrix products inside a chunk, one state between chunks.
//
//   O = scale (diag(in) Q S + A V),   A_ij = [j <= i] mask_ij q_i.k_j
//   S = total S + (diag(out) K)^T V                    weights in, mask, out, total: cpu/decay.h
//
//   Q, K [C, K]   V, O [C, V]   A [C, C]   S [K, V] in column panels, one register tile wide
//   B H N ((C+1)(K+V) + 4KV) flop; scratch per worker K V + C (C + 2K + 2V) numbers for every N
//   tasks: (sequence, state) pairs; if those are few, parts of their q heads, then of V's columns.
//   States with the same heads of q and k, and decays per token, are one task: a family of F states
//   computes Q K^T once, which saves 1 - 1/F of (C+1) K.
//   Lightning Attention-2, arXiv:2401.04658; GLA, arXiv:2312.06635
#include <numeric>

#include "../../cpu/cost.h"
#include "../../cpu/scratch.h"
#include "../../cpu/state.h"
#include "../../cpu/threads.h"
#include "../../methods.h"
#include "chunk_backward.h"

namespace lc::LC_ISA {
namespace {

// The states of a family fit these bytes. The rest of the L2 cache is for the chunk.
constexpr double kFamilyBytes = 1 << 18;
constexpr int64_t kMostStates = 8;

// The number of states of one task that share products of queries and keys. Decays per head have
// their weights made once per head, so that their heads are one after the other.
int64_t family(const Problem& p) {
  if (p.decay != Decay::per_token || group(p) > 1) return 1;
  const int64_t shared = std::gcd(p.Hs / p.Hk, p.Hs / p.Hq);
  for (int64_t f = std::min({shared, kMostStates, int64_t(kFamilyBytes / state_bytes(p))}); f > 1; --f)
    if (shared % f == 0 && balanced(p.B * p.Hs / f, p.threads)) return f;
  return 1;
}

double flop(const Problem& p) {
  const ChunkWork w = chunk_work(mean_length(p), bool(p.initial_state), bool(p.final_state));
  const double shared = 1 - 1 / double(family(p));
  return double(p.B) * (flop(p, w) - shared * double(p.H) * 2 * w.pairs * double(p.K));
}

template <class E>
struct ChunkWorker {
  using T = Accumulator<E>;
  const Problem& p;
  const int64_t states;  // of a family
  Tokens<E> chunk;
  T* memory;    // of the states
  T* products;  // [C, C]: Q K^T of a family
  T* o_copy;

  ChunkWorker(const Problem& problem, Arena& arena)
      : p(problem),
        states(family(p)),
        chunk(arena, p),
        memory(arena.take<T>(states * State<E>::size(p))),
        products(arena.take<T>(states > 1 ? C * C : 0)),
        o_copy(arena.take<T>(C * padded<T>(p.V))) {
    if (states > 1) chunk.weighed = arena.take<T>(p.K * C);
  }

  // State i of a family. After the first chunk, or with an initial state, it is not zero.
  State<E> state(const Task& task, int64_t i, int64_t t) const {
    State<E> S(p, memory + i * State<E>::size(p));
    S.take(task);
    S.live = t > 0 || p.initial_state;
    return S;
  }

  void run(const Task& task) {
    const Sequence s = sequence(p, task.b);
    for (int64_t i = 0; i < states; ++i) state(task, i, 0).load_initial(task.b, task.hs + i);
    if (states == 1) chunk.decay.begin_head(p, s, task.hs);
    for (int64_t t = 0; t < s.length; t += C)
      for (int64_t i = 0; i < states; ++i) {
        const int64_t hs = task.hs + i;
        State<E> S = state(task, i, t);
        if (states > 1) chunk.decay.begin_head(p, s, hs);
        chunk.locate(s, t);
        if (i == 0) chunk.load_keys(p, s, hs);
        chunk.load_values(p, s, hs, S.panels, S.first, S.last);
        states == 1 ? outputs(task, s, S) : output(s, hs, S, i == 0);
        if (t + C < s.length || task.writes_state) {
          chunk.weigh_keys(p);
          S.advance(chunk);
        }
      }
    for (int64_t i = 0; task.writes_state && i < states; ++i) state(task, i, s.length).store_final(task.b, task.hs + i);
  }

  // The outputs of all q heads of a task with one state.
  void outputs(const Task& task, const Sequence& s, const State<E>& S) {
    for (int64_t h = task.first_head; h < task.last_head; ++h) {
      chunk.load_queries(p, s, h);
      chunk.score(p);
      write_output(p, chunk, S, s, h, o_copy);
    }
  }

  // The output of one head of a family, whose first head computes the products for all.
  void output(const Sequence& s, int64_t h, const State<E>& S, bool first) {
    if (first) {
      chunk.load_queries(p, s, h);
      chunk.multiply(p, products);
    }
    chunk.score_products(p, products);
    write_output(p, chunk, S, s, h, o_copy);
  }
};

int workers(const Problem& p) { return workers_for(p, p.B * p.H * vectors<float>(p.V), flop(p)); }

size_t workspace(const Problem& p) {
  return p.op == LC_BACKWARD ? backward::workspace(p) : scratch_bytes<ChunkWorker>(p, workers(p));
}

void run(const Problem& p) {
  p.op == LC_BACKWARD ? backward::run(p) : run_tasks<ChunkWorker>(p, workers(p), family(p));
}

Cost cost(const Problem& p) {
  if (p.op == LC_BACKWARD) return backward::cost(p);
  const double tasks = double(p.H) * (double(p.B) + 5 * double(tokens(p)) / C);
  return predict(p, {flop(p), /*extra_bytes=*/0, /*depth=*/mean_length(p) / C, tasks}, /*efficiency=*/0.8, workers(p));
}

}  // namespace

extern const Method chunk_cpu = {
    {"chunk", "cpu", "chunks of 64 tokens: matrix products inside, one state in cache between",
     "Lightning Attention-2, arXiv:2401.04658"},
    {Feature::forward | Feature::backward | Feature::decay_gradients | kAllTypes | kAllDecays | kSequences | kMamba2},
    refuses_nothing,
    cost,
    workspace,
    run,
    "lightning"};

}  // namespace lc::LC_ISA
