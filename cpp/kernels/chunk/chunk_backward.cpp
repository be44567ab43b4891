// chunk_backward.cpp - CPU: gradients chunk by chunk, from the last to the first, with S before and dS after each.
//
//   dQ = scale diag(in) dO S^T + D K     A_ij = scale [j <= i] mask_ij q_i.k_j
//   dK = diag(out) V dS^T + D^T Q        D_ij = scale [j <= i] mask_ij dO_i.v_j       weights: cpu/decay.h
//   dV = diag(out) K dS + A^T dO         dS <- total dS + scale (diag(in) Q)^T dO     d log_decay: decay_gradient()
//
//   Q, K [C, K]   V, dO [C, V]   A, D [C, C]   S^T, dS^T [V, K] kept as column panels, one register tile wide
//   B H N ((C+1)(3K+2V) + 10KV) flop; 2KV more but for the last segment, of whose states only one is kept at first,
//   and 2KV more where segments are tasks. Scratch: K V numbers a segment, and a segment's states for each worker
//   two phases: states at the ends of segments, in pieces of their columns; families of states or segments of them
//   Lightning Attention-2, arXiv:2401.04658; GLA, arXiv:2312.06635
#include "chunk_backward.h"

#include "../../cpu/cost.h"
#include "../../cpu/scratch.h"
#include "../../cpu/state.h"
#include "../../cpu/threads.h"
#include "../../gradient.h"

namespace lc::LC_ISA::backward {
namespace {

// What a worker keeps of states: those before the chunks of one segment, as many as these bytes hold. More would not be
// faster, as they leave the L2 cache. Where they are large, the root of the number of chunks: segments are then as
// many.
constexpr double kKeptBytes = 1 << 20;

int64_t chunks_of(int64_t tokens) { return (tokens + C - 1) / C; }

// A call and how it is dealt out. No answer depends on that: a state is the same, bit for bit, wherever it was computed
// and however many times.
struct Call : Problem {
  bool wants_state, wants_gradient;  // whether S, whether dS has to be known
  bool cut = false;                  // every segment is a task, not every family
  int workers;
  int64_t family;      // states that share a head of q, k or v: one task sums its gradient
  int64_t segment;     // chunks
  int64_t pieces = 1;  // of a state's columns in the first phase

  explicit Call(const Problem& p)
      : Problem(p),
        wants_state(p.d_q || p.d_log_decay),
        wants_gradient(p.d_k || p.d_v || p.d_log_decay || p.d_initial_state) {
    const int64_t share_q = p.Hq < p.Hs ? p.Hs / p.Hq : 1, share_kv = p.Hs / std::min(p.Hk, p.Hv);
    for (family = share_kv; family % share_q;) family += share_kv;
    const int64_t families = p.B * p.Hs / family, chunks = std::max<int64_t>(1, chunks_of(p.N));
    const int64_t visits = p.cu_bits ? p.Hs / family * chunks : families * chunks;
    const double fits = kKeptBytes / (double(family) * state_bytes(p)), root = std::ceil(std::sqrt(double(chunks)));
    segment = std::min(chunks, int64_t(std::max(fits, root)));
    workers = workers_for(p, visits, flop());
    cut = !balanced(families, workers);
    if (cut) segment = std::min(segment, std::max<int64_t>(1, visits / (4 * workers)));
    const int64_t widest = std::min<int64_t>(workers, vectors(p.K));
    while (pieces < widest && !balanced(chains() * pieces, workers)) ++pieces;
  }

  // Vectors of so many numbers, whatever the type.
  int64_t vectors(int64_t n) const { return n * (type == Type::f64 ? 8 : 4) / kVectorBytes; }

  // Sequences of states and of their gradients in the first phase.
  int64_t chains() const { return B * Hs * (int(wants_state) + int(cut && wants_gradient)); }

  int64_t parts(int64_t length, int64_t chunks) const { return (chunks_of(length) + chunks - 1) / chunks; }
  int64_t segments(int64_t length) const { return std::max<int64_t>(1, parts(length, segment)); }

  // Where the parts of so many chunks of sequence b begin, and (b = B) how many there may be at the most.
  int64_t base(int64_t b, int64_t chunks) const {
    if (!cu_bits) return b * std::max<int64_t>(1, parts(N, chunks));
    return (b < B ? sequence(*this, b).begin : N) / (C * chunks) + b;
  }

