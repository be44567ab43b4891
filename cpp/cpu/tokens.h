// tokens.h - a chunk of up to C consecutive tokens of one head, ready for matrix products: Q and V
// row-major, K transposed, all of the accumulator's type T, with the chunk's decay weights
// (decay.h).
#pragma once
#include <algorithm>

#include "decay.h"

namespace lc::LC_ISA {

constexpr int C = 64;      // tokens of a chunk
constexpr int kBand = 16;  // rows of scores computed up to the same column; whole vectors in every type

// The sizes of the products in the chunks of one sequence.
struct ChunkWork {
  double pairs;   // pairs (i, j), j <= i, of tokens in the same chunk
  double reads;   // tokens that read a state
  double writes;  // tokens that are added to a state
};
LC_INLINE ChunkWork chunk_work(double n, bool reads_first, bool writes_last) {
  const double whole = std::floor(n / C), rest = n - whole * C, last = rest > 0 ? rest : std::min<double>(n, C);
  return {whole * C * (C + 1) / 2 + rest * (rest + 1) / 2, n - (reads_first ? 0 : std::min<double>(n, C)),
          n - (writes_last ? 0 : last)};
}
// The flop of these products over all heads of one sequence.
LC_INLINE double flop(const Problem& p, const ChunkWork& w) {
  const double KV = 2 * double(p.K * p.V);
  return double(p.H) * (2 * w.pairs * double(p.K + p.V) + w.reads * KV) + double(p.Hs) * w.writes * KV;
}

template <class E, class T = Accumulator<E>>
struct Tokens {
  ChunkDecay<T> decay;
  Matrix<const T> q{};
  T* keys;     // [K, C]
  T* weighed;  // [K, C], see weigh_keys(); the memory of keys, unless the caller sets another
  T* scores;   // [C, C], see score()
  T* skip;     // [padded V], see load_skip()
  int64_t t = 0;
  int n = 0;

  LC_INLINE Tokens(Arena& arena, const Problem& p) : Tokens(arena, p, ChunkDecay<T>(arena, p, C)) {}

  // A chunk that shares the weights of another one, see follow().
  LC_INLINE Tokens(Arena& arena, const Problem& p, const ChunkDecay<T>& weights)
      : decay(weights),
        keys(arena.take<T>(p.K * C)),
        weighed(keys),
        scores(arena.take<T>(C * C)),
        skip(arena.take<T>(p.skip ? padded<T>(p.V) : 0)),
        q_copy_(arena.take<T>(C * padded<T>(p.K))),
        v_copy_(arena.take<T>(C * padded<T>(p.V))) {}

  // The columns of V from vector c on, within one of the panels that V was loaded in.
  LC_INLINE Matrix<const T> v(const Panels& panels, int panel, int c) const {
    if (v_ld_) return {v_ + c * kLanes<T>, v_ld_};
    return {v_ + C * panels.template column<T>(panel) + (c - panels.begin(panel)) * kLanes<T>,
            panels.template columns<T>(panel)};
  }

  // Call this once per worker: products read whole tiles of scores, which reach to the right of
  // what score() writes.
  LC_INLINE void clear_scores() { std::memset(scores, 0, sizeof(T) * C * C); }

  // Selects the tokens [begin, begin + C) of the sequence, or as many as remain.
  LC_INLINE void locate(const Sequence& s, int64_t begin) {
    t = s.begin + begin;
    n = int(s.length - begin < C ? s.length - begin : C);
    decay.chunk(t, n);
  }

  // Selects the same tokens as `other`, and shares its weights.
  LC_INLINE void follow(const Tokens& other) {
    decay = other.decay;
    t = other.t;
    n = other.n;
  }

  LC_INLINE void load_queries(const Problem& p, const Sequence& s, int64_t h) {
    const Matrix<const E> from{p.q.at<const E>(s.row, q_head(p, h), t), p.q.stride[2]};
    if constexpr (std::is_same_v<E, T>) {
      q = from;
    } else {
      q = {q_copy_, padded<T>(p.K)};
      load<T>(Matrix<T>{q_copy_, q.ld}, from, n, int(p.K));
    }
  }

  LC_INLINE void load_keys(const Problem& p, const Sequence& s, int64_t hs) {
    load_transposed<T>(Matrix<T>{keys, C}, Matrix<const E>{p.k.at<const E>(s.row, k_head(p, hs), t), p.k.stride[2]}, n,
                       int(p.K));
  }

