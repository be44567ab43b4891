// fft.cuh - GPU: the kernels filter, spread, multiply and collect around transforms; final states.
//
//   o_t = scale (sum_r q_tr (h * k_r v)_t + h_(t+1) q_t S_0)    h_n = 2^(L n), n < M/2, else 0
//   S_N = sum_t h_(N-1-t) k_t v_t^T + h_N S_0                   L: log2 decay
//
//   x [units, columns, pairs, M], complex: ranks 2i, 2i + 1 are real and imaginary part, which a
//   real filter keeps apart; a unit is up to 8 columns of a state. spectrum [decays, M], in closed
//   form. sums [units, G, columns, N]: outputs between passes, if a pass does not have all pairs
//   blocks of 256 threads: 64 tokens of a unit, or 1024 frequencies; 32 ranks in shared memory
//   flop besides the transforms: 6 M + N (2 + 4 G) per transform
//   Qin et al. 2023 (Toeplitz neural network), arXiv:2305.04749
#pragma once
#include "../../cuda/problem.cuh"

namespace lc::cuda {

template <class T>
using Complex = std::conditional_t<std::is_same_v<T, double>, double2, float2>;

// A pass, and the division of the work into passes.
template <class T>
struct FftPass {
  Problem p;
  int64_t points, slices;  // M; units of one state
  int64_t units, pairs;    // units and pairs of ranks of a pass
  int64_t unit, pair;      // the first unit and pair of the pass
  int columns;             // columns of a unit
  T *spectrum, *x, *sums;
};

LC_INLINE bool decays_by_row(const Problem& p) { return p.log_decay.stride[0] && !p.cu_bits; }
LC_INLINE int64_t filters(const Problem& p) { return p.log_decay ? (decays_by_row(p) ? p.B : 1) * p.Hs : 1; }
LC_INLINE int64_t filter_of(const Problem& p, int64_t row, int64_t hs) {
  return p.log_decay ? (decays_by_row(p) ? row : 0) * p.Hs + hs : 0;
}

struct FftUnit {
  int64_t b, hs, c0;
  int columns;  // 0 for a unit that does not exist
  Sequence s;
};
template <class T>
SIMT_DEV FftUnit unit_at(const FftPass<T>& a, int64_t i) {
  const int64_t unit = a.unit + i, state = unit / a.slices, c0 = unit % a.slices * a.columns;
  const int64_t b = state / a.p.Hs, left = a.p.V - c0;
  if (b >= a.p.B) return {0, 0, 0, 0, {0, 0, 0}};
  return {b, state % a.p.Hs, c0, int(left < a.columns ? left : a.columns), sequence_at(a.p, b)};
}

// Shared by spread, collect and the final state: blocks of 256 threads, tiles of tokens and 32
// ranks.
template <class E>
struct FftTiles {
  using T = Accumulator<E>;
  static constexpr int kMaxThreads = 256, kMinBlocks = 2, kWarps = kMaxThreads / 32;
  static constexpr int kTokens = 64, kRanks = 32, kStride = kRanks + 2, kMostColumns = 8;

  static SIMT_DEV int tokens_from(const Sequence& s, int64_t t, int most) {
    const int64_t n = s.length - t;
    return int(n < 0 ? 0 : n < most ? n : most);
  }
  // Loads n rows of `live` numbers, and zeros in the rest of `rows` rows.
  static SIMT_DEV void load(sptr<T> to, gptr<const E> from, int64_t stride, int rows, int n, int64_t live) {
    for (int i = warp(); i < rows; i += kWarps)
      to.st(i * kStride + lane(), i < n && lane() < live ? widen(from.ld(i * stride + lane())) : T(0));
  }
};

// H_f = sum_(n < M/2) 2^(L n) w^(f n) = (1 - 2^(L M/2) w^(f M/2)) / (1 - 2^L w^f), w = e^(-2 pi i /
// M); divided by M.
template <class T>
struct FftFilter {
  static constexpr const char* kName = "fft filter";
  static constexpr int kMaxThreads = 256, kMinBlocks = 1;
  using Params = FftPass<T>;