  double flop() const {
    const double n = mean_length(*this), first = std::min<double>(n, C), KV = 2 * double(K * V);
    const ChunkWork w = chunk_work(n, bool(initial_state), bool(d_final_state));
    const double score_a = d_v || d_log_decay, score_d = d_q || d_k || d_log_decay, keys = d_k || d_log_decay;
    const double has_q = bool(d_q), has_k = bool(d_k), has_v = bool(d_v);
    const double triangles = 2 * w.pairs * (double(K) * (score_a + has_q + has_k) + double(V) * (score_d + has_v));
    const double others = double((segments(int64_t(n)) - 1) * segment * C);  // tokens of all segments but one
    const double kept = std::max(0., std::ceil(n / C) - double(segments(int64_t(n)))) * C;
    double of_q = 0, of_state = w.writes * (keys + has_v);
    if (wants_state) of_q += w.reads, of_state += others + kept;
    if (wants_gradient) of_q += n - (d_initial_state ? 0 : first);
    if (wants_gradient && cut) of_q += others > 0 ? n - double(segment * C) : 0;
    return double(B) * (double(H) * (triangles + of_q * KV) + double(Hs) * of_state * KV);
  }
};

// What all workers share: for each segment the state before it and the gradient of the state after it (not cut: one a
// state, which every chunk moves on); for one decay a head, what each chunk adds to its gradient.
template <class E>
struct Shared {
  using T = Accumulator<E>;
  const Call& p;
  Problem past;
  T *states, *gradients;
  double* decays;

  Shared(const Call& call, Arena& arena)
      : p(call),
        past(of_queries(p)),
        states(arena.take<T>(p.wants_state ? p.base(p.B, p.segment) * p.Hs * State<E>::size(past) : 0)),
        gradients(arena.take<T>(p.wants_gradient ? gradient_slot(p.B, 0) * p.Hs * State<E>::size(past) : 0)),
        decays(arena.take<double>(sums_decays() ? p.base(p.B, 1) * p.Hs : 0)) {}

  bool sums_decays() const { return p.d_log_decay && p.decay == Decay::constant; }
  int64_t gradient_slot(int64_t b, int64_t i) const { return p.cut ? p.base(b, p.segment) + i : b; }

  State<E> at(T* memory, bool live) const {
    State<E> s(past, memory);
    s.take(0, p.pieces), s.last = s.panels.count, s.live = live;
    return s;
  }
  State<E> state(int64_t b, int64_t hs, int64_t i) const {
    return at(states + ((p.base(b, p.segment) + i) * p.Hs + hs) * State<E>::size(past), i || p.initial_state);
  }
  State<E> gradient(int64_t b, int64_t hs, int64_t i, bool live) const {
    return at(gradients + (gradient_slot(b, i) * p.Hs + hs) * State<E>::size(past), live && p.wants_gradient);
  }
  double& decay(int64_t b, int64_t hs, int64_t chunk) const { return decays[(p.base(b, 1) + chunk) * p.Hs + hs]; }

  // d log_decay of heads: sums over chunks and over whatever shares a decay.
  template <class D>
  void sum_decays() const {
    const bool by_row = p.d_log_decay.stride[0], by_head = p.d_log_decay.stride[1];
    for (int64_t row = 0; row < (by_row ? p.B : 1); ++row)
      for (int64_t head = 0; head < (by_head ? p.Hs : 1); ++head) {
        double total = 0;
        for (int64_t b = by_row ? row : 0; b < (by_row ? row + 1 : p.B); ++b)
          for (int64_t hs = by_head ? head : 0; hs < (by_head ? head + 1 : p.Hs); ++hs)
            for (int64_t i = 0; i < chunks_of(sequence(p, b).length); ++i) total += decay(b, hs, i);
        *p.d_log_decay.at<D>(row, head, 0) = D(total);
      }
  }
};

template <class E>
struct Worker {
  using T = Accumulator<E>;
  const Call& p;
  E* zeros;  // a row of dO, where that is absent
  Problem past_problem, future_problem;
  Tokens<E> past, present, future;  // dO, V, K with scores D; Q, K with scores A; dO and Q
  T *kept, *dq, *dk, *dv, *copy;    // dq, dk [C, K], dv [V, C]: sums over heads that share one
  T *reads, *writes, *rows;         // [C] vectors, of which the lanes are to be added: see decay_gradient()
  T* columns;                       // [C]
  int64_t b = -1, head = -1;        // of the decay in use

