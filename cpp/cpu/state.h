// state.h - the state S [K, V] of one head between chunks of tokens, and the division of heads and
// columns of states among workers. With the weights of decay.h, for the chunk's rows Q, K, V and
// its masked scores A:
//
//   output:  O = scale diag(in) Q S + A V
//   advance: S = total S + (diag(out) K)^T V
//
// S is stored as column panels. A panel is one register tile wide and contiguous, so that it stays
// in the L1 cache.
#pragma once
#include <algorithm>

#include "scratch.h"
#include "threads.h"
#include "tokens.h"

namespace lc::LC_ISA {

// How a call is divided into tasks. A task is one (sequence, state) pair, or a family of states of
// the same sequence. Pairs that would leave workers idle at the end are cut into parts of their q
// heads, and then into pieces of their columns of V. Parts repeat the update of the state and
// pieces repeat the scores, but tasks never wait for one another.
struct Plan {
  int64_t whole;   // pairs that are not cut: the first ones
  int64_t parts;   // of the q heads of each pair that is cut
  int64_t pieces;  // of the columns of V of each part
  int64_t tasks;   // number of tasks
  int64_t family;  // states of a task
};

LC_INLINE Plan make_plan(const Problem& p, int workers, bool split_heads = true, int64_t family = 1) {
  const int64_t states = p.B * p.Hs / family, most = split_heads ? group(p) : 1;
  Plan plan{states - states % workers, 1, 1, states, family};
  if (family > 1) plan.whole = states;
  if (plan.whole == states) return plan;
  const int64_t rest = states - plan.whole;
  // Part 0 writes the final state. If that is the initial state in place, other parts may still
  // have to read it.
  if (!p.initial_state || p.initial_state.data != p.final_state.data)
    while (plan.parts < most && !balanced(rest * plan.parts, workers)) ++plan.parts;
  if (plan.parts == most) {
    const int64_t widest = std::min<int64_t>(workers, p.V * (p.type == Type::f64 ? 8 : 4) / kVectorBytes);
    while (plan.pieces < widest && !balanced(rest * most * plan.pieces, workers)) ++plan.pieces;
  }
  plan.tasks = plan.whole + rest * plan.parts * plan.pieces;
  return plan;
}

// One task: sequence b, state head hs (the first one of a family), the q heads [first_head,
// last_head), and a piece of the columns of V.
struct Task {
  int64_t b, hs, state, first_head, last_head, piece, pieces;
  bool writes_state;
  LC_INLINE Task(const Problem& p, const Plan& plan, int64_t task) {
    const bool cut = task >= plan.whole;
    const int64_t i = cut ? task - plan.whole : 0, parts = cut ? plan.parts : 1, G = group(p);
    const int64_t part = i / plan.pieces % parts;
    piece = i % plan.pieces;
    pieces = cut ? plan.pieces : 1;
    state = cut ? plan.whole + i / plan.pieces / parts : task;
    hs = state * plan.family % p.Hs;
    b = state * plan.family / p.Hs;
    first_head = hs * G + G * part / parts;
    last_head = hs * G + G * (part + 1) / parts;
    writes_state = p.final_state && part == 0;
  }
};

// The columns of one state that belong to one piece: panels [first, last).
template <class E, class T = Accumulator<E>>
struct State {
  const Problem& p;
  Panels panels;
  int first, last;
  T* data;
  bool live = false;  // false: the state is zero, and its memory is not read

  static LC_INLINE int64_t size(const Problem& p) { return p.K * padded<T>(p.V); }

  LC_INLINE State(const Problem& problem, T* memory)
      : p(problem), panels(vectors<T>(p.V)), first(0), last(panels.count), data(memory) {}

  LC_INLINE void take(const Task& task) { take(task.piece, task.pieces); }
  LC_INLINE void take(int64_t piece, int64_t pieces) {
    panels = Panels(vectors<T>(p.V));
    panels.count = int(std::max<int64_t>(panels.count, pieces));
    first = int(panels.count * piece / pieces);
    last = int(panels.count * (piece + 1) / pieces);
  }

