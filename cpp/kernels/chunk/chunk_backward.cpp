// chunk_backward.cpp - CPU: gradients from the last chunk to the first, with S before, dS after it.
//
//   dQ = scale diag(in) dO S^T + D K     A_ij = scale [j <= i] mask_ij q_i.k_j
//   dK = diag(out) V dS^T + D^T Q        D_ij = scale [j <= i] mask_ij dO_i.v_j
//   dV = diag(out) K dS + A^T dO         dS <- total dS + scale (diag(in) Q)^T dO
//
//   Q, K [C, K]   V, dO [C, V]   A, D [C, C]   S^T, dS^T [V, K]   weights: cpu/decay.h
//   B H N ((C+1)(3K+2V) + 10KV) flop; 2KV more in all segments except the last one;
//   2KV more if segments are tasks. Scratch: K V per segment, and a segment's states per worker.
//   phases: states at ends of segments, by pieces of columns; families of states, or their segments
//   Lightning Attention-2, arXiv:2401.04658; GLA, arXiv:2312.06635. One file: one worker's steps
#include "chunk_backward.h"

#include "../../cpu/cost.h"
#include "../../cpu/scratch.h"
#include "../../cpu/state.h"
#include "../../cpu/threads.h"
#include "../../gradient.h"
#include "chunk_decay_gradients.h"

namespace lc::LC_ISA::backward {
namespace {

// A worker keeps the states before the chunks of one segment, as many as fit these bytes. More
// states would leave the L2 cache, and would not be faster. If states are large, a segment has the
// root of the number of chunks, and so has a sequence segments.
constexpr double kKeptBytes = 1 << 20;

int64_t chunks_of(int64_t tokens) { return (tokens + C - 1) / C; }

// A backward call and its division into tasks. No answer depends on the division: a state has the
// same bits wherever and however often it is computed.
struct BackwardPlan : Problem {
  bool wants_decay;     // whether gradients of decays or of lengths are asked for
  bool wants_state;     // whether S has to be known
  bool wants_gradient;  // whether dS has to be known
  bool cut = false;     // whether each segment of a family is a task; otherwise each family is
  int workers;
  int64_t family;      // states that share a head of q, k or v: one task sums the gradient of that head
  int64_t segment;     // chunks per segment
  int64_t pieces = 1;  // of the columns of a state in the first phase

  explicit BackwardPlan(const Problem& p)
      : Problem(p),
        wants_decay(p.d_log_decay || p.d_dt),
        wants_state(p.d_q || wants_decay),
        wants_gradient(p.d_k || p.d_v || wants_decay || p.d_initial_state) {
    const int64_t share_q = p.Hq < p.Hs ? p.Hs / p.Hq : 1, share_kv = p.Hs / std::min(p.Hk, p.Hv);
    for (family = share_kv; family % share_q;) family += share_kv;
    const int64_t families = p.B * p.Hs / family, chunks = std::max<int64_t>(1, chunks_of(p.N));
    const int64_t visits = p.cu_bits ? p.Hs / family * chunks : families * chunks;
    const double fits = kKeptBytes / (double(family) * state_bytes(p)), root = std::ceil(std::sqrt(double(chunks)));
    segment = std::min(chunks, int64_t(std::max(fits, root)));
    workers = workers_for(p, visits, flop());
    cut = !balanced(families, workers);
    if (cut) segment = std::min(segment, std::max<int64_t>(1, visits / (4 * workers)));
    const int64_t widest = std::min<int64_t>(workers, p.K * (p.type == Type::f64 ? 8 : 4) / kVectorBytes);
    while (pieces < widest && !balanced(chains() * pieces, workers)) ++pieces;
  }

  // The number of sequences of states and of state gradients in the first phase.
  int64_t chains() const { return B * Hs * (int(wants_state) + int(cut && wants_gradient)); }

  int64_t parts(int64_t length, int64_t chunks) const { return (chunks_of(length) + chunks - 1) / chunks; }
  int64_t segments(int64_t length) const { return std::max<int64_t>(1, parts(length, segment)); }