  Worker(const Call& call, Arena& arena)
      : p(call),
        zeros(arena.take<E>(padded<T>(p.V))),
        past_problem(of_queries(p)),
        future_problem(of_keys(p)),
        past(arena, past_problem),
        present(arena, p, past.decay),
        future(arena, future_problem, past.decay),
        kept(arena.take<T>(p.wants_state ? (p.segment - 1) * p.family * State<E>::size(past_problem) : 0)),
        dq(arena.take<T>(C * padded<T>(p.K))),
        dk(arena.take<T>(C * padded<T>(p.K))),
        dv(arena.take<T>(C * p.V)),
        copy(arena.take<T>(C * padded<T>(p.V))),
        reads(arena.take<T>(3 * C * kLanes<T>)),
        writes(reads + C * kLanes<T>),
        rows(writes + C * kLanes<T>),
        columns(arena.take<T>(C)) {
    if (!p.d_o) past_problem.q = future_problem.k = View{zeros, {}};
  }

  void clear() {
    past.clear_scores(), present.clear_scores();
    std::memset(zeros, 0, sizeof(E) * size_t(padded<T>(p.V)));
  }

  // ---- states

  void load_state(State<E>& to, const View& from, int64_t hs) const {
    for (int i = to.first; to.live && i < to.last; ++i)
      load_transposed<T>(to.panel(i), Matrix<const T>{from.at<const T>(b, hs, to.column(i)), from.stride[2]},
                         to.columns(i), int(p.V));
  }

  void store_state(const View& to, const State<E>& from, int64_t hs) const {
    for (int i = from.first; i < from.last; ++i) {
      const Matrix<T> rows_of_k{copy, padded<T>(p.V)}, S = from.panel(i);
      if (from.live)
        load_transposed<T>(rows_of_k, Matrix<const T>{S.data, S.ld}, int(p.V), from.columns(i));
      else
        std::memset(copy, 0, sizeof(T) * size_t(C * padded<T>(p.V)));
      store<T>(Matrix<T>{to.at<T>(b, hs, from.column(i)), to.stride[2]}, Matrix<const T>{copy, rows_of_k.ld},
               from.columns(i), int(p.V));
    }
  }

  void take_head(const Sequence& s, int64_t sequence, int64_t hs) {
    if (b == sequence && head == hs) return;
    b = sequence, head = hs;
    past.decay.begin_head(p, s, hs);
  }

  void load_past(const Sequence& s, int64_t hs, const State<E>& S) {
    past.load_keys(past_problem, s, hs);
    past.load_values(past_problem, s, hs, S.panels, S.first, S.last);
  }

  // S^T after the chunk at `begin`, from that before it.
  void advance(State<E>& to, const State<E>& from, const Sequence& s, int64_t hs, int64_t begin) {
    past.locate(s, begin);
    load_past(s, hs, to);
    past.weigh_keys(past_problem);
    to.advance(past, from);
  }

  // The weights of the chunk at `begin`, seen backward in time.
  void locate_future() {
    future.follow(past);
    std::swap(future.decay.in, future.decay.out);
  }
  void load_future(const Sequence& s, int64_t h, const State<E>& dS) {
    future.load_keys(future_problem, s, h);
    future.load_values(future_problem, s, h, dS.panels, dS.first, dS.last);
  }

  // dS^T before the chunk, from that after it: head by head of those that read the state.
  void retreat(State<E>& to, const State<E>& from, int64_t h) {
    future.weigh_keys(future_problem, T(p.scale));
    to.advance(future, h % group(p) ? to : from);
    future.decay.total = 1, future.decay.total_rest = 0;
  }

