// chunk.cpp - CPU: the sequence in chunks of C tokens; matrix products inside a chunk, one state between chunks.
//
//   O = scale (diag(in) Q S + A V),   A_ij = [j <= i] mask_ij q_i.k_j
//   S = total S + (diag(out) K)^T V                    weights in, mask, out, total: cpu/decay.h
//
//   Q, K [C, K]   V, O [C, V]   A [C, C]   S [K, V] kept as column panels, one register tile wide
//   B H N ((C+1)(K+V) + 4KV) flop; scratch per worker K V + C (C + 2K + 2V) numbers, whatever N
//   workers: (sequence, state) pairs; where those are few, their q heads, then columns of V, one task each
//   Lightning Attention-2, arXiv:2401.04658; GLA, arXiv:2312.06635
#include <algorithm>

#include "../../cpu/cost.h"
#include "../../cpu/scratch.h"
#include "../../cpu/tokens.h"
#include "../../methods.h"

namespace lc::LC_ISA {
namespace {

double flop(const Problem& p) {
  const double own = (C + 1.) * double(p.K + p.V) + 2. * double(p.K * p.V), shared = 2. * double(p.K * p.V);
  return double(tokens(p)) * (double(p.H) * own + double(p.Hs) * shared);
}

// Who does what: a task is one part of the q heads of one (sequence, state) pair, or one piece of its columns of V.
// Both repeat a little work (the update of the state; the scores), but tasks never wait for one another.
struct Plan {
  int64_t parts, pieces, tasks;
};

Plan make_plan(const Problem& p, int workers) {
  const int64_t states = p.B * p.Hs, most = group(p);
  Plan plan{1, 1, states};
  // Part 0 writes the state: not while another part may still have to read it.
  if (!p.initial_state || p.initial_state.data != p.final_state.data)
    while (plan.parts < most && !balanced(states * plan.parts, workers)) ++plan.parts;
  if (plan.parts == most) {
    const int64_t widest = std::min<int64_t>(workers, p.V * (p.type == Type::f64 ? 8 : 4) / kVectorBytes);
    while (plan.pieces < widest && !balanced(states * most * plan.pieces, workers)) ++plan.pieces;
  }
  plan.tasks = states * plan.parts * plan.pieces;
  return plan;
}

// One worker's columns of the state, and what it writes of the output.
template <class E, class T>
struct Columns {
  const Problem& p;
  Panels panels;
  int first, last;  // panels
  T *state, *o_copy;
  bool live = false;  // the state is not zero

  Columns(const Problem& problem, Arena& arena)
      : p(problem),
        panels(vectors<T>(p.V)),
        first(0),
        last(0),
        state(arena.take<T>(p.K * padded<T>(p.V))),
        o_copy(arena.take<T>(C * padded<T>(p.V))) {}

  void take(int64_t piece, int64_t pieces) {
    panels = Panels(vectors<T>(p.V));
    panels.count = int(std::max<int64_t>(panels.count, pieces));
    first = int(panels.count * piece / pieces), last = int(panels.count * (piece + 1) / pieces);
  }

  int column(int panel) const { return panels.template column<T>(panel); }
  int columns(int panel) const { return std::min(int(p.V), column(panel + 1)) - column(panel); }
  Matrix<T> state_panel(int panel) const { return {state + p.K * column(panel), panels.template columns<T>(panel)}; }

  void begin(int64_t b, int64_t hs) {
    live = bool(p.initial_state);
    if (!live) return;
    for (int i = first; i < last; ++i)
      load<T>(state_panel(i),
              Matrix<const T>{p.initial_state.at<const T>(b, hs, 0) + column(i), p.initial_state.stride[2]}, int(p.K),
              columns(i));
  }

  void output(const Tokens<E>& chunk, const Sequence& s, int64_t h) {
    const Matrix<E> to{p.o.at<E>(s.row, h, chunk.t), p.o.stride[2]};
    Matrix<T> o{o_copy, padded<T>(p.V)};
    bool direct = false;
    if constexpr (std::is_same_v<E, T>)
      if (p.V % kLanes<T> == 0) o = to, direct = true;
    const T* in = chunk.decay.in;
    const T scale = T(p.scale);
    for (int panel = first; panel < last; ++panel) {
      const Matrix<T> S = state_panel(panel);
      for_tiles<T>(0, chunk.n, panels.begin(panel), panels.width(panel), [&](auto& acc, int i0, int c) {
        const int j0 = c * kLanes<T>;
        zero(acc);
        if (live) {
          mma(acc, {chunk.q.row(i0), chunk.q.ld}, {S.data, S.ld}, int(p.K));
          map(acc, [&](int i, int, Vec<T> x) { return x * (in[i0 + i] * scale); });
        }
        mma(acc, {chunk.scores + i0 * C, C}, chunk.v(panels, panel, c), std::min(chunk.n, i0 + acc.M));
        store(Matrix<T>{o.row(i0) + j0, o.ld}, acc);
      });
      if (!direct) {
        const int j0 = column(panel);
        store<T>(Matrix<E>{to.data + j0, to.ld}, Matrix<const T>{o.data + j0, o.ld}, chunk.n, columns(panel));
      }
    }
  }