  // With every sequence cut into parts of `chunks` chunks: the index of the first part of sequence
  // b among all parts, and for b = B an upper bound of their number.
  int64_t base(int64_t b, int64_t chunks) const {
    if (!cu_bits) return b * std::max<int64_t>(1, parts(N, chunks));
    return (b < B ? sequence(*this, b).begin : N) / (C * chunks) + b;
  }

  double flop() const {
    const double n = mean_length(*this), first = std::min<double>(n, C), KV = 2 * double(K * V);
    const ChunkWork w = chunk_work(n, bool(initial_state), bool(d_final_state));
    const double score_a = d_v || wants_decay, score_d = d_q || d_k || wants_decay, keys = d_k || wants_decay;
    const double has_q = bool(d_q), has_k = bool(d_k), has_v = bool(d_v);
    const double triangles = 2 * w.pairs * (double(K) * (score_a + has_q + has_k) + double(V) * (score_d + has_v));
    const double others = double((segments(int64_t(n)) - 1) * segment * C);  // tokens of all segments except one
    const double kept = std::max(0., std::ceil(n / C) - double(segments(int64_t(n)))) * C;
    double of_q = 0, of_state = w.writes * (keys + has_v);
    if (wants_state) {
      of_q += w.reads;
      of_state += others + kept;
    }
    if (wants_gradient) of_q += n - (d_initial_state ? 0 : first);
    if (wants_gradient && cut) of_q += others > 0 ? n - double(segment * C) : 0;
    return double(B) * (double(H) * (triangles + of_q * KV) + double(Hs) * of_state * KV);
  }
};

// Memory that all workers share. It holds for each segment the state before it and the gradient of
// the state after it; if families are not cut, one gradient per state, which every chunk moves on.
// For constant decays it also holds what each chunk adds to their gradient.
template <class E>
struct BoundaryStates {
  using T = Accumulator<E>;
  const BackwardPlan& p;
  Problem dq_problem;
  T *states, *gradients;
  double* decays;

  BoundaryStates(const BackwardPlan& plan, Arena& arena)
      : p(plan),
        dq_problem(of_queries(p)),
        states(arena.take<T>(p.wants_state ? p.base(p.B, p.segment) * p.Hs * State<E>::size(dq_problem) : 0)),
        gradients(arena.take<T>(p.wants_gradient ? gradient_slot(p.B, 0) * p.Hs * State<E>::size(dq_problem) : 0)),
        decays(arena.take<double>(sums_decays() ? p.base(p.B, 1) * p.Hs : 0)) {}

  bool sums_decays() const { return p.d_log_decay && (p.decay == Decay::constant || p.dt); }
  int64_t gradient_slot(int64_t b, int64_t i) const { return p.cut ? p.base(b, p.segment) + i : b; }

  State<E> at(T* memory, bool live) const {
    State<E> s(dq_problem, memory);
    s.take(0, p.pieces);
    s.last = s.panels.count;
    s.live = live;
    return s;
  }
  // S^T before segment i.
  State<E> state(int64_t b, int64_t hs, int64_t i) const {
    return at(states + ((p.base(b, p.segment) + i) * p.Hs + hs) * State<E>::size(dq_problem), i || p.initial_state);
  }
  // dS^T after segment i.
  State<E> gradient(int64_t b, int64_t hs, int64_t i, bool live) const {
    return at(gradients + (gradient_slot(b, i) * p.Hs + hs) * State<E>::size(dq_problem), live && p.wants_gradient);
  }
  double& decay(int64_t b, int64_t hs, int64_t chunk) const { return decays[(p.base(b, 1) + chunk) * p.Hs + hs]; }
};

// The names are those of gradient.h: dq_problem is the recurrence forward in time with outputs dq
// and states S^T, dk_problem the recurrence backward in time with outputs dk and states dS^T.
template <class E>
struct GradientWorker {
  using T = Accumulator<E>;
  const BackwardPlan& p;
  E* zeros;  // a row of dO, used if dO is absent
  Problem dq_problem, dk_problem;
  Tokens<E> dq_chunk;  // queries dO, keys V, values K, scores D
  Tokens<E> chunk;     // queries Q, keys K, scores A
  Tokens<E> dk_chunk;  // keys dO, values Q
  T* kept;             // the states before the chunks of a segment, except the first chunk
  T *dq, *dk, *dv;     // [C, K], [C, K], [V, C]: sums over the heads that share a head of q, k or v
  T* copy;             // [C, V]
  DecayGradient<E> decay_gradient;
  int64_t b = -1, head = -1;  // sequence and state head of the decay weights in use