  // First phase: some columns of the states before all segments, ...
  void keep_states(const Shared<E>& shared, int64_t sequence_, int64_t hs, int64_t piece) {
    const Sequence s = sequence(p, sequence_);
    take_head(s, sequence_, hs);
    State<E> initial = shared.state(b, hs, 0);
    initial.take(piece, p.pieces);
    load_state(initial, p.initial_state, hs);
    for (int64_t i = 1; i < p.segments(s.length); ++i) {
      State<E> before = shared.state(b, hs, i - 1), after = shared.state(b, hs, i);
      before.take(piece, p.pieces), after.take(piece, p.pieces);
      for (int64_t c = (i - 1) * p.segment; c < i * p.segment; ++c)
        advance(after, c == (i - 1) * p.segment ? before : after, s, hs, c * C);
    }
  }

  // ... and of the gradients of those after them.
  void keep_gradients(const Shared<E>& shared, int64_t sequence_, int64_t hs, int64_t piece) {
    const Sequence s = sequence(p, sequence_);
    take_head(s, sequence_, hs);
    const int64_t n = p.segments(s.length), chunks = chunks_of(s.length);
    State<E> final = shared.gradient(b, hs, n - 1, bool(p.d_final_state));
    final.take(piece, p.pieces);
    load_state(final, p.d_final_state, hs);
    for (int64_t i = n - 1; i > 0; --i) {
      const int64_t end = std::min(chunks, (i + 1) * p.segment);
      State<E> after = shared.gradient(b, hs, i, i + 1 < n || p.d_final_state);
      State<E> before = shared.gradient(b, hs, i - 1, true);
      before.take(piece, p.pieces), after.take(piece, p.pieces);
      for (int64_t c = end - 1; c >= i * p.segment; --c) {
        past.locate(s, c * C), locate_future();
        for (int64_t h = hs * group(p); h < (hs + 1) * group(p); ++h)
          load_future(s, h, before), retreat(before, c + 1 == end ? after : before, h);
      }
    }
  }

  // ---- the gradients of one chunk

  // reads_i or writes_i += lanes of x_i * y_i, for rows from i0 on; y: the same columns of them.
  template <class Tile>
  void add_products(T* to, const Tile& x, Matrix<const T> y, int i0) const {
    for (int i = 0; i < x.M; ++i) {
      T* lanes = to + (i0 + i) * kLanes<T>;
      Vec<T> sum = load<T>(lanes);
      for (int j = 0; j < x.N; ++j) sum = x.x[i][j] * load<T>(y.row(i0 + i) + j * kLanes<T>) + sum;
      store<T>(lanes, sum);
    }
  }

  // dk = diag(out) V dS^T
  void key_gradient(const State<E>& dS, bool add) {
    const T* out = past.decay.out;
    for (int panel = 0; panel < dS.panels.count; ++panel)
      for_tiles<T>(0, past.n, dS.panels.begin(panel), dS.panels.width(panel), [&](auto& acc, int i0, int c) {
        const Matrix<T> to{dk + i0 * padded<T>(p.K) + c * kLanes<T>, padded<T>(p.K)}, G = dS.panel(panel);
        zero(acc);
        if (dS.live) {
          mma(acc, operand_t(past.keys + i0, C), {G.data, G.ld}, int(p.V));
          map(acc, [&](int i, int, Vec<T> x) { return x * out[i0 + i]; });
          if (p.d_log_decay) add_products(writes, acc, past.v(dS.panels, panel, c), i0);
        }
        if (add) map(acc, [&](int i, int j, Vec<T> x) { return x + load<T>(to.row(i) + j); });
        store(to, acc);
      });
  }

  // dk += D^T Q
  void key_gradient_inside(const State<E>& dS) {
    for (int panel = 0; panel < dS.panels.count; ++panel)
      for_tiles<T>(0, past.n, dS.panels.begin(panel), dS.panels.width(panel), [&](auto& acc, int i0, int c) {
        const Matrix<T> to{dk + i0 * padded<T>(p.K) + c * kLanes<T>, padded<T>(p.K)};
        const Matrix<const T> Q = future.v(dS.panels, panel, c);
        load(acc, {to.data, to.ld});
        mma(acc, operand_t(past.scores + i0 * C + i0, C), {Q.row(i0), Q.ld}, past.n - i0);
        store(to, acc);
      });
  }

