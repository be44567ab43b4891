// decay.h - the decay weights of one chunk of tokens, from log-decays L in base 2. With
// cum_i = L_1 + ... + L_i within the chunk,
//
//   mask(i, j) = 2^(cum_i - cum_j), j <= i      the weight of token j at token i
//   in[i]      = 2^cum_i                        the weight of the state before the chunk at token i
//   out[j]     = 2^(cum_last - cum_j)           the weight of token j in the state after the chunk
//   total      = 2^cum_last                     the weight of the state before in the state after
//
// If tokens have lengths, L_i is the length of token i times the decay per unit, and the weights of
// token j, mask(i, j) and out[j], are multiplied by its length.
//
// total is the sum total + total_rest of two numbers, since the rounding error of a single one
// would be raised to the power of the number of chunks. Every exponent is <= 0. It is a difference
// of float64 sums that restart at each chunk. With a constant decay the mask is Toeplitz, and is
// stored as one row of 2C numbers with a row stride of -1.
#pragma once
#include <cmath>

#include "arena.h"
#include "parameters.h"
#include "tile.h"

namespace lc::LC_ISA {

template <class T>
class ChunkDecay {
 public:
  const T* in;
  const T* out;
  T total, total_rest;
  double log2_total;
  Matrix<const T> mask;  // entries above the diagonal are undefined: mask by selection, not by multiplication

  ChunkDecay(Arena& arena, const Problem& p, int chunk)
      : chunk_(chunk),
        constant_(p.decay != Decay::per_token && !p.dt),
        powers_(arena.take<T>(padded<T>(chunk) + kLanes<T>)),
        table_(arena.take<T>(constant_ ? 2 * padded<T>(chunk) : int64_t(chunk) * padded<T>(chunk))),
        last_(arena.take<T>(padded<T>(chunk))),
        cum_(arena.take<double>(padded<T>(chunk))),
        lengths_(arena.take<double>(p.dt ? padded<double>(chunk) : 0)),
        weights_(arena.take<T>(p.dt ? padded<T>(chunk) : 0)),
        measured_(arena.take<T>(p.dt ? padded<T>(chunk) : 0)) {}

  // Call this before the chunks of state head hs of sequence s. Tokens whose length is below
  // least_weight are hidden: out is 0 for them. mask and measured() have least_weight in place of
  // their length, so that a caller can divide by it.
  void begin_head(const Problem& p, const Sequence& s, int64_t hs, T least_weight = 0) {
    p_ = &p;
    least_weight_ = least_weight;
    row_ = s.row;
    head_ = hs;
    if (p.dt) rate_ = log2_rate(p, s.row, hs);
    if (!constant_) return;
    step_ = log2_decay(p, s.row, hs, 0);
    T* mask0 = table_ + chunk_ - 1;  // mask0[j - i]
    const int longest = s.length < chunk_ ? int(s.length) : chunk_;
    for (int i = 0; i <= longest; ++i) powers_[i] = T(std::exp2(step_ * i));
    for (int i = 0; i < longest; ++i) mask0[-i] = powers_[i];
    for (int i = 1; i <= padded<T>(chunk_); ++i) mask0[i] = 0;
    in = powers_ + 1;
    mask = {mask0, -1};
  }

  // Computes the weights of the chunk of n <= C tokens that begins at token t.
  void chunk(int64_t t, int n) {
    if (constant_) {
      out = mask.data - (n - 1);
      set_total(step_ * n);
      return;
    }
    if (p_->dt) {
      lengths(*p_, lengths_, row_, head_, t, n);
      hides_ = false;
      for (int i = 0; i < padded<T>(n); ++i) {
        weights_[i] = i >= n ? T(0) : hidden(i) ? least_weight_ : T(lengths_[i]);
        hides_ = hides_ || (i < n && hidden(i));
      }
    }
    double sum = 0;
    for (int i = 0; i < padded<T>(n); ++i) {
      if (i < n) sum += p_->dt ? clamped_log2(*p_, rate_ * lengths_[i]) : log2_decay(*p_, row_, head_, t + i);
      cum_[i] = sum;
    }
    for (int i = 0; i < n; ++i) powers_of_differences(table_ + i * padded<T>(chunk_), cum_[i], i + 1);
    powers_of_differences(last_, sum, n);
    for (int i = 0; i < n; i += kLanes<T>) store<T>(powers_ + i, exp2<T>(gather(0, -1, i)));
    in = powers_;
    out = last_;
    if (hides_) hide(n);
    set_total(sum);
    mask = {table_, padded<T>(chunk_)};
  }

  // The length of token i of the chunk; its weight, which is the length in the type of sums.
  double length(int i) const { return lengths_[i]; }
  T weight(int i) const { return weights_[i]; }
  bool hides() const { return hides_; }
  bool hidden(int i) const { return lengths_[i] < double(least_weight_); }
  // x, with 0 in place of hidden tokens of the vector of tokens at j.
  LC_INLINE Vec<T> without_hidden(Vec<T> x, int j) const {
    return !hides_ ? x : load<T>(weights_ + j) > least_weight_ ? x : Vec<T>{};
  }
  // As out, with least_weight in place of the lengths of hidden tokens.
  const T* measured() const { return hides_ ? measured_ : out; }
  // The log-decay per unit of length, by which gradients of lengths are multiplied: 0 for -inf.
  double rate() const { return rate_ > kLeastRate ? rate_ / kLog2e : 0; }

 private:
  void hide(int n) const {
    for (int i = 0; i < n; ++i) {
      measured_[i] = last_[i];
      if (hidden(i)) last_[i] = 0;
    }
  }
  LC_INLINE void set_total(double log2) {
    log2_total = log2;
    const double x = std::exp2(log2);
    total = T(x);
    total_rest = T(x - double(total));
  }

  // One vector of min(offset - sign * cum_, 0) from index j on. It is computed in float64 and then
  // rounded.
  LC_INLINE Vec<T> gather(double offset, double sign, int j) const {
    T d[kLanes<T>];
    for (int l = 0; l < kLanes<T>; ++l) {
      const double x = offset - sign * cum_[j + l];
      d[l] = T(x < 0 ? x : 0);
    }
    return load<T>(d);
  }
  // The weights of tokens j < n at a token whose sum of decays is `from`.
  LC_INLINE void powers_of_differences(T* to, double from, int n) const {
    for (int j = 0; j < n; j += kLanes<T>) {
      const Vec<T> x = exp2<T>(gather(from, 1, j));
      store<T>(to + j, p_->dt ? x * load<T>(weights_ + j) : x);
    }
  }

  int chunk_;
  bool constant_;
  T* powers_;
  T* table_;
  T* last_;
  double* cum_;
  double* lengths_;
  T* weights_;
  T* measured_;
  T least_weight_ = 0;
  bool hides_ = false;
  const Problem* p_ = nullptr;
  int64_t row_ = 0, head_ = 0;
  double step_ = 0;
  double rate_ = 0;  // log2 of the decay per unit of length
};

}  // namespace lc::LC_ISA