  GradientWorker(const BackwardPlan& plan, Arena& arena)
      : p(plan),
        zeros(arena.take<E>(padded<T>(p.V))),
        dq_problem(of_queries(p)),
        dk_problem(of_keys(p)),
        dq_chunk(arena, dq_problem),
        chunk(arena, p, dq_chunk.decay),
        dk_chunk(arena, dk_problem, dq_chunk.decay),
        kept(arena.take<T>(p.wants_state ? (p.segment - 1) * p.family * State<E>::size(dq_problem) : 0)),
        dq(arena.take<T>(C * padded<T>(p.K))),
        dk(arena.take<T>(C * padded<T>(p.K))),
        dv(arena.take<T>(C * p.V)),
        copy(arena.take<T>(C * padded<T>(p.V))),
        decay_gradient(p, arena) {
    if (!p.d_o) dq_problem.q = dk_problem.k = View{zeros, {}};
  }

  void clear() {
    dq_chunk.clear_scores();
    chunk.clear_scores();
    std::memset(zeros, 0, sizeof(E) * size_t(padded<T>(p.V)));
  }

  // ---- states

  // Loads the transpose of a state of the call.
  void load_state(State<E>& to, const View& from, int64_t hs) const {
    for (int i = to.first; to.live && i < to.last; ++i) {
      const T* column = from.at<const T>(b, hs, to.column(i));
      if (is_transposed(p, from))
        load<T>(to.panel(i), Matrix<const T>{column, from.stride[3]}, int(p.V), to.columns(i));
      else
        load_transposed<T>(to.panel(i), Matrix<const T>{column, from.stride[2]}, to.columns(i), int(p.V));
    }
  }

  void store_state(const View& to, const State<E>& from, int64_t hs) const {
    for (int i = from.first; i < from.last; ++i) {
      const Matrix<T> S = from.panel(i);
      T* column = to.at<T>(b, hs, from.column(i));
      if (!from.live)
        for (int64_t r = 0; r < p.V; ++r) std::memset(S.row(r), 0, sizeof(T) * size_t(S.ld));
      if (is_transposed(p, to))
        store<T>(Matrix<T>{column, to.stride[3]}, Matrix<const T>{S.data, S.ld}, int(p.V), from.columns(i));
      else
        store_transposed<T>(Matrix<T>{column, to.stride[2]}, Matrix<const T>{S.data, S.ld}, int(p.V), from.columns(i));
    }
  }

  void take_head(const Sequence& s, int64_t sequence, int64_t hs) {
    if (b == sequence && head == hs) return;
    b = sequence;
    head = hs;
    dq_chunk.decay.begin_head(p, s, hs, kLeastWeight<T>);
  }

  void load_dq_chunk(const Sequence& s, int64_t hs, const State<E>& S) {
    dq_chunk.load_keys(dq_problem, s, hs);
    dq_chunk.load_values(dq_problem, s, hs, S.panels, S.first, S.last);
  }

  // Sets `to` to S^T after the chunk at token `begin`, from S^T before it.
  void advance(State<E>& to, const State<E>& from, const Sequence& s, int64_t hs, int64_t begin) {
    dq_chunk.locate(s, begin);
    load_dq_chunk(s, hs, to);
    dq_chunk.weigh_keys(dq_problem);
    to.advance(dq_chunk, from);
  }

  // Selects the tokens of dq_chunk, with their weights backward in time.
  void locate_dk_chunk() {
    dk_chunk.follow(dq_chunk);
    std::swap(dk_chunk.decay.in, dk_chunk.decay.out);
  }
  void load_dk_chunk(const Sequence& s, int64_t h, const State<E>& dS) {
    dk_chunk.load_keys(dk_problem, s, h);
    dk_chunk.load_values(dk_problem, s, h, dS.panels, dS.first, dS.last);
  }