  // dv = (diag(out) K dS)^T
  void value_gradient(const State<E>& dS, bool add) {
    const T* out = past.decay.out;
    const Panels tokens(lc::LC_ISA::vectors<T>(past.n));
    for (int panel = 0; panel < tokens.count; ++panel)
      for_tiles<T>(0, int(p.V), tokens.begin(panel), tokens.width(panel), [&](auto& acc, int r, int c) {
        const int j0 = c * kLanes<T>;
        const Matrix<T> to{dv + r * C + j0, C};
        zero(acc);
        if (dS.live) {
          for (int i = 0; i < dS.panels.count; ++i) {
            const Matrix<T> G = dS.panel(i);
            mma(acc, operand(G.row(r), G.ld), {present.keys + dS.column(i) * C + j0, C}, dS.columns(i));
          }
          map(acc, [&](int, int j, Vec<T> x) { return x * load<T>(out + j0 + j); });
        }
        if (add) map(acc, [&](int i, int j, Vec<T> x) { return x + load<T>(to.row(i) + j); });
        store(to, acc);
      });
  }

  // dv += (A^T dO)^T
  void value_gradient_inside() {
    for (int band = 0; band < past.n; band += kBand) {
      const Panels tokens(lc::LC_ISA::vectors<T>(kBand));
      for (int panel = 0; panel < tokens.count; ++panel)
        for_tiles<T>(0, int(p.V), tokens.begin(panel), tokens.width(panel), [&](auto& acc, int r, int c) {
          const int j0 = band + c * kLanes<T>;
          const Matrix<T> to{dv + r * C + j0, C};
          load(acc, {to.data, to.ld});
          mma(acc, operand(future.keys + r * C + band, C), {present.scores + band * C + j0, C}, past.n - band);
          store(to, acc);
        });
    }
  }

  // dq = scale diag(in) dO S^T + D K
  void query_gradient(const State<E>& S, bool add) {
    const T* in = past.decay.in;
    const T scale = T(p.scale);
    for (int panel = 0; panel < S.panels.count; ++panel)
      for_tiles<T>(0, past.n, S.panels.begin(panel), S.panels.width(panel), [&](auto& acc, int i0, int c) {
        const Matrix<T> to{dq + i0 * padded<T>(p.K) + c * kLanes<T>, padded<T>(p.K)}, before = S.panel(panel);
        zero(acc);
        if (S.live) {
          mma(acc, operand(past.q.row(i0), past.q.ld), {before.data, before.ld}, int(p.V));
          map(acc, [&](int i, int, Vec<T> x) { return x * (in[i0 + i] * scale); });
          if (p.d_log_decay) add_products(reads, acc, future.v(S.panels, panel, c), i0);
        }
        if (!p.d_q) return;
        mma(acc, operand(past.scores + i0 * C, C), past.v(S.panels, panel, c), std::min(past.n, i0 + acc.M));
        if (add) map(acc, [&](int i, int j, Vec<T> x) { return x + load<T>(to.row(i) + j); });
        store(to, acc);
      });
  }

  // A and D; with w_ij = A_ij dO_i.v_j for j < i: rows_i += sum_j w_ij (its lanes), columns_j += sum_i w_ij
  void score() {
    if (p.d_v || p.d_log_decay) present.score(p);
    if (!p.d_log_decay) {
      if (p.d_q || p.d_k) past.score(past_problem);
      return;
    }
    const auto lanes = iota<T>();
    past.score(past_problem, [&](int i, int j, Vec<T> x, Vec<T> weight) {
      const Vec<T> product = x * load<T>(present.scores + i * C + j);
      const Vec<T> w = lanes < typename Simd<T>::Int(i - j) ? product : Vec<T>{};
      store<T>(rows + i * kLanes<T>, load<T>(rows + i * kLanes<T>) + w);
      store<T>(columns + j, load<T>(columns + j) + w);
      return x * weight;
    });
  }