  LC_INLINE int column(int panel) const { return panels.template column<T>(panel); }
  LC_INLINE int columns(int panel) const { return std::min(int(p.V), column(panel + 1)) - column(panel); }
  LC_INLINE Matrix<T> panel(int i) const { return {data + p.K * column(i), panels.template columns<T>(i)}; }

  LC_INLINE void load_initial(int64_t b, int64_t hs) {
    live = bool(p.initial_state);
    if (!live) return;
    const T* from = p.initial_state.at<const T>(b, hs, 0);
    const int64_t* stride = p.initial_state.stride;
    for (int i = first; i < last; ++i) {
      if (is_transposed(p, p.initial_state))
        load_transposed<T>(panel(i), Matrix<const T>{from + column(i) * stride[3], stride[3]}, columns(i), int(p.K));
      else
        load<T>(panel(i), Matrix<const T>{from + column(i), stride[2]}, int(p.K), columns(i));
    }
  }

  LC_INLINE void store_final(int64_t b, int64_t hs) const {
    T* all = p.final_state.at<T>(b, hs, 0);
    const int64_t* stride = p.final_state.stride;
    for (int i = first; i < last; ++i) {
      const Matrix<T> S = panel(i);
      if (!live)
        for (int64_t r = 0; r < p.K; ++r) std::memset(S.row(r), 0, sizeof(T) * size_t(S.ld));
      if (is_transposed(p, p.final_state))
        store_transposed<T>(Matrix<T>{all + column(i) * stride[3], stride[3]}, Matrix<const T>{S.data, S.ld}, int(p.K),
                            columns(i));
      else
        store<T>(Matrix<T>{all + column(i), stride[2]}, Matrix<const T>{S.data, S.ld}, int(p.K), columns(i));
    }
  }

  // Moves the state over the chunk, whose keys must have been weighed (Tokens::weigh_keys).
  LC_INLINE void advance(const Tokens<E>& chunk) { advance(chunk, *this); }

  // Sets this state to `from`, moved over the chunk.
  LC_INLINE void advance(const Tokens<E>& chunk, const State& from) {
    const T total = chunk.decay.total, rest = chunk.decay.total_rest;
    for (int i = first; i < last; ++i) {
      const Matrix<T> S = panel(i), old = from.panel(i);
      for_tiles<T>(0, int(p.K), panels.begin(i), panels.width(i), [&](auto& acc, int r, int c) {
        // The sum over the chunk is formed first. Adding tokens to S one by one would round 64
        // times at the size of S.
        zero(acc);
        mma(acc, operand(chunk.weighed + r * C, C), chunk.v(panels, i, c), chunk.n);
        if (from.live)
          map(acc, [&](int row, int j, Vec<T> x) {
            const Vec<T> before = load<T>(old.row(r + row) + j);
            return before * total + (before * rest + x);
          });
        store(Matrix<T>{S.row(r), S.ld}, acc);
      });
    }
    live = true;
  }

  LC_INLINE State one_panel(int i) const {
    State s = *this;
    s.first = i;
    s.last = i + 1;
    return s;
  }

