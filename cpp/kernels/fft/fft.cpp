// fft.cpp - CPU: with a constant decay the mask is Toeplitz, and fast Fourier transforms apply it.
//
//   o_t = scale (sum_r q_tr (h * k_r v)_t + h_(t+1) q_t S_0),   h_n = 2^(L n)    L: log2 decay
//   S_N = sum_t h_(N-1-t) k_t v_t^T + h_N S_0
//
//   A vector holds P = kLanes columns of V. A complex number is rank r and, imaginary, rank r + 1;
//   h is real and keeps them apart. Radix 4, decimation in frequency forward and in time back: no
//   spectrum is reordered. Each quarter goes there and back while it is in the cache.
//   about B Hs V K/2 M (17/2 log2 M + 2G - 5) flop, M >= 2N a power of 2, G = H / Hs; 2KV per token
//   and state; scratch per worker (G + 3) P M + 5M; tasks: (sequence, state, vector of columns)
//   Qin et al. 2023 (Toeplitz neural network), arXiv:2305.04749
#include <cmath>

#include "../../cpu/cost.h"
#include "../../cpu/scratch.h"
#include "../../cpu/threads.h"
#include "../../cpu/tile.h"
#include "../../methods.h"

namespace lc::LC_ISA {
namespace {

constexpr int64_t kShortest = 32;  // points of a transform
constexpr int kChunk = 64;         // tokens of a product with a state

// Points of the transform for n tokens. The sum of two positions is below this number.
int64_t points(int64_t n) {
  int64_t m = kShortest;
  while (m < 2 * n) m *= 2;
  return m;
}

template <class T>
struct Complex {
  Vec<T> re, im;
};
template <class T>
LC_INLINE Complex<T> operator+(Complex<T> a, Complex<T> b) {
  count_flop(2 * kLanes<T>);
  return {a.re + b.re, a.im + b.im};
}
template <class T>
LC_INLINE Complex<T> operator-(Complex<T> a, Complex<T> b) {
  count_flop(2 * kLanes<T>);
  return {a.re - b.re, a.im - b.im};
}
template <class T>
LC_INLINE Complex<T> times_i(Complex<T> a) {
  return {-a.im, a.re};
}
// The product with the number w = (re, im), or with its conjugate.
template <class T>
LC_INLINE Complex<T> times(Complex<T> a, const T* w) {
  count_flop(6 * kLanes<T>);
  return {a.re * w[0] - a.im * w[1], a.im * w[0] + a.re * w[1]};
}
template <class T>
LC_INLINE Complex<T> times_conj(Complex<T> a, const T* w) {
  count_flop(6 * kLanes<T>);
  return {a.re * w[0] + a.im * w[1], a.im * w[0] - a.re * w[1]};
}

template <class T>
LC_INLINE T* at(T* x, int64_t i) {
  return x + 2 * kLanes<T> * i;
}
template <class T>
LC_INLINE Complex<T> get(const T* x) {
  return {load<T>(x), load<T>(x + kLanes<T>)};
}
template <class T>
LC_INLINE void put(T* x, Complex<T> a) {
  store<T>(x, a.re);
  store<T>(x + kLanes<T>, a.im);
}

// The transform of four numbers (sums over powers of -i) and its inverse up to a factor (powers of
// i).
template <class T>
LC_INLINE void forward4(Complex<T> (&x)[4]) {
  const auto a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = times_i(x[1] - x[3]);
  x[0] = a + c;
  x[1] = b - d;
  x[2] = a - c;
  x[3] = b + d;
}
template <class T>
LC_INLINE void back4(Complex<T> (&x)[4]) {
  const auto a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = times_i(x[1] - x[3]);
  x[0] = a + c;
  x[1] = b + d;
  x[2] = a - c;
  x[3] = b - d;
}

// The twiddles of n points: w^j, w^2j, w^3j for j < n / 4, w = exp(-2 pi i / n). They follow those
// of n / 2 points.
template <class T>
LC_INLINE T* twiddles(T* table, int64_t n) {
  return table + 3 * n / 2;
}
template <class T>
void make_twiddles(T* table, int64_t longest) {
  constexpr double kTwoPi = 6.283185307179586476925;
  T* w = twiddles(table, longest);
  for (int64_t j = 0; j < longest / 4; ++j)
    for (int64_t power = 1; power <= 3; ++power, w += 2) {
      const double angle = kTwoPi * double(j * power) / double(longest);
      w[0] = T(std::cos(angle));
      w[1] = T(-std::sin(angle));
    }
  for (int64_t n = longest / 2; n >= 16; n /= 2)
    for (int64_t j = 0; j < n / 4; ++j)
      std::memcpy(twiddles(table, n) + 6 * j, twiddles(table, 2 * n) + 12 * j, 6 * sizeof(T));
}

// The use of a spectrum: it is multiplied by the spectrum of h, or it is the spectrum of h and is
// kept.
enum class Spectrum { multiply, keep };

template <Spectrum kSpectrum, class T>
LC_INLINE Complex<T> meet(Complex<T> x, T* h) {
  if (kSpectrum == Spectrum::multiply) return times(x, h);
  h[0] = x.re[0];
  h[1] = x.im[0];
  return x;
}

// Four or eight points: forward and back in registers.
template <Spectrum kSpectrum, class T>
LC_INLINE void convolve4(Complex<T> (&x)[4], T* h) {
  forward4(x);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = meet<kSpectrum>(x[i], h + 2 * i);
  back4(x);
}
template <Spectrum kSpectrum, class T>
LC_INLINE void convolve4(T* x, T* h) {
  Complex<T> a[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) a[i] = get(at(x, i));
  convolve4<kSpectrum>(a, h);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) put(at(x, i), a[i]);
}
template <Spectrum kSpectrum, class T>
LC_INLINE void convolve8(T* x, T* h) {
  constexpr T kHalf = T(0.707106781186547524401);
  constexpr T w[4][2] = {{1, 0}, {kHalf, -kHalf}, {0, -1}, {-kHalf, -kHalf}};
  Complex<T> a[4], b[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto low = get(at(x, i)), high = get(at(x, i + 4));
    a[i] = low + high;
    b[i] = low - high;
  }
  b[1] = times(b[1], w[1]);
  b[2] = Complex<T>{b[2].im, -b[2].re};
  b[3] = times(b[3], w[3]);
  convolve4<kSpectrum>(a, h);
  convolve4<kSpectrum>(b, h + 8);
  b[1] = times_conj(b[1], w[1]);
  b[2] = times_i(b[2]);
  b[3] = times_conj(b[3], w[3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    put(at(x, i), a[i] + b[i]);
    put(at(x, i + 4), a[i] - b[i]);
  }
}

// Replaces x by n times its cyclic convolution with the filter whose spectrum is h.
template <Spectrum kSpectrum, class T>
__attribute__((noinline)) void convolve(T* x, int64_t n, T* h, T* table) {
  const int64_t m = n / 4;
  const T* w = twiddles(table, n);
  for (int64_t j = 0; j < m; ++j) {
    Complex<T> a[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) a[i] = get(at(x, j + i * m));
    forward4(a);
    put(at(x, j), a[0]);
#pragma GCC unroll 3
    for (int i = 1; i < 4; ++i) put(at(x, j + i * m), times(a[i], w + 6 * j + 2 * i - 2));
  }
  for (int i = 0; i < 4; ++i) {
    T* part = at(x, i * m);
    if (m == 4)
      convolve4<kSpectrum>(part, h + 2 * i * m);
    else if (m == 8)
      convolve8<kSpectrum>(part, h + 2 * i * m);
    else
      convolve<kSpectrum>(part, m, h + 2 * i * m, table);
  }
  if (kSpectrum == Spectrum::keep) return;
  for (int64_t j = 0; j < m; ++j) {
    Complex<T> a[4];
    a[0] = get(at(x, j));
#pragma GCC unroll 3
    for (int i = 1; i < 4; ++i) a[i] = times_conj(get(at(x, j + i * m)), w + 6 * j + 2 * i - 2);
    back4(a);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) put(at(x, j + i * m), a[i]);
  }
}

// The same for the sequence source(j), j < n / 2, followed by n / 2 zeros. The first half of the
// result goes to sink(j, y).
template <Spectrum kSpectrum, class T, class Source, class Sink>
LC_INLINE void convolve_half(T* x, int64_t n, T* h, T* table, Source&& source, Sink&& sink) {
  const int64_t m = n / 4;
  const T* w = twiddles(table, n);
  for (int64_t j = 0; j < m; ++j) {
    const Complex<T> a = source(j), b = source(j + m), d = times_i(b);
    put(at(x, j), a + b);
    put(at(x, j + m), times(a - d, w + 6 * j));
    put(at(x, j + 2 * m), times(a - b, w + 6 * j + 2));
    put(at(x, j + 3 * m), times(a + d, w + 6 * j + 4));
  }
  for (int i = 0; i < 4; ++i) {
    if (m == 8)
      convolve8<kSpectrum>(at(x, i * m), h + 2 * i * m);
    else
      convolve<kSpectrum>(at(x, i * m), m, h + 2 * i * m, table);
  }
  if (kSpectrum == Spectrum::keep) return;
  for (int64_t j = 0; j < m; ++j) {
    const auto a = get(at(x, j)), b = times_conj(get(at(x, j + m)), w + 6 * j);
    const auto c = times_conj(get(at(x, j + 2 * m)), w + 6 * j + 2);
    const auto d = times_conj(get(at(x, j + 3 * m)), w + 6 * j + 4);
    sink(j, (a + c) + (b + d));
    sink(j + m, (a - c) + times_i(b - d));
  }
}

template <class E>
struct FftWorker {
  using T = Accumulator<E>;
  static constexpr int P = kLanes<T>;
  const Problem& p;
  const int64_t G, Kp;         // q heads per state; K padded to whole vectors
  T *table, *spectrum, *taps;  // twiddles; the spectrum of h; h
  T* x;                        // the points of a transform
  T *v, *sums, *k, *q;         // tokens of the sequence, then zeros up to `half`
  T *state, *q_rows;           // the initial state, and the queries that read it
  int64_t M = 0, half = 0;     // points of the transform for the current sequence, and half of them