  // Sets `to` to dS^T before the chunk, from dS^T after it. Called for each q head h that reads the
  // state, in order.
  void retreat(State<E>& to, const State<E>& from, int64_t h) {
    dk_chunk.weigh_keys(dk_problem, T(p.scale));
    to.advance(dk_chunk, h % group(p) ? to : from);
    dk_chunk.decay.total = 1;
    dk_chunk.decay.total_rest = 0;
  }

  // First phase: a piece of the columns of S^T before each segment.
  void keep_states(const BoundaryStates<E>& boundary, int64_t sequence_, int64_t hs, int64_t piece) {
    const Sequence s = sequence(p, sequence_);
    take_head(s, sequence_, hs);
    State<E> initial = boundary.state(b, hs, 0);
    initial.take(piece, p.pieces);
    load_state(initial, p.initial_state, hs);
    for (int64_t i = 1; i < p.segments(s.length); ++i) {
      State<E> before = boundary.state(b, hs, i - 1), after = boundary.state(b, hs, i);
      before.take(piece, p.pieces);
      after.take(piece, p.pieces);
      for (int64_t c = (i - 1) * p.segment; c < i * p.segment; ++c)
        advance(after, c == (i - 1) * p.segment ? before : after, s, hs, c * C);
    }
  }

  // First phase: a piece of the columns of dS^T after each segment.
  void keep_gradients(const BoundaryStates<E>& boundary, int64_t sequence_, int64_t hs, int64_t piece) {
    const Sequence s = sequence(p, sequence_);
    take_head(s, sequence_, hs);
    const int64_t n = p.segments(s.length), chunks = chunks_of(s.length);
    State<E> final = boundary.gradient(b, hs, n - 1, bool(p.d_final_state));
    final.take(piece, p.pieces);
    load_state(final, p.d_final_state, hs);
    for (int64_t i = n - 1; i > 0; --i) {
      const int64_t end = std::min(chunks, (i + 1) * p.segment);
      State<E> after = boundary.gradient(b, hs, i, i + 1 < n || p.d_final_state);
      State<E> before = boundary.gradient(b, hs, i - 1, true);
      before.take(piece, p.pieces);
      after.take(piece, p.pieces);
      for (int64_t c = end - 1; c >= i * p.segment; --c) {
        dq_chunk.locate(s, c * C);
        locate_dk_chunk();
        for (int64_t h = hs * group(p); h < (hs + 1) * group(p); ++h) {
          load_dk_chunk(s, h, before);
          retreat(before, c + 1 == end ? after : before, h);
        }
      }
    }
  }

  // ---- the gradients of one chunk: what comes through S and dS, and what stays inside the chunk

  Matrix<T> rows_of(T* gradient, int i0, int c) const {
    return {gradient + i0 * padded<T>(p.K) + c * kLanes<T>, padded<T>(p.K)};
  }

  // dk = diag(out) V dS^T, added to dk if `add`
  void dk_through_state(const State<E>& dS, bool add) {
    const ChunkDecay<T>& decay = dq_chunk.decay;
    const T* out = decay.measured();
    for (int panel = 0; panel < dS.panels.count; ++panel)
      for_tiles<T>(0, dq_chunk.n, dS.panels.begin(panel), dS.panels.width(panel), [&](auto& acc, int i0, int c) {
        const Matrix<T> to = rows_of(dk, i0, c), G = dS.panel(panel);
        zero(acc);
        if (dS.live) {
          mma(acc, operand_t(dq_chunk.keys + i0, C), {G.data, G.ld}, int(p.V));
          map(acc, [&](int i, int, Vec<T> x) { return x * out[i0 + i]; });
          if (p.wants_decay) decay_gradient.add_products(decay_gradient.y, acc, dq_chunk.v(dS.panels, panel, c), i0);
          if (decay.hides()) map(acc, [&](int i, int, Vec<T> x) { return decay.hidden(i0 + i) ? Vec<T>{} : x; });
        }
        if (add) map(acc, [&](int i, int j, Vec<T> x) { return x + load<T>(to.row(i) + j); });
        store(to, acc);
      });
  }