  static SIMT_DEV void run(const Params& a) {
    const int64_t i = int64_t(bid().x) * kMaxThreads + tid(), f = i % a.points, filter = i / a.points;
    if (filter >= filters(a.p)) return;
    const double log2 = log2_decay_at(a.p, filter / a.p.Hs, filter % a.p.Hs, 0), half = log2 * double(a.points / 2);
    const double s = sin_pi(double(f) / double(a.points)), c = cos_pi(double(f) / double(a.points));
    const double decay = ex2(log2), re = 2 * decay * s * s - ex2m1(log2), im = 2 * decay * s * c;  // 1 - 2^L w^f
    const double top = f % 2 ? 1 + ex2(half) : -ex2m1(half), size = (re * re + im * im) * double(a.points);
    const bool sum_of_ones = size == 0;
    const gptr<T> spectrum{a.spectrum};
    spectrum.template stv<Complex<T>>(2 * i,
                                      {T(sum_of_ones ? 0.5 : top * re / size), T(sum_of_ones ? 0 : -top * im / size)});
  }
};

// x = k v, with zeros after the sequence and where a rank, column or unit does not exist.
template <class E>
struct FftSpread : FftTiles<E> {
  using Tiles = FftTiles<E>;
  using T = Accumulator<E>;
  static constexpr const char* kName = "fft spread";
  using Params = FftPass<T>;
  static constexpr int kSmem = Tiles::kTokens * (Tiles::kStride + Tiles::kMostColumns + 1) * int(sizeof(T));

  static SIMT_DEV void run(const Params& a) {
    constexpr int kTokens = Tiles::kTokens, kStride = Tiles::kStride, kPairs = Tiles::kRanks / 2;
    const Problem& p = a.p;
    Smem smem;
    const auto k = smem.alloc<T>(kTokens * kStride), v = smem.alloc<T>(kTokens * (Tiles::kMostColumns + 1));
    const int64_t tiles = a.points / kTokens, unit = bid().x / tiles, t = bid().x % tiles * kTokens;
    const FftUnit u = unit_at(a, unit);
    const int n = u.columns ? Tiles::tokens_from(u.s, t, kTokens) : 0;
    const auto from_v = row<const E>(p.v, u.s.row, v_head(p, u.hs), u.s.begin + t).sub(u.c0);
    for (int i = tid(); i < kTokens * a.columns; i += nthreads()) {
      const int j = i / a.columns, c = i % a.columns;
      v.st(j * (Tiles::kMostColumns + 1) + c, j < n && c < u.columns ? widen(from_v.ld(j * p.v.stride[2] + c)) : T(0));
    }
    const gptr<T> x{a.x};
    for (int64_t i0 = 0; i0 < a.pairs; i0 += kPairs) {
      const int64_t r0 = 2 * (a.pair + i0);
      const int pairs = int(a.pairs - i0 < kPairs ? a.pairs - i0 : kPairs);
      sync_cta();
      Tiles::load(k, row<const E>(p.k, u.s.row, k_head(p, u.hs), u.s.begin + t).sub(r0), p.k.stride[2], kTokens, n,
                  p.K - r0);
      sync_cta();
      for (int item = warp(); item < pairs * a.columns; item += Tiles::kWarps) {
        const int i = item % pairs, c = item / pairs;
        const int64_t at = (((unit * a.columns + c) * a.pairs + i0 + i) * a.points + t) * 2;
        for (int j = lane(); j < kTokens; j += 32) {
          const T vj = v.ld(j * (Tiles::kMostColumns + 1) + c);
          const auto kj = k.template ldv<Complex<T>>(j * kStride + 2 * i);
          x.template stv<Complex<T>>(at + 2 * j, {kj.x * vj, kj.y * vj});
        }
      }
    }
  }
};

SIMT_DEV double2 times(double2 a, double2 b) { return {a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x}; }
SIMT_DEV float4 times(float4 a, float4 b) {  // two products
  return {a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x, a.z * b.z - a.w * b.w, a.z * b.w + a.w * b.z};
}

// x *= H, 16 bytes at a time.
template <class T>
struct FftMultiply {
  using Vec = std::conditional_t<std::is_same_v<T, double>, double2, float4>;
  static constexpr const char* kName = "fft multiply";
  static constexpr int kMaxThreads = 256, kMinBlocks = 2, kFrequencies = 1024, kVec = int(sizeof(Vec) / sizeof(T));
  using Params = FftPass<T>;