  FftWorker(const Problem& problem, Arena& arena)
      : p(problem),
        G(group(p)),
        Kp(padded<T>(p.K)),
        table(arena.take<T>(3 * points(p.N))),
        spectrum(arena.take<T>(2 * points(p.N))),
        taps(arena.take<T>(points(p.N) / 2 + 1)),
        x(arena.take<T>(2 * P * points(p.N))),
        v(arena.take<T>(P * points(p.N) / 2)),         // [half, P]
        sums(arena.take<T>(G * P * points(p.N) / 2)),  // [G, half, P]
        k(arena.take<T>(P * points(p.N) / 2)),         // [P ranks, half]
        q(arena.take<T>(G * P * points(p.N) / 2)),     // [G, P ranks, half]
        state(p.initial_state ? arena.take<T>(p.K * P) : nullptr),
        q_rows(p.initial_state ? arena.take<T>(kChunk * Kp) : nullptr) {}

  // Computes h and its spectrum, divided by M. This transform has P equal lanes. Only the K / 2
  // others need all lanes.
  void make_filter(double step, int64_t n) {
    for (int64_t i = 0; i <= half; ++i) taps[i] = i <= n ? T(std::exp2(step * double(i))) : T(0);
    const T inverse = T(1) / T(M);
    convolve_half<Spectrum::keep>(
        x, M, spectrum, table, [&](int64_t j) { return Complex<T>{broadcast<T>(taps[j] * inverse), Vec<T>{}}; },
        [](int64_t, Complex<T>) {});
  }