  // dk += D^T Q
  void dk_inside(const State<E>& dS) {
    for (int panel = 0; panel < dS.panels.count; ++panel)
      for_tiles<T>(0, dq_chunk.n, dS.panels.begin(panel), dS.panels.width(panel), [&](auto& acc, int i0, int c) {
        const Matrix<T> to = rows_of(dk, i0, c);
        const Matrix<const T> Q = dk_chunk.v(dS.panels, panel, c);
        load(acc, {to.data, to.ld});
        mma(acc, operand_t(dq_chunk.scores + i0 * C + i0, C), {Q.row(i0), Q.ld}, dq_chunk.n - i0);
        store(to, acc);
      });
  }

  // dv^T = (diag(out) K dS)^T, added to dv if `add`
  void dv_through_state(const State<E>& dS, bool add) {
    const T* out = dq_chunk.decay.out;
    const Panels tokens(vectors<T>(dq_chunk.n));
    for (int panel = 0; panel < tokens.count; ++panel)
      for_tiles<T>(0, int(p.V), tokens.begin(panel), tokens.width(panel), [&](auto& acc, int r, int c) {
        const int j0 = c * kLanes<T>;
        const Matrix<T> to{dv + r * C + j0, C};
        zero(acc);
        if (dS.live) {
          for (int i = 0; i < dS.panels.count; ++i) {
            const Matrix<T> G = dS.panel(i);
            mma(acc, operand(G.row(r), G.ld), {chunk.keys + dS.column(i) * C + j0, C}, dS.columns(i));
          }
          map(acc, [&](int, int j, Vec<T> x) { return x * load<T>(out + j0 + j); });
        }
        if (add) map(acc, [&](int i, int j, Vec<T> x) { return x + load<T>(to.row(i) + j); });
        store(to, acc);
      });
  }

  // dv^T += (A^T dO)^T
  void dv_inside() {
    for (int band = 0; band < dq_chunk.n; band += kBand) {
      const Panels tokens(vectors<T>(kBand));
      for (int panel = 0; panel < tokens.count; ++panel)
        for_tiles<T>(0, int(p.V), tokens.begin(panel), tokens.width(panel), [&](auto& acc, int r, int c) {
          const int j0 = band + c * kLanes<T>;
          const Matrix<T> to{dv + r * C + j0, C};
          load(acc, {to.data, to.ld});
          mma(acc, operand(dk_chunk.keys + r * C + band, C), {chunk.scores + band * C + j0, C}, dq_chunk.n - band);
          store(to, acc);
        });
    }
  }

  // dq = scale diag(in) dO S^T + D K, added to dq if `add`
  void dq_rows(const State<E>& S, bool add) {
    const T* in = dq_chunk.decay.in;
    const T scale = T(p.scale);
    for (int panel = 0; panel < S.panels.count; ++panel)
      for_tiles<T>(0, dq_chunk.n, S.panels.begin(panel), S.panels.width(panel), [&](auto& acc, int i0, int c) {
        const Matrix<T> to = rows_of(dq, i0, c), before = S.panel(panel);
        zero(acc);
        if (S.live) {
          mma(acc, operand(dq_chunk.q.row(i0), dq_chunk.q.ld), {before.data, before.ld}, int(p.V));
          map(acc, [&](int i, int, Vec<T> x) { return x * (in[i0 + i] * scale); });
          if (p.wants_decay) decay_gradient.add_products(decay_gradient.x, acc, dk_chunk.v(S.panels, panel, c), i0);
        }
        if (!p.d_q) return;
        mma(acc, operand(dq_chunk.scores + i0 * C, C), dq_chunk.v(S.panels, panel, c),
            std::min(dq_chunk.n, i0 + acc.M));
        if (add) map(acc, [&](int i, int j, Vec<T> x) { return x + load<T>(to.row(i) + j); });
        store(to, acc);
      });
  }

  // A and D, as far as they are needed.
  void score() {
    if (p.d_v || p.wants_decay) chunk.score(p);
    if (p.wants_decay)
      dq_chunk.score(dq_problem, [&](int i, int j, Vec<T> x, Vec<T> weight) {
        decay_gradient.add_pairs(dq_chunk.decay, i, j, x * load<T>(chunk.scores + i * C + j));
        return x * weight;
      });
    else if (p.d_q || p.d_k)
      dq_chunk.score(dq_problem);
    if (dq_chunk.decay.hides()) hide_scores();
  }