  static SIMT_DEV void run(const Params& a) {
    const int64_t parts = (a.points + kFrequencies - 1) / kFrequencies, transform = bid().x / parts;
    const int64_t first = bid().x % parts * kFrequencies, left = a.points - first;
    const FftUnit u = unit_at(a, transform / (a.columns * a.pairs));
    const gptr<T> x = gptr<T>{a.x}.sub(2 * (transform * a.points + first));
    const gptr<const T> h = gptr<const T>{a.spectrum}.sub(2 * (filter_of(a.p, u.s.row, u.hs) * a.points + first));
    for (int i = kVec * tid(); i < 2 * (left < kFrequencies ? left : kFrequencies); i += kVec * kMaxThreads)
      x.template stv<Vec>(i, times(x.template ldv<Vec>(i), h.template ldv<Vec>(i)));
  }
};

// o = scale (sum over pairs of q x + the contribution of the initial state)
template <class E>
struct FftCollect : FftTiles<E> {
  using Tiles = FftTiles<E>;
  using T = Accumulator<E>;
  static constexpr const char* kName = "fft collect";
  using Params = FftPass<T>;
  static constexpr int kSmem = (Tiles::kTokens * Tiles::kStride + Tiles::kRanks * Tiles::kMostColumns) * int(sizeof(T));

  static SIMT_DEV void run(const Params& a) {
    constexpr int kTokens = Tiles::kTokens, kStride = Tiles::kStride, kRanks = Tiles::kRanks;
    constexpr int kAtOnce = Tiles::kMaxThreads / kTokens, kOwn = Tiles::kMostColumns / kAtOnce;
    const Problem& p = a.p;
    Smem smem;
    const auto q = smem.alloc<T>(kTokens * kStride), S = smem.alloc<T>(kRanks * Tiles::kMostColumns);
    const int64_t tiles = (p.N + kTokens - 1) / kTokens, t = bid().x % tiles * kTokens, g = bid().x / tiles % group(p);
    const int64_t unit = bid().x / tiles / group(p);
    const FftUnit u = unit_at(a, unit);
    const int n = u.columns ? Tiles::tokens_from(u.s, t, kTokens) : 0;
    const int j = tid() % kTokens, first = tid() / kTokens;  // a thread's token and first column
    const int64_t h = u.hs * group(p) + g;
    const bool more_before = a.pair > 0, more_after = 2 * (a.pair + a.pairs) < p.K;
    const gptr<T> sums = gptr<T>{a.sums}.sub(((unit * group(p) + g) * a.columns) * p.N + t);
    const gptr<const T> x{a.x};

    T o[kOwn] = {}, of_state[kOwn] = {};
    for (int64_t i0 = 0; i0 < (n ? a.pairs : 0); i0 += kRanks / 2) {
      const int64_t r0 = 2 * (a.pair + i0);
      const int pairs = int(a.pairs - i0 < kRanks / 2 ? a.pairs - i0 : kRanks / 2);
      sync_cta();
      Tiles::load(q, row<const E>(p.q, u.s.row, q_head(p, h), u.s.begin + t).sub(r0), p.q.stride[2], kTokens, n,
                  p.K - r0);
      if (p.initial_state)
        for (int i = tid(); i < kRanks * a.columns; i += nthreads()) {
          const int r = i / a.columns, c = i % a.columns;
          const bool live = r0 + r < p.K && c < u.columns;
          S.st(r * Tiles::kMostColumns + c,
               live ? row<const T>(p.initial_state, u.b, u.hs, r0 + r).ld(u.c0 + c) : T(0));
        }
      sync_cta();
      SIMT_UNROLL
      for (int m = 0; m < kOwn; ++m) {
        const int c = first + m * kAtOnce;
        if (c >= u.columns || j >= n) continue;
        const int64_t at = (((unit * a.columns + c) * a.pairs + i0) * a.points + t + j) * 2;
        for (int i = 0; i < pairs; ++i) {
          const auto y = x.template ldv<Complex<T>>(at + 2 * i * a.points);
          const auto qi = q.template ldv<Complex<T>>(j * kStride + 2 * i);
          o[m] = mul_add(qi.x, y.x, mul_add(qi.y, y.y, o[m]));
          if (p.initial_state)
            of_state[m] = mul_add(qi.x, S.ld(2 * i * Tiles::kMostColumns + c),
                                  mul_add(qi.y, S.ld((2 * i + 1) * Tiles::kMostColumns + c), of_state[m]));
        }
      }
    }
    if (j >= n) return;
    const T weight = p.initial_state ? ex2(T(log2_decay_at(p, u.s.row, u.hs, 0) * double(t + j + 1))) : T(0);
    const auto to = row<E>(p.o, u.s.row, h, u.s.begin + t + j);
    SIMT_UNROLL
    for (int m = 0; m < kOwn; ++m) {
      const int c = first + m * kAtOnce;
      if (c >= u.columns) continue;
      T sum = mul_add(weight, of_state[m], o[m]);
      if (more_before) sum += sums.ld(c * p.N + j);
      if (more_after)
        sums.st(c * p.N + j, sum);
      else
        to.st(u.c0 + c, narrow<E>(sum * T(p.scale)));
    }
  }
};

// S_N, 32 ranks and 32 columns per block. Each tile is summed on its own, since errors grow with
// the length of a sum.
template <class E>
struct FftState : FftTiles<E> {
  using Tiles = FftTiles<E>;
  using T = Accumulator<E>;
  static constexpr const char* kName = "fft final state";
  struct Params {
    Problem p;
  };
  static constexpr int kColumns = 32, kTile = 32, kSmem = 2 * kTile * Tiles::kStride * int(sizeof(T));

