// chunk_decay_gradients.h - CPU: the gradient of log_decay, from the parts of one chunk.
//
//   dg_t = total <S, dS> + sum_{j<t} y_j + sum_{i>=t} x_i + sum_{j<t<=i} w_ij
//
//   dg_t is what crosses from before token t to t or later. x_i = dq_i.q_i counts only what comes
//   through S, and y_j = dk_j.k_j only what comes through dS. w_ij = A_ij dO_i.v_j. Nothing in the
//   formula cancels, as it does in sums of dq_i.q_i - dk_i.k_i over the rest of the sequence.
//
//   If tokens have lengths d_t, then g_t = d_t log_decay, and w and y contain the weight d_j:
//
//   d(d_t) = log_decay dg_t + (y_t + sum_{i>=t} w_it) / d_t      d(log_decay) = sum_t d_t dg_t
#pragma once
#include "../../cpu/state.h"

namespace lc::LC_ISA::backward {

// Tokens with a smaller length are hidden from the backward pass, which divides by lengths.
template <class T>
constexpr T kLeastWeight = sizeof(T) == 8 ? 1e-100 : 1e-20;

// The parts of one chunk. A vector per token holds a sum whose lanes are still to be added.
template <class E>
struct DecayGradient {
  using T = Accumulator<E>;
  const Problem& p;
  T* x;        // [C] vectors: x_i
  T* y;        // [C] vectors: y_j
  T* rows;     // [C] vectors: sum over j of w_ij
  T* columns;  // [C] numbers: sum over i of w_ij
  T* own;      // [C] numbers: w_ii

  DecayGradient(const Problem& problem, Arena& arena)
      : p(problem),
        x(arena.take<T>(3 * C * kLanes<T>)),
        y(x + C * kLanes<T>),
        rows(y + C * kLanes<T>),
        columns(arena.take<T>(C)),
        own(arena.take<T>(C)) {}

  void clear() {
    std::memset(x, 0, sizeof(T) * size_t(3 * C * kLanes<T>));
    std::memset(columns, 0, sizeof(T) * C);
    std::memset(own, 0, sizeof(T) * C);
  }

  // Adds the products of a tile, whose first row is token i0, with the same elements of `other` to
  // x or y.
  template <class Tile>
  LC_INLINE void add_products(T* to, const Tile& tile, Matrix<const T> other, int i0) const {
    for (int i = 0; i < tile.M; ++i) {
      T* lanes = to + (i0 + i) * kLanes<T>;
      Vec<T> sum = load<T>(lanes);
      for (int j = 0; j < tile.N; ++j) sum = tile.x[i][j] * load<T>(other.row(i0 + i) + j * kLanes<T>) + sum;
      store<T>(lanes, sum);
    }
  }

  // Adds w_ij of the vector of tokens j that begins at column j to rows and columns, where only
  // j < i counts, and w_ii to own.
  LC_INLINE void add_pairs(const ChunkDecay<T>& decay, int i, int j, Vec<T> product) const {
    if (p.d_dt && i >= j && i < j + kLanes<T>) own[i] += product[i - j];
    const Vec<T> w = iota<T>() < typename Simd<T>::Int(i - j) ? product : Vec<T>{};
    store<T>(rows + i * kLanes<T>, load<T>(rows + i * kLanes<T>) + decay.without_hidden(w, j));
    store<T>(columns + j, load<T>(columns + j) + w);
  }

  // total <S, dS>, of S before and dS after the chunk.
  double crossing(const State<E>& S, const State<E>& dS, double log2_total) const {
    if (!S.live || !dS.live) return 0;
    double inner = 0;
    for (int64_t r = 0; r < p.V; ++r) {
      Vec<T> lanes{};
      for (int i = 0; i < S.panels.count; ++i)
        for (int j = 0; j < S.panel(i).ld; j += kLanes<T>)
          lanes = load<T>(S.panel(i).row(r) + j) * load<T>(dS.panel(i).row(r) + j) + lanes;
      inner += double(sum<T>(lanes));
    }
    return std::exp2(log2_total) * inner;
  }