  void advance(const Tokens<E>& chunk) {
    const T total = chunk.decay.total, rest = chunk.decay.total_rest;
    for (int panel = first; panel < last; ++panel) {
      const Matrix<T> S = state_panel(panel);
      for_tiles<T>(0, int(p.K), panels.begin(panel), panels.width(panel), [&](auto& acc, int r, int c) {
        // The chunk's own sum first: adding its tokens to S one by one would round 64 times at the size of S.
        zero(acc);
        mma(acc, {chunk.keys + r * C, C}, chunk.v(panels, panel, c), chunk.n);
        if (live)
          map(acc, [&](int i, int j, Vec<T> x) {
            const Vec<T> before = load<T>(S.row(r + i) + j);
            return before * total + (before * rest + x);
          });
        store(Matrix<T>{S.row(r), S.ld}, acc);
      });
    }
    live = true;
  }

  void end(int64_t b, int64_t hs) {
    for (int i = first; i < last; ++i)
      for (int64_t r = 0; r < p.K; ++r) {
        T* to = p.final_state.at<T>(b, hs, r) + column(i);
        if (live)
          store_row<T>(to, state_panel(i).row(r), columns(i));
        else
          std::fill(to, to + columns(i), T(0));
      }
  }
};

// One worker: its scratch and its tasks.
template <class E>
struct Worker {
  const Problem& p;
  Tokens<E> chunk;
  Columns<E, Accumulator<E>> columns;

  Worker(const Problem& problem, Arena& arena) : p(problem), chunk(arena, p), columns(p, arena) {}

  void run(const Plan& plan, int64_t task) {
    const int64_t piece = task % plan.pieces, part = task / plan.pieces % plan.parts;
    const int64_t state = task / plan.pieces / plan.parts, hs = state % p.Hs, b = state / p.Hs, G = group(p);
    const int64_t first = hs * G + G * part / plan.parts, last = hs * G + G * (part + 1) / plan.parts;
    const Sequence s = sequence(p, b);
    const bool keep = p.final_state && part == 0;
    columns.take(piece, plan.pieces);
    columns.begin(b, hs);
    chunk.decay.begin_head(p, s, hs);
    for (int64_t t = 0; t < s.length; t += C) {
      chunk.locate(s, t);
      chunk.load_keys(p, s, hs);
      chunk.load_values(p, s, hs, columns.panels, columns.first, columns.last);
      for (int64_t h = first; h < last; ++h) {
        chunk.load_queries(p, s, h);
        chunk.score(p);
        columns.output(chunk, s, h);
      }
      if (t + C < s.length || keep) chunk.weigh_keys(p), columns.advance(chunk);
    }
    if (keep) columns.end(b, hs);
  }
};

int workers(const Problem& p) { return workers_for(p.B * p.H * vectors<float>(p.V), flop(p)); }

size_t workspace(const Problem& p) { return scratch_bytes<Worker>(p, workers(p)); }

void run(const Problem& p) {
  std::atomic<int64_t> next{0};
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    run_workers(workers(p), [&](int index, int granted) {
      const Plan plan = make_plan(p, granted);
      Arena arena(p.workspace);
      Worker<E> worker = cut<Worker, E>(p, arena, index);
      worker.chunk.clear_scores();
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < plan.tasks;) worker.run(plan, task);
    });
  });
}

const char* refuses(const Problem& p) { return p.op == LC_DECODE ? "decodes by recurrent only" : nullptr; }

Cost cost(const Problem& p) {
  return predict(p, flop(p), /*efficiency=*/0.8, workers(p),
                 /*tasks=*/double(p.H) * (double(p.B) + 5 * double(tokens(p)) / C));
}

}  // namespace

extern const Method chunk_cpu = {
    {"chunk", "cpu", "chunks of 64 tokens: matrix products inside, one state in cache between",
     "Lightning Attention-2, arXiv:2401.04658"},
    refuses,
    cost,
    workspace,
    run};

}  // namespace lc::LC_ISA
