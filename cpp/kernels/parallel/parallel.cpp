// parallel.cpp - CPU: the quadratic form in blocks of C x C scores, so that no N x N array exists.
//
//   o_i = scale (sum_{j <= i} 2^(G_i - G_j) (q_i.k_j) v_j + 2^G_i q_i S_0)
//   S_N = sum_j 2^(G_N - G_j) k_j v_j^T + 2^G_N S_0                     G: sums of log2 decays
//
//   The weight of token j of an earlier block at token i is in_i (product of the totals between)
//   out_j. All factors are <= 1 and restart at each block, whatever N is (cpu/decay.h).
//   B H N (N+1)(K+V) flop; scratch per worker 2KV + 2C (C + 2K + V) numbers
//   tasks: row blocks of every head, the longest ones first; then the final states
//   Katharopoulos et al. 2020, arXiv:2006.16236 (eq. 8); retention, arXiv:2307.08621
#include "../../cpu/cost.h"
#include "../../cpu/scratch.h"
#include "../../cpu/threads.h"
#include "../../cpu/tokens.h"
#include "../../methods.h"

namespace lc::LC_ISA {
namespace {

double flop(const Problem& p) {
  const double n = mean_length(p), KV = 2 * double(p.K * p.V);
  const double states = (p.initial_state ? double(p.H) : 0) + (p.final_state ? double(p.Hs) : 0);
  return double(p.B) * n * (double(p.H) * (n + 1) * double(p.K + p.V) + states * KV);
}

int64_t blocks(const Sequence& s) { return (s.length + C - 1) / C; }

template <class E>
struct ParallelWorker {
  using T = Accumulator<E>;
  const Problem& p;
  const Panels panels;
  Tokens<E> rows, others;
  T* result;  // [C, V] or [K, V]
  T* state;   // S_0, padded to whole vectors

  ParallelWorker(const Problem& problem, Arena& arena)
      : p(problem),
        panels(vectors<T>(p.V)),
        rows(arena, p),
        others(arena, p),
        result(arena.take<T>(std::max<int64_t>(C, p.K) * padded<T>(p.V))),
        state(arena.take<T>(p.K * padded<T>(p.V))) {}

  // Adds weight(row) a b to the result. b(panel, c) gives the columns of b from vector c on. With
  // `first` the result is overwritten, and a is square and lower triangular, with zeros to the
  // right of its diagonal as far as tiles reach.
  template <class B, class Weight>
  void accumulate(Matrix<const T> a, B&& b, int m, int depth, bool first, Weight weight) const {
    const Matrix<T> to{result, padded<T>(p.V)};
    for (int panel = 0; panel < panels.count; ++panel)
      for_tiles<T>(0, m, panels.begin(panel), panels.width(panel), [&](auto& acc, int i0, int c) {
        const int j0 = c * kLanes<T>;
        zero(acc);
        mma(acc, operand(a.row(i0), a.ld), b(panel, c), first ? std::min(depth, i0 + acc.M) : depth);
        map(acc, [&](int i, int j, Vec<T> x) {
          x = x * weight(i0 + i);
          return first ? x : x + load<T>(to.row(i0 + i) + j0 + j);
        });
        store(Matrix<T>{to.row(i0) + j0, to.ld}, acc);
      });
  }

  auto values(const Tokens<E>& tokens) const {
    return [&](int panel, int c) { return tokens.v(panels, panel, c); };
  }

  Matrix<const T> initial_state(int64_t b, int64_t hs) const {
    const Matrix<T> copy{state, padded<T>(p.V)};
    load<T>(copy, Matrix<const T>{p.initial_state.at<const T>(b, hs, 0), p.initial_state.stride[2]}, int(p.K),
            int(p.V));
    return {copy.data, copy.ld};
  }

  // Loads keys and values of one block.
  void load_block(Tokens<E>& tokens, const Sequence& s, int64_t hs, int64_t block) {
    tokens.locate(s, block * C);
    tokens.load_keys(p, s, hs);
    tokens.load_values(p, s, hs, panels, 0, panels.count);
  }

  // The scores of the row block's queries with the weighed keys of an earlier block.
  void score_others() {
    const Panels across(vectors<T>(C));
    for (int panel = 0; panel < across.count; ++panel)
      for_tiles<T>(0, rows.n, across.begin(panel), across.width(panel), [&](auto& a, int i0, int c) {
        zero(a);
        mma(a, operand(rows.q.row(i0), rows.q.ld), {others.keys + c * kLanes<T>, C}, int(p.K));
        store(Matrix<T>{others.scores + i0 * C + c * kLanes<T>, C}, a);
      });
  }