  // Computes dg of the chunk's tokens, and writes it if each token has a decay, or the gradient of
  // dt if tokens have lengths. Returns the sum of the gradients of a decay that tokens share.
  double finish(const Tokens<E>& chunk, const Sequence& s, int64_t hs, double crossing) const {
    const auto total = [](const T* sums, int i) { return double(sum<T>(load<T>(sums + i * kLanes<T>))); };
    const int64_t t = chunk.t;
    const int n = chunk.n;
    // The sums over earlier tokens start at the first token. As differences they would be small
    // next to their terms.
    const bool hides = chunk.decay.hides();
    double gradients[C];
    for (int i = 0; i < n; ++i) {
      gradients[i] = crossing;
      if (!hides || !chunk.decay.hidden(i)) crossing += total(y, i);
    }
    double to_later = 0, of_chunk = 0;
    for (int i = n - 1; i >= 0; --i) {
      to_later += total(x, i) + total(rows, i);
      if (!hides || !chunk.decay.hidden(i)) to_later -= double(columns[i]);
      gradients[i] += to_later;
    }
    if (p.d_dt) write_lengths(chunk, s, hs, gradients);
    if (p.dt)
      for (int i = n - 1; i >= 0; --i) of_chunk += chunk.decay.length(i) * gradients[i];
    else
      for (int i = n - 1; i >= 0; --i) of_chunk += gradients[i];
    if (p.d_log_decay && p.decay == Decay::per_token && !p.dt)
      for (int i = 0; i < n; ++i) write_decay(s, hs, t + i, gradients[i]);
    return of_chunk;
  }

 private:
  LC_INLINE void write_decay(const Sequence& s, int64_t hs, int64_t t, double gradient) const {
    if (p.decay_type == Type::f64)
      *p.d_log_decay.at<double>(s.row, hs, t) = gradient;
    else
      *p.d_log_decay.at<float>(s.row, hs, t) = float(gradient);
  }
  // The gradients of dt, from those of the log-decays of tokens and from the weights.
  void write_lengths(const Tokens<E>& chunk, const Sequence& s, int64_t hs, const double* gradients) const {
    double slopes[C];
    length_slopes(p, slopes, s.row, hs, chunk.t, chunk.n);
    for (int i = 0; i < chunk.n; ++i) {
      const double of_weight = double(sum<T>(load<T>(y + i * kLanes<T>))) + double(columns[i]) + double(own[i]);
      const double of_length = chunk.decay.rate() * gradients[i] + of_weight / double(chunk.decay.weight(i));
      with_type(p.dt_type, [&](auto e) {
        using F = Accumulator<decltype(e)>;
        store<F>(p.d_dt.at<decltype(e)>(s.row, hs, chunk.t + i), broadcast<F>(F(slopes[i] * of_length)), 1);
      });
    }
  }
};

// d log_decay of constant decays: sums over chunks, and over the heads and sequences that share a
// decay. of_chunk(b, hs, chunk) is what one chunk adds. D is the type of log_decay.
template <class D, class OfChunk>
LC_INLINE void sum_constant_decays(const Problem& p, OfChunk&& of_chunk) {
  const bool by_row = p.d_log_decay.stride[0], by_head = p.d_log_decay.stride[1];
  for (int64_t row = 0; row < (by_row ? p.B : 1); ++row)
    for (int64_t head = 0; head < (by_head ? p.Hs : 1); ++head) {
      double total = 0;
      for (int64_t b = by_row ? row : 0; b < (by_row ? row + 1 : p.B); ++b)
        for (int64_t hs = by_head ? head : 0; hs < (by_head ? head + 1 : p.Hs); ++hs)
          for (int64_t i = 0; i * C < sequence(p, b).length; ++i) total += of_chunk(b, hs, i);
      *p.d_log_decay.at<D>(row, head, 0) = D(total);
    }
}

}  // namespace lc::LC_ISA::backward