  // Loads ranks [r, r + P) of n tokens, one rank after the other. If K is odd, the missing rank of
  // the last pair is zero.
  void load_ranks(T* to, Matrix<const E> from, int64_t r, int64_t n) const {
    const int count = int(std::min<int64_t>(P, p.K - r));
    load_transposed<T>(Matrix<T>{to, half}, Matrix<const E>{from.data + r, from.ld}, int(n), count);
    for (int i = 0; i < count; ++i)
      if (padded<T>(n) < half) std::memset(to + i * half + padded<T>(n), 0, sizeof(T) * size_t(half - padded<T>(n)));
    if (count % 2) std::memset(to + count * half, 0, sizeof(T) * size_t(half));
  }

  // sums = 2^(L (t + 1)) q_t S_0, or zero without an initial state.
  void begin_sums(const Sequence& s, int64_t hs) {
    std::memset(sums, 0, sizeof(T) * size_t(G * P * half));
    if (!p.initial_state) return;
    for (int64_t g = 0; g < G; ++g)
      for (int64_t t = 0; t < s.length; t += kChunk) {
        const int n = int(std::min<int64_t>(kChunk, s.length - t));
        load<T>(Matrix<T>{q_rows, Kp},
                Matrix<const E>{p.q.at<const E>(s.row, q_head(p, hs * G + g), s.begin + t), p.q.stride[2]}, n,
                int(p.K));
        for_tiles<T>(0, n, 0, 1, [&](auto& o, int i0, int) {
          zero(o);
          mma(o, operand(q_rows + i0 * Kp, Kp), {state, P}, int(p.K));
          map(o, [&](int i, int, Vec<T> y) { return y * taps[t + i0 + i + 1]; });
          store(Matrix<T>{sums + (g * half + t + i0) * P, P}, o);
        });
      }
  }