  static SIMT_DEV void run(const Params& a) {
    constexpr int kStride = Tiles::kStride, kOwn = Tiles::kRanks / Tiles::kWarps;
    const Problem& p = a.p;
    Smem smem;
    const auto k = smem.alloc<T>(kTile * kStride), v = smem.alloc<T>(kTile * kStride);
    const int64_t down = (p.K + Tiles::kRanks - 1) / Tiles::kRanks, across = (p.V + kColumns - 1) / kColumns;
    const int64_t c0 = bid().x % across * kColumns, r0 = bid().x / across % down * Tiles::kRanks;
    const int64_t hs = bid().x / across / down % p.Hs, b = bid().x / across / down / p.Hs;
    const Sequence s = sequence_at(p, b);
    const double log2 = s.length ? log2_decay_at(p, s.row, hs, 0) : 0;

    T sum[kOwn] = {};
    for (int64_t t = 0; t < s.length; t += kTile) {
      const int n = Tiles::tokens_from(s, t, kTile);
      sync_cta();
      Tiles::load(k, row<const E>(p.k, s.row, k_head(p, hs), s.begin + t).sub(r0), p.k.stride[2], kTile, n, p.K - r0);
      Tiles::load(v, row<const E>(p.v, s.row, v_head(p, hs), s.begin + t).sub(c0), p.v.stride[2], kTile, n, p.V - c0);
      sync_cta();
      T part[kOwn] = {};
      for (int j = 0; j < n; ++j) {
        const T vj = v.ld(j * kStride + lane()) * ex2(T(log2 * double(s.length - 1 - t - j)));
        SIMT_UNROLL
        for (int i = 0; i < kOwn; ++i) part[i] = mul_add(k.ld(j * kStride + warp() * kOwn + i), vj, part[i]);
      }
      SIMT_UNROLL
      for (int i = 0; i < kOwn; ++i) sum[i] += part[i];
    }
    const T rest = ex2(T(log2 * double(s.length)));
    SIMT_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const int64_t r = r0 + warp() * kOwn + i, c = c0 + lane();
      if (r >= p.K || c >= p.V) continue;
      if (p.initial_state) sum[i] = mul_add(rest, row<const T>(p.initial_state, b, hs, r).ld(c), sum[i]);
      row<T>(p.final_state, b, hs, r).st(c, sum[i]);
    }
  }
};

}  // namespace lc::cuda