  // The outputs of one block of rows, from its own block and all earlier ones.
  void output_rows(int64_t b, const Sequence& s, int64_t h, int64_t block) {
    const int64_t hs = h / group(p);
    const T scale = T(p.scale);
    rows.decay.begin_head(p, s, hs);
    others.decay.begin_head(p, s, hs);
    load_block(rows, s, hs, block);
    rows.load_queries(p, s, h);
    rows.score(p);
    accumulate({rows.scores, C}, values(rows), rows.n, rows.n, true, [](int) { return T(1); });

    const T* in = rows.decay.in;
    double between = 1;
    for (int64_t j = block - 1; j >= 0; --j) {
      load_block(others, s, hs, j);
      others.weigh_keys(p, T(between));
      score_others();
      accumulate({others.scores, C}, values(others), rows.n, others.n, false, [&](int i) { return in[i] * scale; });
      between *= double(others.decay.total) + double(others.decay.total_rest);
    }
    if (p.initial_state) {
      const Matrix<const T> s0 = initial_state(b, hs);
      const auto vectors_of_s0 = [&](int, int c) { return Matrix<const T>{s0.data + c * kLanes<T>, s0.ld}; };
      accumulate(rows.q, vectors_of_s0, rows.n, int(p.K), false, [&](int i) { return T(in[i] * between) * scale; });
    }
    store<T>(Matrix<E>{p.o.at<E>(s.row, h, rows.t), p.o.stride[2]}, Matrix<const T>{result, padded<T>(p.V)}, rows.n,
             int(p.V));
  }

  void final_state(int64_t b, const Sequence& s, int64_t hs) {
    const auto one = [](int) { return T(1); };
    others.decay.begin_head(p, s, hs);
    double after = 1;
    std::memset(result, 0, sizeof(T) * size_t(p.K) * size_t(padded<T>(p.V)));
    for (int64_t j = blocks(s) - 1; j >= 0; --j) {
      load_block(others, s, hs, j);
      others.weigh_keys(p, T(after));
      accumulate({others.keys, C}, values(others), int(p.K), others.n, false, one);
      after *= double(others.decay.total) + double(others.decay.total_rest);
    }
    if (p.initial_state) {
      const Matrix<const T> s0 = initial_state(b, hs);
      for (int64_t i = 0; i < p.K * s0.ld; i += kLanes<T>)
        store<T>(result + i, load<T>(result + i) + load<T>(s0.data + i) * T(after));
    }
    store<T>(Matrix<T>{p.final_state.at<T>(b, hs, 0), p.final_state.stride[2]}, Matrix<const T>{result, padded<T>(p.V)},
             int(p.K), int(p.V));
  }
};

int workers(const Problem& p) { return workers_for(p, p.H * (tokens(p) / C + p.B), flop(p)); }

size_t workspace(const Problem& p) { return scratch_bytes<ParallelWorker>(p, workers(p)); }

// Every (sequence, head) one after the other; its row blocks from the last, longest one. Final
// states come last: they may overwrite the initial ones.
void run(const Problem& p) {
  int64_t longest = 0;
  for (int64_t b = 0; b < p.B; ++b) longest = std::max(longest, blocks(sequence(p, b)));
  Tasks rows(p), final_states(p);
  Barrier barrier;
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    run_workers(workers(p), [&](int index, int granted) {
      Arena arena(p.workspace);
      ParallelWorker<E> worker = cut<ParallelWorker, E>(p, arena, index);
      worker.rows.clear_scores();
      rows.each(longest * p.B * p.H, index, granted, [&](int64_t i) {
        const int64_t b = i / p.H % p.B, h = i % p.H, block = longest - 1 - i / p.H / p.B;
        const Sequence s = sequence(p, b);
        if (block < blocks(s)) worker.output_rows(b, s, h, block);
      });
      if (!p.final_state) return;
      barrier.wait(granted);
      final_states.each(p.B * p.Hs, index, granted,
                        [&](int64_t i) { worker.final_state(i / p.Hs, sequence(p, i / p.Hs), i % p.Hs); });
    });
  });
}

Cost cost(const Problem& p) {
  const double blocks = mean_length(p) / C, row = double(p.K + p.V) * type_bytes(p.type);
  const double again = double(p.H) * double(tokens(p)) * row * std::max(0., (blocks - 1) / 2);
  const double tasks = double(p.H) * (double(p.B) + 5 * double(tokens(p)) / C);
  return predict(p, {flop(p), again, /*depth=*/1, tasks}, /*efficiency=*/0.7, workers(p));
}

}  // namespace

extern const Method parallel_cpu = {
    {"parallel", "cpu", "every pair of tokens: masked scores times values, block by block",
     "Katharopoulos et al. 2020, arXiv:2006.16236"},
    {Feature::forward | kAllTypes | kAllDecays | kSequences},
    refuses_nothing,
    cost,
    workspace,
    run};

}  // namespace lc::LC_ISA