  // Writes ranks [r, r + P) of the final state. x holds v, weighted by its decay up to the end.
  void final_ranks(Matrix<T> to, int64_t r, const Sequence& s, int columns) const {
    const int64_t last = s.length - 1;
    for (int64_t t = 0; t <= last; ++t) store<T>(x + t * P, load<T>(v + t * P) * taps[last - t]);
    for_tiles<T>(0, int(std::min<int64_t>(P, p.K - r)), 0, 1, [&](auto& sum, int i0, int) {
      zero(sum);
      if (p.initial_state)
        map(sum, [&](int i, int, Vec<T>) { return load<T>(state + (r + i0 + i) * P) * taps[s.length]; });
      for (int64_t t = 0; t <= last; t += kChunk) {  // summed in parts, since errors grow with the length of a sum
        std::remove_reference_t<decltype(sum)> part;
        zero(part);
        mma(part, operand(k + i0 * half + t, half), {x + t * P, P}, int(std::min<int64_t>(kChunk, s.length - t)));
        map(sum, [&](int i, int j, Vec<T> y) { return y + part.x[i][j / P]; });
      }
      for (int i = 0; i < sum.M; ++i)
        if (columns == P)
          store<T>(to.row(r + i0 + i), sum.x[i][0]);
        else
          store<T>(to.row(r + i0 + i), sum.x[i][0], columns);
    });
  }

  // sums += q_r (h * k_r v) for ranks i and i + 1 of the loaded ones.
  void add_pair(int i) {
    const T *k0 = k + i * half, *k1 = k0 + half;
    convolve_half<Spectrum::multiply>(
        x, M, spectrum, table,
        [&](int64_t j) {
          const Vec<T> vj = load<T>(v + j * P);
          count_flop(2 * P);
          return Complex<T>{vj * k0[j], vj * k1[j]};
        },
        [&](int64_t j, Complex<T> y) {
          const T* qj = q + i * half + j;
          T* o = sums + j * P;
          count_flop(4 * G * P);
          for (int64_t g = 0; g < G; ++g, qj += P * half, o += half * P)
            store<T>(o, load<T>(o) + (y.re * qj[0] + y.im * qj[half]));
        });
  }

  // Loads what all ranks share: the initial state, h, and v in vector c of the columns.
  void load_columns(int64_t b, int64_t hs, const Sequence& s, int begin, int columns) {
    M = points(s.length);
    half = M / 2;
    if (p.initial_state)
      load<T>(Matrix<T>{state, P},
              Matrix<const T>{p.initial_state.at<const T>(b, hs, 0) + begin, p.initial_state.stride[2]}, int(p.K),
              columns);
    make_filter(s.length ? log2_decay(p, s.row, hs, 0) : 0, s.length);
    load<T>(Matrix<T>{v, P}, Matrix<const E>{p.v.at<const E>(s.row, v_head(p, hs), s.begin) + begin, p.v.stride[2]},
            int(s.length), columns);
    std::memset(v + s.length * P, 0, sizeof(T) * size_t((half - s.length) * P));
  }

  void store_outputs(const Sequence& s, int64_t hs, int begin, int columns) const {
    const Vec<T> scale = broadcast<T>(T(p.scale));
    for (int64_t g = 0; g < G; ++g)
      for (int64_t t = 0; t < s.length; ++t) {
        T* sum = sums + (g * half + t) * P;
        store<T>(sum, load<T>(sum) * scale);
        store_row<T>(p.o.at<E>(s.row, hs * G + g, s.begin + t) + begin, sum, columns);
      }
  }

