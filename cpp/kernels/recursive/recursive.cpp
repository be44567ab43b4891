// recursive.cpp - CPU: divide and conquer: right halves see left halves through their states.
//
//   O(right)_i += scale 2^(cum_i) q_i S(left),   S(whole) = 2^(sum L over right) S(left) + S(right)
//
//   Leaves are chunks of C tokens: O = scale A V, S = (diag(out) K)^T V (cpu/decay.h). A stack has
//   the states of finished left halves, like bits of a binary counter. Outputs are written once,
//   as O = scale (diag(in) Q (... (2^g2 (2^g1 S_1) + S_2) ...) + A V)   (Horner: all factors <= 1)
//   about B N (H ((C+1)(K+V) + KV log2(N/C)) + Hs 4KV) flop
//   scratch per worker: a chunk and K V log2(N/C) numbers
//   tasks: (sequence, state) pairs; if those are few, parts of their q heads, then of V's columns
//   recursive method of LeetDecoding, arXiv:2501.02573
#include "../../cpu/cost.h"
#include "../../cpu/scratch.h"
#include "../../cpu/state.h"
#include "../../cpu/threads.h"
#include "../../methods.h"

namespace lc::LC_ISA {
namespace {

constexpr int kMostLevels = 64;

// The most states on the stack: one for each bit of the number of finished leaves, and the initial
// state.
int levels(const Problem& p) {
  int n = 1;
  for (int64_t leaves = p.N / C; leaves; leaves /= 2) ++n;
  return n + 1;
}

// The number of (token, state) pairs in which the token reads the state. A leaf reads one state for
// each set bit of its number.
double reads(double n) {
  double sum = 0;
  const int64_t leaves = int64_t(n / C);
  for (int64_t bit = 1; bit <= leaves; bit *= 2) {  // whole leaves whose number has this bit
    sum += double(leaves / (2 * bit) * bit + std::max<int64_t>(0, leaves % (2 * bit) - bit)) * C;
    if (leaves & bit) sum += n - double(leaves) * C;
  }
  return sum;
}

double flop(const Problem& p) {
  const double n = mean_length(p);
  ChunkWork w = chunk_work(n, true, bool(p.final_state));
  w.reads = reads(n) + (p.initial_state ? n : 0);
  return double(p.B) * flop(p, w);
}

template <class E>
struct RecursiveWorker {
  using T = Accumulator<E>;
  const Problem& p;
  Tokens<E> chunk;
  T *o_copy, *stack;
  double gap[kMostLevels];      // log2 of the decay over the tokens of this stack entry
  int64_t leaves[kMostLevels];  // chunks in this stack entry; 0: the initial state, which is never merged
  int top = 0;

  RecursiveWorker(const Problem& problem, Arena& arena)
      : p(problem),
        chunk(arena, p),
        o_copy(arena.take<T>(C * padded<T>(p.V))),
        stack(arena.take<T>(levels(p) * State<E>::size(p))) {}

  State<E> entry(int level, const State<E>& columns) const {
    State<E> s = columns;
    s.data = stack + level * State<E>::size(p);
    s.live = true;
    return s;
  }

  void run(const Task& task) {
    const Sequence s = sequence(p, task.b);
    State<E> columns(p, stack);
    columns.take(task);
    columns.load_initial(task.b, task.hs);
    top = 0;
    if (columns.live) {
      gap[top] = 0;
      leaves[top] = 0;
      ++top;
    }
    chunk.decay.begin_head(p, s, task.hs);
    for (int64_t t = 0; t < s.length; t += C) {
      chunk.locate(s, t);
      chunk.load_keys(p, s, task.hs);
      chunk.load_values(p, s, task.hs, columns.panels, columns.first, columns.last);
      for (int64_t h = task.first_head; h < task.last_head; ++h) {
        chunk.load_queries(p, s, h);
        chunk.score(p);
        write_output(p, chunk, columns, s, h, o_copy, top > 0,
                     [&](auto& acc, auto q, int panel) { mma_stack(acc, q, columns, panel); });
      }
      if (t + C < s.length || task.writes_state) push(columns);
    }
    if (task.writes_state) store_final(task, columns);
  }

  // Adds q times the sum of all states on the stack to a tile: Horner's form, from the oldest state
  // on.
  template <class Acc, class Q>
  LC_INLINE void mma_stack(Acc& acc, Q q, const State<E>& columns, int panel) const {
    for (int i = 0; i < top; ++i) {
      if (i) {
        const T factor = T(std::exp2(gap[i]));
        map(acc, [&](int, int, Vec<T> x) { return x * factor; });
      }
      const Matrix<T> S = entry(i, columns).panel(panel);
      mma(acc, q, {S.data, S.ld}, int(p.K));
    }
  }

  void store_final(const Task& task, const State<E>& columns) {
    State<E> all = entry(0, columns);
    all.live = top > 0;
    for (int i = 1; i < top; ++i) all.combine(gap[i], all, entry(i, columns));
    all.store_final(task.b, task.hs);
  }

  // Pushes the chunk as the newest entry, then merges entries of equal size.
  void push(const State<E>& columns) {
    State<E> leaf = entry(top, columns);
    leaf.live = false;
    chunk.weigh_keys(p);
    leaf.advance(chunk);
    gap[top] = chunk.decay.log2_total;
    leaves[top] = 1;
    ++top;
    for (; top > 1 && leaves[top - 2] == leaves[top - 1]; --top) {
      State<E> left = entry(top - 2, columns);
      left.combine(gap[top - 1], left, entry(top - 1, columns));
      gap[top - 2] += gap[top - 1];
      leaves[top - 2] *= 2;
    }
  }
};

int workers(const Problem& p) { return workers_for(p, p.B * p.H * vectors<float>(p.V), flop(p)); }

size_t workspace(const Problem& p) { return scratch_bytes<RecursiveWorker>(p, workers(p)); }

void run(const Problem& p) { run_tasks<RecursiveWorker>(p, workers(p)); }

Cost cost(const Problem& p) {
  const double leaves = double(tokens(p)) / C;
  return predict(p,
                 {flop(p), 0, /*depth=*/2 + std::log2(std::max(1., mean_length(p) / C)),
                  /*tasks=*/double(p.H) * (double(p.B) + 6 * leaves)},
                 /*efficiency=*/0.8, workers(p));
}

}  // namespace

extern const Method recursive_cpu = {
    {"recursive", "cpu", "divide and conquer: right halves see left halves through their states",
     "LeetDecoding, arXiv:2501.02573"},
    {Feature::forward | kAllTypes | kAllDecays | kSequences | kMamba2},
    refuses_nothing,
    cost,
    workspace,
    run};

}  // namespace lc::LC_ISA
