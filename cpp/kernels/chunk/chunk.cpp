// chunk.cpp - CPU: the sequence in chunks of C tokens; matrix products inside a chunk, one state between chunks.
//
//   O = scale (diag(in) Q S + A V),   A_ij = [j <= i] mask_ij q_i.k_j            weights in, mask, out, total:
//   cpu/decay.h S = total S + (diag(out) K)^T V
//
//   Q, K [C, K]   V, O [C, V]   A [C, C]   S [K, V] kept as column panels, one register tile wide
//   B H N ((C+1)(K+V) + 4KV) flop; scratch per worker K V + C (C + 3K + 2V) numbers, whatever N
//   workers: one (sequence, state) each; with fewer of those, its q heads; else a team shares one and splits the
//   columns of V Lightning Attention-2, arXiv:2401.04658; GLA, arXiv:2312.06635
#include <algorithm>
#include <new>

#include "../../cpu/cost.h"
#include "../../cpu/tokens.h"
#include "../../methods.h"

namespace lc::LC_ISA {
namespace {

double flop(const Problem& p) {
  const double own = (C + 1.) * double(p.K + p.V) + 2. * double(p.K * p.V), shared = 2. * double(p.K * p.V);
  return double(tokens(p)) * (double(p.H) * own + double(p.Hs) * shared);
}

// Who does what. A task is one part of the q heads of one (sequence, state) pair; team workers do it together.
struct Plan {
  int teams, team;
  int64_t parts, tasks;
};

Plan make_plan(const Problem& p, int workers) {
  const int64_t states = p.B * p.Hs, most = group(p);
  const auto balanced = [&](int64_t tasks, int crews) { return tasks % crews == 0 || tasks >= 4 * crews; };
  Plan plan{workers, 1, 1, states};
  if (balanced(states, workers)) return plan;
  // Parts repeat the update of their state, and part 0 writes it: not while another part may still have to read it.
  if (!p.initial_state || p.initial_state.data != p.final_state.data)
    while (plan.parts < most && !balanced(states * plan.parts, workers)) ++plan.parts;
  plan.tasks = states * plan.parts;
  if (plan.parts < most || balanced(plan.tasks, workers)) return plan;
  // A team wants single q heads and a vector of columns for each of its members.
  const int widest = std::min<int64_t>(workers, p.V * (p.type == Type::f64 ? 8 : 4) / kVectorBytes);
  while (plan.team < widest && (workers % plan.team || !balanced(plan.tasks, workers / plan.team))) ++plan.team;
  plan.teams = workers / plan.team;
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

  Columns(const Problem& problem, T* shared_state, T* copy, int member, int team)
      : p(problem), panels(vectors<T>(p.V)), first(0), last(panels.count), state(shared_state), o_copy(copy) {
    if (team > 1) {
      panels.count = std::max(panels.count, team);
      first = panels.count * member / team, last = panels.count * (member + 1) / team;
    }
  }

  Matrix<T> state_panel(int panel) const {
    return {state + p.K * panels.begin(panel) * kLanes<T>, panels.width(panel) * kLanes<T>};
  }
  int column(int panel) const { return panels.begin(panel) * kLanes<T>; }
  int columns(int panel) const { return std::min(int(p.V), panels.begin(panel + 1) * kLanes<T>) - column(panel); }

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
        zero(
            acc);  // the chunk's own sum first: adding its tokens to S one by one would round 64 times at the size of S
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

// The whole forward pass: memory, then the work of each worker.
template <class E>
struct Forward {
  using T = Accumulator<E>;
  const Problem& p;
  const Plan plan;
  const int slots;  // chunks in flight: a team prepares its next ones while slower members still read the last ones
  std::atomic<int64_t>* next;
  Barrier* barriers;
  Tokens<E>* chunks;
  T *states, *copies;
  const int64_t state_size, copy_size;

  Forward(const Problem& problem, int workers, Arena& arena)
      : p(problem),
        plan(make_plan(p, workers)),
        slots(plan.team > 1 ? 2 * plan.team : 1),
        next(arena.take<std::atomic<int64_t>>(1)),
        barriers(arena.take<Barrier>(plan.teams)),
        chunks(arena.take<Tokens<E>>(plan.teams * slots)),
        state_size(p.K * padded<T>(p.V)),
        copy_size(C * padded<T>(p.V)) {
    for (int i = 0; i < plan.teams * slots; ++i) {
      const Tokens<E> chunk(arena, p);
      if (chunks) new (chunks + i) Tokens<E>(chunk);
    }
    states = arena.take<T>(plan.teams * state_size);
    copies = arena.take<T>(plan.teams * plan.team * copy_size);
    if (!next) return;
    new (next) std::atomic<int64_t>(0);
    for (int i = 0; i < plan.teams; ++i) new (barriers + i) Barrier();
  }

  void work(int worker) {
    const int team = worker / plan.team, member = worker % plan.team;
    if (team >= plan.teams) return;
    Tokens<E>* mine = chunks + team * slots;
    for (int i = member; i < slots; i += plan.team) mine[i].clear_scores();
    Columns<E, T> columns(p, states + team * state_size, copies + worker * copy_size, member, plan.team);
    if (plan.team == 1) {
      for (int64_t task; (task = next->fetch_add(1, std::memory_order_relaxed)) < plan.tasks;)
        alone(task, mine[0], columns);
    } else {
      unsigned step = 0;
      for (int64_t task = team; task < plan.tasks; task += plan.teams)
        together(task, mine, member, columns, barriers[team], step);
    }
  }

  void alone(int64_t task, Tokens<E>& chunk, Columns<E, T>& columns) const {
    const int64_t part = task % plan.parts, hs = task / plan.parts % p.Hs, b = task / plan.parts / p.Hs;
    const int64_t first = hs * group(p) + group(p) * part / plan.parts,
                  last = hs * group(p) + group(p) * (part + 1) / plan.parts;
    const Sequence s = sequence(p, b);
    const bool keep = p.final_state && part == 0;
    columns.begin(b, hs);
    chunk.decay.begin_head(p, s, hs);
    for (int64_t t = 0; t < s.length; t += C) {
      chunk.locate(s, t);
      chunk.load_keys_values(p, s, hs, columns.panels);
      for (int64_t h = first; h < last; ++h) {
        chunk.load_queries(p, s, h);
        chunk.score(p);
        columns.output(chunk, s, h);
      }
      if (t + C < s.length || keep) chunk.weigh_keys(p), columns.advance(chunk);
    }
    if (keep) columns.end(b, hs);
  }

  // Each member prepares one of the next chunks, then all go through all of them, each for its own columns.
  void together(int64_t task, Tokens<E>* mine, int member, Columns<E, T>& columns, Barrier& barrier,
                unsigned& step) const {
    const int64_t h = task % p.H, hs = h / group(p), b = task / p.H;
    const Sequence s = sequence(p, b);
    const bool keep = p.final_state && h % group(p) == 0;
    columns.begin(b, hs);
    for (int i = member; i < slots; i += plan.team) mine[i].decay.begin_head(p, s, hs);
    for (int64_t t = 0; t < s.length; t += plan.team * C, ++step) {
      Tokens<E>* ready = mine + step % 2 * plan.team;
      if (t + member * C < s.length) {
        ready[member].locate(s, t + member * C);
        ready[member].load_keys_values(p, s, hs, columns.panels);
        ready[member].load_queries(p, s, h);
        ready[member].score(p);
        ready[member].weigh_keys(p);
      }
      barrier.wait(plan.team);
      for (int64_t i = 0; i < plan.team && t + i * C < s.length; ++i) {
        columns.output(ready[i], s, h);
        if (t + (i + 1) * C < s.length || keep) columns.advance(ready[i]);
      }
    }
    if (keep) columns.end(b, hs);
    barrier.wait(plan.team);  // the next task's weights overwrite this one's
  }
};

int workers(const Problem& p) { return workers_for(p.B * p.H * vectors<float>(p.V), flop(p)); }

size_t workspace(const Problem& p) {
  size_t bytes = 0;
  with_type(p.type, [&](auto e) {
    for (int n : {1, workers(p)}) {
      Arena arena(nullptr);
      Forward<decltype(e)>(p, n, arena);
      bytes = std::max(bytes, arena.used());
    }
  });
  return bytes;
}

void run(const Problem& p) {
  with_type(p.type, [&](auto e) {
    const int wished = workers(p);
    Arena arena(p.workspace);
    Forward<decltype(e)> forward(p, wished, arena);
    run_workers(wished, [&](int worker, int granted) {
      if (granted == wished) return forward.work(worker);
      Arena again(p.workspace);
      Forward<decltype(e)>(p, 1, again).work(0);
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