  // Computes vector c of the columns of one state.
  void forward(int64_t b, int64_t hs, int c) {
    const Sequence s = sequence(p, b);
    const int begin = c * P, columns = std::min(P, int(p.V) - begin);
    load_columns(b, hs, s, begin, columns);
    begin_sums(s, hs);
    const Matrix<const E> from_k{p.k.at<const E>(s.row, k_head(p, hs), s.begin), p.k.stride[2]};
    for (int64_t r = 0; r < p.K; r += P) {
      load_ranks(k, from_k, r, s.length);
      for (int64_t g = 0; g < G; ++g)
        load_ranks(q + g * P * half, {p.q.at<const E>(s.row, q_head(p, hs * G + g), s.begin), p.q.stride[2]}, r,
                   s.length);
      if (p.final_state) final_ranks({p.final_state.at<T>(b, hs, 0) + begin, p.final_state.stride[2]}, r, s, columns);
      if (s.length)
        for (int i = 0; i < std::min<int64_t>(P, p.K - r); i += 2) add_pair(i);
    }
    store_outputs(s, hs, begin, columns);
  }
};

int64_t column_vectors(const Problem& p) { return p.type == Type::f64 ? vectors<double>(p.V) : vectors<float>(p.V); }
int64_t padded_columns(const Problem& p) { return p.type == Type::f64 ? padded<double>(p.V) : padded<float>(p.V); }

double flop(const Problem& p) {
  const double n = mean_length(p), G = double(group(p));
  const int64_t M = points(int64_t(std::ceil(n)));
  int log2_M = 0;
  while (int64_t(1) << log2_M < M) ++log2_M;
  const double pair = double(M) * (8.5 * log2_M + 2 * G - (log2_M % 2 ? 6.5 : 5));
  const double filter = double(M) * (4.25 * log2_M + (log2_M % 2 ? 0.25 : -2.5));
  const double states = 2 * n * double(p.K) * (G * bool(p.initial_state) + bool(p.final_state));
  return double(p.B * p.Hs) * double(padded_columns(p)) * (double((p.K + 1) / 2) * pair + filter + states);
}

int workers(const Problem& p) { return workers_for(p, p.B * p.Hs * column_vectors(p), flop(p)); }

size_t workspace(const Problem& p) { return scratch_bytes<FftWorker>(p, workers(p)); }

void run(const Problem& p) {
  Tasks tasks(p);
  int64_t longest = 0;
  for (int64_t b = 0; b < p.B; ++b) longest = std::max(longest, sequence(p, b).length);
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    run_workers(workers(p), [&](int index, int granted) {
      Arena arena(p.workspace);
      FftWorker<E> worker = cut<FftWorker, E>(p, arena, index);
      make_twiddles(worker.table, points(longest));
      const int64_t parts = column_vectors(p);
      tasks.each(p.B * p.Hs * parts, index, granted,
                 [&](int64_t i) { worker.forward(i / parts / p.Hs, i / parts % p.Hs, int(i % parts)); });
    });
  });
}

Cost cost(const Problem& p) {
  const double tasks = double(p.B * p.Hs * column_vectors(p));  // each task reads q and k of its head
  const double again = double(tokens(p)) * type_bytes(p.type) * double((p.Hq + p.Hk) * p.K * (column_vectors(p) - 1));
  return predict(p, {flop(p), again, /*depth=*/2 * std::log2(double(points(int64_t(mean_length(p))))), tasks},
                 /*efficiency=*/0.68, workers(p));
}

}  // namespace

extern const Method fft_cpu = {
    {"fft", "cpu", "a Toeplitz mask times each rank's values, by Fourier transforms",
     "Qin et al. 2023 (Toeplitz neural network), arXiv:2305.04749"},
    {Feature::forward | kAllTypes | kDecaysPerHead | kSequences,
     {Feature::decay_per_token, "its Toeplitz mask needs one decay per head, not one per token"}},
    refuses_nothing,
    cost,
    workspace,
    run};

}  // namespace lc::LC_ISA