  // Loads column panels [first, last) of V, each into contiguous memory. V is used in place if it
  // is a single panel that is contiguous already.
  LC_INLINE void load_values(const Problem& p, const Sequence& s, int64_t hs, const Panels& panels, int first,
                             int last) {
    const Matrix<const E> from{p.v.at<const E>(s.row, v_head(p, hs), t), p.v.stride[2]};
    if constexpr (std::is_same_v<E, T>)
      if (p.V % kLanes<T> == 0 && from.ld == p.V && panels.count == 1) {
        v_ = from.data;
        v_ld_ = from.ld;
        return;
      }
    v_ = v_copy_;
    v_ld_ = 0;
    for (int i = first; i < last; ++i) {
      const int column = panels.template column<T>(i), wide = panels.template columns<T>(i);
      load<T>(Matrix<T>{v_copy_ + C * column, wide}, Matrix<const E>{from.data + column, from.ld}, n,
              std::min(wide, int(p.V) - column));
    }
  }

  LC_INLINE void load_skip(const Problem& p, int64_t h) {
    if (p.skip) read_skip(p, skip, h);
  }

  // scores_ij = scale [j <= i] mask_ij q_i.k_j. Zeros are written to the right of the diagonal, up
  // to the last column of the row's band.
  LC_INLINE void score(const Problem& p) {
    score(p, [](int, int, Vec<T> x, Vec<T> weight) { return x * weight; });
  }

  // The same with f(i, j, x, weight) as score, for the vector at column j: x is q_i.k_j and weight
  // is scale mask_ij.
  template <class F>
  LC_INLINE void score(const Problem& p, F&& f) {
    multiply(p, scores, [&](int i, int j, Vec<T> x) { return masked(p, i, j, x, f); });
  }

  // products_ij = q_i.k_j, from which score_products makes the scores of several heads.
  LC_INLINE void multiply(const Problem& p, T* products) {
    multiply(p, products, [](int, int, Vec<T> x) { return x; });
  }

  // The same scores as score() computes, from products.
  LC_INLINE void score_products(const Problem& p, const T* products) {
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < i / kBand * kBand + kBand; j += kLanes<T>)
        store<T>(scores + i * C + j, masked(p, i, j, load<T>(products + i * C + j),
                                            [](int, int, Vec<T> x, Vec<T> weight) { return x * weight; }));
  }

  // weighed_rj = weight out_j keys_rj
  LC_INLINE void weigh_keys(const Problem& p, T weight = 1) {
    Vec<T> w[C / kLanes<T>];
    for (int j = 0; j < n; j += kLanes<T>) w[j / kLanes<T>] = load<T>(decay.out + j) * weight;
    for (int64_t r = 0; r < p.K; ++r)
      for (int j = 0; j < n; j += kLanes<T>)
        store<T>(weighed + r * C + j, load<T>(keys + r * C + j) * w[j / kLanes<T>]);
  }

 private:
  // f(i, j, x, scale mask_ij) of the vector x at column j, and zeros to the right of the diagonal.
  template <class F>
  LC_INLINE Vec<T> masked(const Problem& p, int i, int j, Vec<T> x, F&& f) const {
    x = f(i, j, x, load<T>(decay.mask.row(i) + j) * T(p.scale));
    return iota<T>() <= typename Simd<T>::Int(i - j) ? x : Vec<T>{};
  }

  // to_ij = f(i, j, q_i.k_j) for the vectors at columns j up to the end of the band of row i.
  template <class F>
  LC_INLINE void multiply(const Problem& p, T* to, F&& f) {
    for (int band = 0; band < n; band += kBand) {
      const Panels panels(vectors<T>(band + kBand));
      for (int panel = 0; panel < panels.count; ++panel)
        for_tiles<T>(band, n < band + kBand ? n : band + kBand, panels.begin(panel), panels.width(panel),
                     [&](auto& a, int i0, int c) {
                       const int j0 = c * kLanes<T>;
                       zero(a);
                       mma(a, operand(q.row(i0), q.ld), {keys + j0, C}, int(p.K));
                       map(a, [&](int i, int j, Vec<T> x) { return f(i0 + i, j0 + j, x); });
                       store(Matrix<T>{to + i0 * C + j0, C}, a);
                     });
    }
  }

  T *q_copy_, *v_copy_;
  const T* v_;
  int64_t v_ld_;  // 0: V is a copy whose panels are contiguous
};

}  // namespace lc::LC_ISA