  // Sets the scores of hidden tokens to 0, after their weights have been measured.
  void hide_scores() {
    for (int j = 0; j < dq_chunk.n; ++j) {
      if (!dq_chunk.decay.hidden(j)) continue;
      for (int i = 0; i < dq_chunk.n; ++i) chunk.scores[i * C + j] = dq_chunk.scores[i * C + j] = 0;
    }
  }

  // Writes rows of a gradient when all heads that share them are done.
  void write(const View& to, const Sequence& s, int64_t h, const T* from, int64_t columns) const {
    store<T>(Matrix<E>{to.at<E>(s.row, h, dq_chunk.t), to.stride[2]}, Matrix<const T>{from, padded<T>(columns)},
             dq_chunk.n, int(columns));
  }

  // dk and dv of the chunk, after the last state head that shares them.
  void write_keys_and_values(const Sequence& s, int64_t hs) const {
    const int64_t share_k = p.Hs / p.Hk, share_v = p.Hs / p.Hv;
    if (p.d_k && (hs + 1) % share_k == 0) write(p.d_k, s, hs / share_k, dk, p.K);
    if (p.d_v && (hs + 1) % share_v == 0) {
      load_transposed<T>(Matrix<T>{copy, padded<T>(p.V)}, Matrix<const T>{dv, C}, int(p.V), dq_chunk.n);
      write(p.d_v, s, hs / share_v, copy, p.V);
    }
  }

  // The gradients of the chunk at token `begin` of one state, from S before and dS after the chunk.
  // With `retreats`, dS is moved to before the chunk.
  void chunk_gradients(const BoundaryStates<E>& boundary, const Sequence& s, int64_t hs, int64_t begin,
                       const State<E>& S, State<E>& dS, bool retreats) {
    dq_chunk.locate(s, begin);
    chunk.follow(dq_chunk);
    locate_dk_chunk();
    load_dq_chunk(s, hs, dS);
    chunk.load_keys(p, s, hs);
    if (p.wants_decay) decay_gradient.clear();
    if (p.d_k || p.wants_decay) dk_through_state(dS, hs % (p.Hs / p.Hk));
    if (p.d_v) dv_through_state(dS, hs % (p.Hs / p.Hv));
    const double crossing = p.wants_decay ? decay_gradient.crossing(S, dS, dq_chunk.decay.log2_total) : 0;
    const int64_t share_q = p.H / p.Hq;
    for (int64_t h = hs * group(p); h < (hs + 1) * group(p); ++h) {
      dq_chunk.load_queries(dq_problem, s, h);
      chunk.load_queries(p, s, h);
      load_dk_chunk(s, h, dS);
      score();
      if (p.wants_state) dq_rows(S, h % share_q);
      if (p.d_q && (h + 1) % share_q == 0) write(p.d_q, s, h / share_q, dq, p.K);
      if (p.d_k) dk_inside(dS);
      if (p.d_v) dv_inside();
      if (retreats) retreat(dS, dS, h);
    }
    write_keys_and_values(s, hs);
    if (!p.wants_decay) return;
    const double of_chunk = decay_gradient.finish(dq_chunk, s, hs, crossing);
    if (boundary.sums_decays()) boundary.decay(b, hs, begin / C) = of_chunk;
  }

