// parameters.h - what Mamba-2 adds to the operator: lengths of tokens, the skip and the gate.
//
//   length_t = clamp(softplus(dt_t + dt_bias))       softplus(x) = max(x, 0) + log(1 + e^-|x|)
#pragma once
#include "activation.h"
#include "tile.h"

namespace lc::LC_ISA {

namespace detail {

// log(1 + u) for 0 <= u <= 1, from the series of atanh at s = u / (2 + u) <= 1/3.
LC_INLINE Vec<double> log1p(Vec<double> u) {
  const Vec<double> s = u / (u + 2), square = s * s;
  Vec<double> sum = broadcast<double>(1 / 33.);
  for (int i = 31; i >= 1; i -= 2) sum = sum * square + 1. / i;
  return 2 * s * sum;
}

LC_INLINE Vec<double> softplus(Vec<double> x) {
  const Vec<double> far = x < 0 ? x : -x;  // -|x|, and NaN for NaN
  const Vec<double> y = (x > 0 ? x : Vec<double>{}) + log1p(exp2<double>(far * kLog2e));
  return x == x ? y : x;
}

// Reads n numbers of type E, `stride` elements apart, as `to` of type T. E and T are the types of
// arrays and of sums.
template <class T, class E>
LC_INLINE void gather(T* to, const E* from, int64_t stride, int64_t n) {
  if constexpr (sizeof(E) == 2) {
    constexpr int L = kLanes<float>;
    for (int64_t i = 0; i < n; i += L) {
      E part[L] = {};
      float wide[L];
      const int live = int(n - i < L ? n - i : L);
      for (int l = 0; l < live; ++l) part[l] = from[(i + l) * stride];
      store<float>(wide, load<float>(part));
      for (int l = 0; l < live; ++l) to[i + l] = T(wide[l]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = T(from[i * stride]);
  }
}

}  // namespace detail

// Reads n numbers of `type`, `stride` elements apart, from element `first` of data on.
template <class T>
LC_INLINE void read(T* to, Type type, const void* data, int64_t first, int64_t stride, int64_t n) {
  with_type(type, [&](auto e) { detail::gather<T>(to, static_cast<const decltype(e)*>(data) + first, stride, n); });
}

// dt + dt_bias of tokens [t, t + n) of state head hs. `to` has room for whole vectors.
LC_INLINE void read_dt(const Problem& p, double* to, int64_t row, int64_t hs, int64_t t, int n) {
  const int64_t* stride = p.dt.stride;
  read(to, p.dt_type, p.dt.data, row * stride[0] + hs * stride[1] + t * stride[2], stride[2], n);
  double bias = 0;
  if (p.dt_bias) read(&bias, p.dt_bias_type, p.dt_bias.data, hs * p.dt_bias.stride[1], 0, 1);
  for (int i = 0; i < padded<double>(n); ++i) to[i] = i < n ? to[i] + bias : 0;
}

namespace detail {

// Turns n numbers dt + dt_bias into lengths.
LC_INLINE void to_lengths(const Problem& p, double* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<double>) {
    Vec<double> x = load<double>(to + i);
    if (p.softplus) x = softplus(x);
    x = x < p.dt_min ? broadcast<double>(p.dt_min) : x;
    x = x > p.dt_max ? broadcast<double>(p.dt_max) : x;
    store<double>(to + i, x);
  }
}

}  // namespace detail

// Computes the lengths of tokens [t, t + n) of state head hs, in float64. `to` has room for whole
// vectors.
LC_INLINE void lengths(const Problem& p, double* to, int64_t row, int64_t hs, int64_t t, int n) {
  read_dt(p, to, row, hs, t, n);
  detail::to_lengths(p, to, n);
}

// Computes the lengths of token t of all state heads. `to` and `biases` have room for whole
// vectors.
LC_INLINE void lengths_of_heads(const Problem& p, double* to, double* biases, int64_t row, int64_t t) {
  const int64_t* stride = p.dt.stride;
  read(to, p.dt_type, p.dt.data, row * stride[0] + t * stride[2], stride[1], p.Hs);
  if (p.dt_bias) read(biases, p.dt_bias_type, p.dt_bias.data, 0, p.dt_bias.stride[1], p.Hs);
  for (int64_t h = 0; h < padded<double>(int(p.Hs)); ++h) to[h] = h < p.Hs ? to[h] + (p.dt_bias ? biases[h] : 0) : 0;
  detail::to_lengths(p, to, p.Hs);
}

// Computes the derivatives of these lengths by dt. They are 0 where a limit holds.
LC_INLINE void length_slopes(const Problem& p, double* to, int64_t row, int64_t hs, int64_t t, int n) {
  read_dt(p, to, row, hs, t, n);
  for (int i = 0; i < n; i += kLanes<double>) {
    const Vec<double> u = load<double>(to + i), x = p.softplus ? detail::softplus(u) : u;
    Vec<double> slope = p.softplus ? sigmoid<double>(u) : broadcast<double>(1);
    slope = x < p.dt_min ? Vec<double>{} : slope;
    slope = x > p.dt_max ? Vec<double>{} : slope;
    store<double>(to + i, slope);
  }
}

// The log2 of the decay per unit of length of state head hs.
LC_INLINE double log2_rate(const Problem& p, int64_t row, int64_t hs) {
  const double rate = log_decay(p, row, hs, 0) * kLog2e;
  return rate > kLeastRate ? rate : kLeastRate;
}

// Reads the skip of head h for all V columns.
template <class T>
LC_INLINE void read_skip(const Problem& p, T* to, int64_t h) {
  read(to, p.skip_type, p.skip.data, h * p.skip.stride[1], p.skip.stride[3], p.V);
}

// o *= silu(gate), for rows [n, columns] of o that are padded to whole vectors.
template <class E, class T>
LC_INLINE void apply_gate(Matrix<T> o, Matrix<const E> gate, int n, int columns) {
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < columns; j += kLanes<T>) {
      const E* z = gate.row(i) + j;
      const Vec<T> x = columns - j < kLanes<T> ? load<T>(z, columns - j) : load<T>(z);
      store<T>(o.row(i) + j, load<T>(o.row(i) + j) * silu<T>(x));
    }
}

}  // namespace lc::LC_ISA