  // d log_decay of token t: what crosses from before t to t or later. With x_i = dq_i.q_i and y_j = dk_j.k_j as far as
  // they come through S and dS,
  //   dg_t = total <S, dS> + sum_{j<t} y_j + sum_{i>=t} x_i + sum_{j<t<=i} w_ij
  // Nothing in it cancels, as it does in sums of dq_i.q_i - dk_i.k_i over the rest of the sequence.
  void decay_gradient(const Shared<E>& shared, const Sequence& s, double crossing) {
    const auto total_of = [](const T* x, int i) { return double(sum<T>(load<T>(x + i * kLanes<T>))); };
    double from_before[C];  // summed from its own end, too: a difference would be small beside its terms
    for (int t = 0; t < past.n; ++t) {
      from_before[t] = crossing;
      crossing += total_of(writes, t);
    }
    double to_later = 0, of_chunk = 0;
    for (int t = past.n - 1; t >= 0; --t) {
      to_later += total_of(reads, t) + total_of(rows, t) - double(columns[t]);
      const double gradient = from_before[t] + to_later;
      of_chunk += gradient;
      if (p.decay != Decay::per_token) continue;
      if (p.decay_type == Type::f64)
        *p.d_log_decay.at<double>(s.row, head, past.t + t) = gradient;
      else
        *p.d_log_decay.at<float>(s.row, head, past.t + t) = float(gradient);
    }
    if (shared.sums_decays()) shared.decay(b, head, (past.t - s.begin) / C) = of_chunk;
  }

  double products(const State<E>& x, const State<E>& y) const {
    double total = 0;
    for (int64_t r = 0; r < p.V; ++r) {
      Vec<T> lanes{};
      for (int i = 0; i < x.panels.count; ++i)
        for (int j = 0; j < x.panel(i).ld; j += kLanes<T>)
          lanes = load<T>(x.panel(i).row(r) + j) * load<T>(y.panel(i).row(r) + j) + lanes;
      total += double(sum<T>(lanes));
    }
    return total;
  }

  // Rows of a gradient, where its head is done with.
  void write(const View& to, const Sequence& s, int64_t h, const T* from, int64_t columns_of_it) const {
    store<T>(Matrix<E>{to.at<E>(s.row, h, past.t), to.stride[2]}, Matrix<const T>{from, padded<T>(columns_of_it)},
             past.n, int(columns_of_it));
  }

  // The chunk at `begin` of one state, S before it, dS after it; dS is moved before it, if it `retreats`.
  void chunk(const Shared<E>& shared, const Sequence& s, int64_t hs, int64_t begin, const State<E>& S, State<E>& dS,
             bool retreats) {
    past.locate(s, begin), present.follow(past), locate_future();
    load_past(s, hs, dS);
    present.load_keys(p, s, hs);
    if (p.d_log_decay) {
      std::memset(reads, 0, sizeof(T) * size_t(3 * C * kLanes<T>));
      std::memset(columns, 0, sizeof(T) * C);
    }
    const int64_t share_q = p.H / p.Hq, share_k = p.Hs / p.Hk, share_v = p.Hs / p.Hv;
    if (p.d_k || p.d_log_decay) key_gradient(dS, hs % share_k);
    if (p.d_v) value_gradient(dS, hs % share_v);
    double crossing = 0;
    if (p.d_log_decay && S.live && dS.live) crossing = std::exp2(past.decay.log2_total) * products(S, dS);
    for (int64_t h = hs * group(p); h < (hs + 1) * group(p); ++h) {
      past.load_queries(past_problem, s, h), present.load_queries(p, s, h), load_future(s, h, dS);
      score();
      if (p.wants_state) query_gradient(S, h % share_q);
      if (p.d_q && (h + 1) % share_q == 0) write(p.d_q, s, h / share_q, dq, p.K);
      if (p.d_k) key_gradient_inside(dS);
      if (p.d_v) value_gradient_inside();
      if (retreats) retreat(dS, dS, h);
    }
    if (p.d_k && (hs + 1) % share_k == 0) write(p.d_k, s, hs / share_k, dk, p.K);
    if (p.d_v && (hs + 1) % share_v == 0) {
      load_transposed<T>(Matrix<T>{copy, padded<T>(p.V)}, Matrix<const T>{dv, C}, int(p.V), past.n);
      write(p.d_v, s, hs / share_v, copy, p.V);
    }
    if (p.d_log_decay) decay_gradient(shared, s, crossing);
  }