  // Second phase: the gradients of segment i of a family, and those of the initial states if i is
  // 0.
  void segment(const BoundaryStates<E>& boundary, int64_t sequence_, int64_t first_head, int64_t i) {
    const Sequence s = sequence(p, sequence_);
    const int64_t chunks = chunks_of(s.length), begin = i * p.segment, end = std::min(chunks, begin + p.segment);
    const auto state = [&](int64_t hs, int64_t c) {  // S^T before chunk c
      const int64_t slot = (c - begin - 1) * p.family + hs - first_head;
      return c == begin ? boundary.state(sequence_, hs, i)
                        : boundary.at(kept + slot * State<E>::size(dq_problem), /*live=*/true);
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
        State<E> dS = boundary.gradient(b, hs, i, c + 1 < chunks || p.d_final_state);
        const bool retreats = p.wants_gradient && (c > 0 || p.d_initial_state);
        chunk_gradients(boundary, s, hs, c * C, state(hs, c), dS, retreats);
      }
    for (int64_t hs = first_head; p.d_initial_state && !i && hs < first_head + p.family; ++hs) {
      take_head(s, sequence_, hs);
      store_state(p.d_initial_state, boundary.gradient(b, hs, 0, chunks > 0 || p.d_final_state), hs);
    }
  }

  // A task of the second phase: a whole family, or segment i of it if families are cut.
  void family(const BoundaryStates<E>& boundary, int64_t sequence_, int64_t first_head, int64_t i) {
    const Sequence s = sequence(p, sequence_);
    const int64_t n = p.segments(s.length);
    if (p.cut) {
      if (i < n) segment(boundary, sequence_, first_head, i);
      return;
    }
    for (int64_t hs = first_head; p.wants_gradient && hs < first_head + p.family; ++hs) {
      take_head(s, sequence_, hs);
      State<E> final = boundary.gradient(b, hs, 0, bool(p.d_final_state));
      load_state(final, p.d_final_state, hs);
    }
    for (i = n; i-- > 0;) segment(boundary, sequence_, first_head, i);
  }
};

template <class E>
void sum_decays(const BackwardPlan& p, const BoundaryStates<E>& boundary) {
  const auto of_chunk = [&](int64_t b, int64_t hs, int64_t chunk) { return boundary.decay(b, hs, chunk); };
  if (p.decay_type == Type::f64)
    sum_constant_decays<double>(p, of_chunk);
  else
    sum_constant_decays<float>(p, of_chunk);
}

}  // namespace

size_t workspace(const Problem& problem) {
  const BackwardPlan p(problem);
  return scratch_bytes<BoundaryStates>(p, 1) + scratch_bytes<GradientWorker>(p, p.workers);
}

void run(const Problem& problem) {
  const BackwardPlan p(problem);
  Tasks chains(p), families(p);
  Barrier barrier;
  const int64_t states = p.B * p.Hs, of_sequence = p.Hs / p.family;
  const int64_t parts = p.cut ? p.segments(p.N) : 1;
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    run_workers(p.workers, [&](int index, int granted) {
      Arena arena(p.workspace);
      const BoundaryStates<E> boundary(p, arena);
      GradientWorker<E> worker = cut<GradientWorker, E>(p, arena, index);
      worker.clear();
      chains.each(p.chains() * p.pieces, index, granted, [&](int64_t i) {
        const int64_t piece = i % p.pieces, chain = i / p.pieces, b = chain % states / p.Hs, hs = chain % p.Hs;
        if (p.wants_state && chain < states)
          worker.keep_states(boundary, b, hs, piece);
        else
          worker.keep_gradients(boundary, b, hs, piece);
      });
      barrier.wait(granted);
      families.each(p.B * of_sequence * parts, index, granted, [&](int64_t i) {
        const int64_t f = i / parts;
        worker.family(boundary, f / of_sequence, f % of_sequence * p.family, i % parts);
      });
      if (!boundary.sums_decays()) return;
      barrier.wait(granted);
      if (index == 0) sum_decays(p, boundary);
    });
  });
}

Cost cost(const Problem& problem) {
  const BackwardPlan p(problem);
  const double n = mean_length(p), chunks = double(tokens(p)) / C;
  const double states = 4 * double(p.B * p.Hs) * double(p.segments(int64_t(n))) * state_bytes(p);
  const double again = double(tokens(p)) * type_bytes(p.type) * double(p.Hk * p.K + p.Hv * p.V);
  return predict(p,
                 {p.flop(), states + again, /*depth=*/(p.cut ? n / C + double(p.segment) : 2 * n / C),
                  /*tasks=*/double(p.H) * (double(p.B) + 12 * chunks)},
                 /*efficiency=*/0.8, p.workers);
}

}  // namespace lc::LC_ISA::backward