  // Sets this state to 2^log2 before + own. This state may be either of the two.
  LC_INLINE void combine(double log2, const State& before, const State& own) {
    const double factor = std::exp2(log2);
    const T total = T(factor), rest = T(factor - double(total));
    const auto at = [](const State& s, int i, int64_t j) { return s.live ? load<T>(s.panel(i).data + j) : Vec<T>{}; };
    for (int i = first; i < last; ++i)
      for (int64_t j = 0; j < p.K * panel(i).ld; j += kLanes<T>) {
        const Vec<T> x = at(before, i, j);
        store<T>(panel(i).data + j, x * total + (x * rest + at(own, i, j)));
      }
    live = before.live || own.live;
  }
};

// o += skip v, for the columns of one panel.
template <class E, class T>
LC_INLINE void add_skip(const Tokens<E>& chunk, const Panels& panels, int panel, Matrix<T> o) {
  for (int c = panels.begin(panel); c < panels.begin(panel) + panels.width(panel); ++c) {
    const Matrix<const T> v = chunk.v(panels, panel, c);
    const Vec<T> skip = load<T>(chunk.skip + c * kLanes<T>);
    for (int i = 0; i < chunk.n; ++i) {
      T* to = o.row(i) + c * kLanes<T>;
      store<T>(to, load<T>(to) + skip * load<T>(v.row(i)));
    }
  }
}

// Writes the chunk's output rows of head h, in the columns of `state`. mma_state(acc, q, panel)
// adds Q S to a tile of that panel. `copy` [C, padded V] holds rows that cannot be computed in
// place.
template <class E, class T, class F>
LC_INLINE void write_output(const Problem& p, Tokens<E>& chunk, const State<E>& state, const Sequence& s, int64_t h,
                            T* copy, bool live, F&& mma_state) {
  const Matrix<E> to{p.o.at<E>(s.row, h, chunk.t), p.o.stride[2]};
  Matrix<T> o{copy, padded<T>(p.V)};
  bool direct = false;
  if constexpr (std::is_same_v<E, T>)
    if (p.V % kLanes<T> == 0) {
      o = to;
      direct = true;
    }
  const T* in = chunk.decay.in;
  const T scale = T(p.scale);
  chunk.load_skip(p, h);
  for (int panel = state.first; panel < state.last; ++panel) {
    const Panels& panels = state.panels;
    for_tiles<T>(0, chunk.n, panels.begin(panel), panels.width(panel), [&](auto& acc, int i0, int c) {
      const int j0 = c * kLanes<T>;
      zero(acc);
      if (live) {
        mma_state(acc, operand(chunk.q.row(i0), chunk.q.ld), panel);
        map(acc, [&](int i, int, Vec<T> x) { return x * (in[i0 + i] * scale); });
      }
      mma(acc, operand(chunk.scores + i0 * C, C), chunk.v(panels, panel, c), std::min(chunk.n, i0 + acc.M));
      store(Matrix<T>{o.row(i0) + j0, o.ld}, acc);
    });
    // The skip is not added to a tile in registers: the compiler would keep the tile in memory.
    if (p.skip) add_skip(chunk, panels, panel, o);
    const int j0 = state.column(panel);
    if (p.gate)
      apply_gate<E, T>({o.data + j0, o.ld}, {p.gate.at<const E>(s.row, h, chunk.t) + j0, p.gate.stride[2]}, chunk.n,
                       state.columns(panel));
    if (!direct) {
      store<T>(Matrix<E>{to.data + j0, to.ld}, Matrix<const T>{o.data + j0, o.ld}, chunk.n, state.columns(panel));
    }
  }
}

template <class E, class T>
LC_INLINE void write_output(const Problem& p, Tokens<E>& chunk, const State<E>& state, const Sequence& s, int64_t h,
                            T* copy) {
  write_output(p, chunk, state, s, h, copy, state.live, [&](auto& acc, auto q, int panel) {
    const Matrix<T> S = state.panel(panel);
    mma(acc, q, {S.data, S.ld}, int(p.K));
  });
}

namespace {

// Runs worker.run(task) for all tasks. Each Worker<E> has scratch of its own.
template <template <class> class Worker>
void run_tasks(const Problem& p, int workers, int64_t family = 1) {
  Tasks tasks(p);
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    run_workers(workers, [&](int index, int granted) {
      const Plan plan = make_plan(p, granted, /*split_heads=*/true, family);
      Arena arena(p.workspace);
      Worker<E> worker = cut<Worker, E>(p, arena, index);
      worker.chunk.clear_scores();
      tasks.each(plan.tasks, index, granted, [&](int64_t i) { worker.run(Task(p, plan, i)); });
    });
  });
}

}  // namespace
}  // namespace lc::LC_ISA