  // Second phase: the gradients of one segment of a family, and of the initial states before the first one.
  void segment(const Shared<E>& shared, int64_t sequence_, int64_t first_head, int64_t i) {
    const Sequence s = sequence(p, sequence_);
    const int64_t chunks = chunks_of(s.length), begin = i * p.segment, end = std::min(chunks, begin + p.segment);
    const auto state = [&](int64_t hs, int64_t c) {
      const int64_t slot = (c - begin - 1) * p.family + hs - first_head;
      return c == begin ? shared.state(sequence_, hs, i)
                        : shared.at(kept + slot * State<E>::size(past_problem), /*live=*/true);
    };
    for (int64_t hs = first_head; p.wants_state && hs < first_head + p.family; ++hs) {
      take_head(s, sequence_, hs);
      for (int64_t c = begin; c + 1 < end; ++c) {
        State<E> after = state(hs, c + 1);
        advance(after, state(hs, c), s, hs, c * C);
      }
    }
    for (int64_t c = end; c-- > begin;)
      for (int64_t hs = first_head; hs < first_head + p.family; ++hs) {
        take_head(s, sequence_, hs);
        State<E> dS = shared.gradient(b, hs, i, c + 1 < chunks || p.d_final_state);
        const bool retreats = p.wants_gradient && (c > 0 || p.d_initial_state);
        chunk(shared, s, hs, c * C, state(hs, c), dS, retreats);
      }
    for (int64_t hs = first_head; p.d_initial_state && !i && hs < first_head + p.family; ++hs) {
      take_head(s, sequence_, hs);
      store_state(p.d_initial_state, shared.gradient(b, hs, 0, chunks > 0 || p.d_final_state), hs);
    }
  }

  // One task of the second phase: a family, or the segment `i` of it.
  void family(const Shared<E>& shared, int64_t sequence_, int64_t first_head, int64_t i) {
    const Sequence s = sequence(p, sequence_);
    const int64_t n = p.segments(s.length);
    if (p.cut) {
      if (i < n) segment(shared, sequence_, first_head, i);
      return;
    }
    for (int64_t hs = first_head; p.wants_gradient && hs < first_head + p.family; ++hs) {
      take_head(s, sequence_, hs);
      State<E> final = shared.gradient(b, hs, 0, bool(p.d_final_state));
      load_state(final, p.d_final_state, hs);
    }
    for (i = n; i-- > 0;) segment(shared, sequence_, first_head, i);
  }
};

}  // namespace

size_t workspace(const Problem& problem) {
  const Call p(problem);
  return scratch_bytes<Shared>(p, 1) + scratch_bytes<Worker>(p, p.workers);
}

void run(const Problem& problem) {
  const Call p(problem);
  Tasks chains(p), families(p);
  Barrier barrier;
  const int64_t states = p.B * p.Hs, of_sequence = p.Hs / p.family;
  const int64_t parts = p.cut ? p.segments(p.N) : 1;
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    run_workers(p.workers, [&](int index, int granted) {
      Arena arena(p.workspace);
      const Shared<E> shared(p, arena);
      Worker<E> worker = cut<Worker, E>(p, arena, index);
      worker.clear();
      chains.each(p.chains() * p.pieces, index, granted, [&](int64_t i) {
        const int64_t piece = i % p.pieces, chain = i / p.pieces, b = chain % states / p.Hs, hs = chain % p.Hs;
        if (p.wants_state && chain < states)
          worker.keep_states(shared, b, hs, piece);
        else
          worker.keep_gradients(shared, b, hs, piece);
      });
      barrier.wait(granted);
      families.each(p.B * of_sequence * parts, index, granted, [&](int64_t i) {
        const int64_t f = i / parts;
        worker.family(shared, f / of_sequence, f % of_sequence * p.family, i % parts);
      });
      if (!shared.sums_decays()) return;
      barrier.wait(granted);
      if (index == 0)
        p.decay_type == Type::f64 ? shared.template sum_decays<double>() : shared.template sum_decays<float>();
    });
  });
}

Cost cost(const Problem& problem) {
  const Call p(problem);
  const double n = mean_length(p), chunks = double(tokens(p)) / C;
  const double states = 4 * double(p.B * p.Hs) * double(p.segments(int64_t(n))) * state_bytes(p);
  const double again = double(tokens(p)) * type_bytes(p.type) * double(p.Hk * p.K + p.Hv * p.V);
  return predict(p,
                 {p.flop(), states + again, /*depth=*/(p.cut ? n / C + double(p.segment) : 2 * n / C),
                  /*tasks=*/double(p.H) * (double(p.B) + 12 * chunks)},
                 /*efficiency=*/0.8, p.workers);
}

}  // namespace lc::LC_ISA::backward
