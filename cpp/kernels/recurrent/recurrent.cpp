// recurrent.cpp - CPU: token by token, as the operator is defined. Only this method decodes.
//
//   S_t = 2^L_t S_{t-1} + k_t v_t^T,   o_t = scale S_t^T q_t          L: log2 decays
//
//   Rows of S do not depend on one another. A block of rows that fits the L1 cache goes through a
//   tile of tokens, four at a time while a piece of a row is in registers. Each state is thus read
//   from memory once per tile, and once per decode call.
//   B (H 2KV + Hs 3KV) flop per token; scratch per worker K V + T (K+V) (G+1) numbers, T <= 64
//   tokens, G = H / Hs
//   tasks: (sequence, state) pairs; if those are few, pieces of their columns of V
//   Katharopoulos et al. 2020, arXiv:2006.16236
#include <cmath>

#include "../../cpu/cost.h"
#include "../../cpu/parameters.h"
#include "../../cpu/scratch.h"
#include "../../cpu/threads.h"
#include "../../cpu/tile.h"
#include "../../methods.h"

namespace lc::LC_ISA {
namespace {

constexpr int64_t kTileTokens = 64;
constexpr int64_t kBlockBytes = 16384;

double flop(const Problem& p) { return double(tokens(p)) * double(p.K * p.V) * (2. * double(p.H) + 3. * double(p.Hs)); }

// The operands of one pass of tokens over a block of rows of S. v and the sums o stay in registers.
template <class T>
struct RowPass {
  const T* decay;     // [tokens]: 2^L, or 2^L - 1
  Matrix<const T> k;  // [tokens, K]
  Matrix<const T> v;  // [tokens, V]
  Matrix<const T> q;  // [tokens or heads, K]
  Matrix<T> o;        // [tokens or heads, V]
};

// The update of S before it is read. With `times` it is 2^L S + k v. With `plus`, for decays close
// to 1, it is S + ((2^L - 1) S + k v): the rounding error of 2^L would be raised to the power of
// the number of tokens, and the rounding error of 2^L S is biased.
enum class Update { none, times, plus };

// Updates `rows` rows x N vectors of S from (r0, c) on, by kTokens tokens of one q head or one
// token of kHeads q heads.
template <class T, int kTokens, int kHeads, int N, Update kUpdate>
__attribute__((noinline)) void update_rows(Matrix<T> S, const RowPass<T>& a, int64_t r0, int64_t rows, int c) {
  constexpr int kSums = kTokens * kHeads;
  count_flop(rows * N * kLanes<T> * (2 * kSums + (kUpdate != Update::none ? 3 * kTokens : 0)));
  Vec<T> v[kTokens][N], o[kSums][N];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      if (kUpdate != Update::none) v[t][j] = load<T>(a.v.row(t) + c + j * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) o[i][j] = load<T>(a.o.row(i) + c + j * kLanes<T>);
  }
  for (int64_t r = r0; r < r0 + rows; ++r) {
    T* s = S.row(r - r0) + c;
    for (int j = 0; j < N; ++j) __builtin_prefetch(s + 16 * S.ld + j * kLanes<T>, 1);
    Vec<T> x[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) x[j] = load<T>(s + j * kLanes<T>);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      if (kUpdate != Update::none) {
        const Vec<T> decay = broadcast<T>(a.decay[t]), k = broadcast<T>(a.k.row(t)[r]);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
          if (kUpdate == Update::plus)
            x[j] = x[j] + (x[j] * decay + k * v[t][j]);
          else
            x[j] = x[j] * decay + k * v[t][j];
        }
      }
#pragma GCC unroll 8
      for (int h = 0; h < kHeads; ++h) {
        const Vec<T> q = broadcast<T>(a.q.row(t * kHeads + h)[r]);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) o[t * kHeads + h][j] = q * x[j] + o[t * kHeads + h][j];
      }
    }
    if (kUpdate != Update::none) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) store<T>(s + j * kLanes<T>, x[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store<T>(a.o.row(i) + c + j * kLanes<T>, o[i][j]);
}

// The same for all vectors [c, end), as many at a time as the registers allow.
template <class T, int kTokens, int kHeads, Update kUpdate>
LC_INLINE void update_columns(Matrix<T> S, const RowPass<T>& a, int64_t r0, int64_t rows, int c, int end) {
  constexpr int kWidest = (kRegisters / 2) / (kTokens * (kHeads + 1)) ? (kRegisters / 2) / (kTokens * (kHeads + 1)) : 1;
  constexpr int kFirst = kWidest >= 8 ? 8 : kWidest >= 4 ? 4 : kWidest >= 2 ? 2 : 1;
  for (; c + kFirst <= end; c += kFirst)
    update_rows<T, kTokens, kHeads, kFirst, kUpdate>(S, a, r0, rows, c * kLanes<T>);
  if constexpr (kFirst > 4)
    for (; c + 4 <= end; c += 4) update_rows<T, kTokens, kHeads, 4, kUpdate>(S, a, r0, rows, c * kLanes<T>);
  if constexpr (kFirst > 2)
    for (; c + 2 <= end; c += 2) update_rows<T, kTokens, kHeads, 2, kUpdate>(S, a, r0, rows, c * kLanes<T>);
  if constexpr (kFirst > 1)
    for (; c < end; ++c) update_rows<T, kTokens, kHeads, 1, kUpdate>(S, a, r0, rows, c * kLanes<T>);
}

// In a decode call, a state whose keys are contiguous is updated row by row of V instead of row by
// row of K: S_vt = 2^L_t S_v + k_t v_t, o_vt = S_vt.q_t. A few rows share the loads of k and q;
// with more rows, processors do not see that the state is read as a stream.
constexpr int kRows = 2;

// Updates kRows rows of a transposed state by one token, and writes their products with q to o.
// Rows of S, k and q have K numbers, padded to whole vectors.
template <class T, int kRows, Update kUpdate>
LC_INLINE void update_values(Matrix<T> S, const T* k, const T* q, int64_t K, T decay, const T* v, T* o) {
  constexpr int kSums = 4 / kRows;  // of a row: sums that do not wait for one another
  count_flop(int64_t{kRows} * padded<T>(K) * (kUpdate == Update::none ? 2 : 5));
  Vec<T> sums[kRows][kSums] = {};
  const auto vectors = [&](int64_t j, int to) {
    const Vec<T> kj = load<T>(k + j), qj = load<T>(q + j);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      Vec<T> x = load<T>(S.row(i) + j);
      if (kUpdate == Update::plus) x = x + (x * decay + kj * v[i]);
      if (kUpdate == Update::times) x = x * decay + kj * v[i];
      if (kUpdate != Update::none) store<T>(S.row(i) + j, x);
      sums[i][to] = qj * x + sums[i][to];
    }
  };
  int64_t j = 0;
  for (; j + (kSums - 1) * kLanes<T> < K; j += kSums * kLanes<T>) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) vectors(j + i * kLanes<T>, i);
  }
  for (; j < K; j += kLanes<T>) vectors(j, 0);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int n = 1; n < kSums; ++n) sums[i][0] = sums[i][0] + sums[i][n];
    o[i] = sum<T>(sums[i][0]);
  }
}

int64_t tile_tokens(const Problem& p) {
  if (p.op == LC_DECODE) return std::max<int64_t>(1, p.N);
  return std::max<int64_t>(1, std::min({kTileTokens, 4 * kTileTokens / group(p), p.N}));
}

template <class E>
struct RecurrentWorker {
  using T = Accumulator<E>;
  const Problem& p;
  const int64_t tile;  // most tokens of a tile
  const int64_t G;     // q heads per state
  const int Kp, Vp;    // K and V padded to whole vectors
  T *state, *decay, *decay_minus_1, *k_copy, *q_copy, *v_copy, *sums, *skip;
  double* length;
  // The lengths, the log2 of the decays and the decays of all state heads of sequence `measured`. A
  // decode call of one token per sequence computes them together, as it has little other work.
  double *lengths_by_head, *log2_by_head, *decay_by_head;
  int64_t measured = -1;

  RecurrentWorker(const Problem& problem, Arena& arena)
      : p(problem),
        tile(tile_tokens(p)),
        G(group(p)),
        Kp(padded<T>(p.K)),
        Vp(padded<T>(p.V)),
        state(arena.take<T>(std::max<int64_t>(p.K * padded<T>(p.V), kRows * padded<T>(p.K)))),
        decay(arena.take<T>(tile)),
        decay_minus_1(arena.take<T>(tile)),
        k_copy(arena.take<T>(tile * padded<T>(p.K))),
        q_copy(arena.take<T>(tile * G * padded<T>(p.K))),
        v_copy(arena.take<T>(tile * padded<T>(p.V))),
        sums(arena.take<T>(tile * G * padded<T>(p.V))),
        skip(arena.take<T>(p.skip ? padded<T>(p.V) : 0)),
        length(arena.take<double>(p.dt ? padded<double>(tile) : 0)),
        lengths_by_head(arena.take<double>(by_head() ? padded<double>(int(p.Hs)) : 0)),
        log2_by_head(arena.take<double>(by_head() ? padded<double>(int(p.Hs)) : 0)),
        decay_by_head(arena.take<double>(by_head() ? padded<double>(int(p.Hs)) : 0)) {}

  bool by_head() const { return p.op == LC_DECODE && p.N == 1 && p.dt; }

  // Columns of V that a task computes: the vectors [c0, c1).
  struct Span {
    int c0, c1;
    int begin;    // first column
    int columns;  // number of columns
  };
  Span span(int c0, int c1) const {
    const int begin = c0 * kLanes<T>;
    return {c0, c1, begin, std::min(int(p.V), c1 * kLanes<T>) - begin};
  }

  // Whether token i of the tile forgets at most 1 %. If more is forgotten every few tokens, old
  // errors do not last.
  bool slow(int i) const { return decay[i] > T(0.99); }

  bool four_alike(int i, int n) const {
    return i + 4 <= n && slow(i) == slow(i + 1) && slow(i) == slow(i + 2) && slow(i) == slow(i + 3);
  }

  // Loads a tile: q, k, v and the decays of tokens [t, t + n), and zeros for the sums.
  void load_tile(const Sequence& s, int64_t hs, int64_t t, int n, const Span& at) {
    load<T>(Matrix<T>{k_copy, Kp}, Matrix<const E>{p.k.at<const E>(s.row, k_head(p, hs), t), p.k.stride[2]}, n,
            int(p.K));
    load<T>(Matrix<T>{v_copy + at.begin, Vp},
            Matrix<const E>{p.v.at<const E>(s.row, v_head(p, hs), t) + at.begin, p.v.stride[2]}, n, at.columns);
    for (int64_t g = 0; g < G; ++g)  // [token, head]
      load<T>(Matrix<T>{q_copy + g * Kp, G * Kp},
              Matrix<const E>{p.q.at<const E>(s.row, q_head(p, hs * G + g), t), p.q.stride[2]}, n, int(p.K));
    if (by_head()) {
      measure_heads(s.row);
      length[0] = lengths_by_head[hs];
    } else if (p.dt) {
      lengths(p, length, s.row, hs, t, n);
    }
    if (p.dt) weigh_keys(n);
    for (int i = 0; i < n; ++i) {
      if (i && p.decay != Decay::per_token) {
        decay[i] = decay[0];
        decay_minus_1[i] = decay_minus_1[0];
      } else {
        const double x = by_head() ? log2_by_head[hs]
                         : p.dt    ? clamped_log2(p, log2_rate(p, s.row, hs) * length[i])
                                   : log2_decay(p, s.row, hs, t + i);
        decay[i] = T(by_head() ? decay_by_head[hs] : std::exp2(x));
        decay_minus_1[i] = slow(i) ? T(std::expm1(x / kLog2e)) : T(0);
      }
      for (int64_t g = 0; g < G; ++g)
        std::memset(sums + (i * G + g) * Vp + at.begin, 0, size_t(at.c1 - at.c0) * kVectorBytes);
    }
  }

  // Computes the lengths and the decays of all heads of sequence b, as vectors.
  void measure_heads(int64_t b) {
    if (measured == b) return;
    measured = b;
    lengths_of_heads(p, lengths_by_head, log2_by_head, b, 0);
    for (int64_t h = 0; h < padded<double>(int(p.Hs)); ++h)
      log2_by_head[h] = h < p.Hs ? clamped_log2(p, log2_rate(p, b, h) * lengths_by_head[h]) : 0;
    for (int64_t h = 0; h < p.Hs; h += kLanes<double>)
      store<double>(decay_by_head + h, exp2<double>(load<double>(log2_by_head + h)));
  }

  // k_t = length_t k_t
  void weigh_keys(int n) {
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < Kp; j += kLanes<T>) {
        T* k = k_copy + i * Kp + j;
        store<T>(k, load<T>(k) * T(length[i]));
      }
  }

  RowPass<T> row_pass(int i, int64_t g, bool plus) const {
    return {(plus ? decay_minus_1 : decay) + i,
            {k_copy + i * Kp, Kp},
            {v_copy + i * Vp, Vp},
            {q_copy + (i * G + g) * Kp, Kp},
            {sums + (i * G + g) * Vp, Vp}};
  }

  // Updates by kTokens tokens from i on, as fast or slow as token i, and reads by their first q
  // head.
  template <int kTokens>
  void update(Matrix<T> S, int i, int64_t r0, int64_t rows, const Span& at) const {
    if (slow(i))
      update_columns<T, kTokens, 1, Update::plus>(S, row_pass(i, 0, true), r0, rows, at.c0, at.c1);
    else
      update_columns<T, kTokens, 1, Update::times>(S, row_pass(i, 0, false), r0, rows, at.c0, at.c1);
  }

  // Moves rows [r0, r0 + rows) of the state, which are at S, over the n tokens of the tile.
  void tile_through(Matrix<T> S, int n, int64_t r0, int64_t rows, const Span& at) const {
    for (int i = 0; i < n;) {
      if (G == 1 && four_alike(i, n)) {
        update<4>(S, i, r0, rows, at);
        i += 4;
        continue;
      }
      update<1>(S, i, r0, rows, at);
      int64_t g = 1;
      for (; g + 4 <= G; g += 4)
        update_columns<T, 1, 4, Update::none>(S, row_pass(i, g, false), r0, rows, at.c0, at.c1);
      for (; g < G; ++g) update_columns<T, 1, 1, Update::none>(S, row_pass(i, g, false), r0, rows, at.c0, at.c1);
      ++i;
    }
  }

  // o = (scale sums + skip v) silu(gate)
  void store_outputs(const Sequence& s, int64_t hs, int64_t t, int n, const Span& at) const {
    const Vec<T> scale = broadcast<T>(T(p.scale));
    for (int64_t h = hs * G; h < (hs + 1) * G; ++h) {
      if (p.skip) read_skip(p, skip, h);
      for (int i = 0; i < n; ++i) {
        T* sum = sums + (i * G + h - hs * G) * Vp + at.begin;
        const T* v = v_copy + i * Vp + at.begin;
        for (int j = 0; j < at.columns; j += kLanes<T>) {
          Vec<T> x = load<T>(sum + j) * scale;
          if (p.skip) x = x + load<T>(skip + at.begin + j) * load<T>(v + j);
          store<T>(sum + j, x);
        }
        if (p.gate) apply_gate<E, T>({sum, Vp}, {p.gate.at<const E>(s.row, h, t + i) + at.begin, 0}, 1, at.columns);
        store_row<T>(p.o.at<E>(s.row, h, t + i) + at.begin, sum, at.columns);
      }
    }
  }

  // Computes tokens [t, t + n) of (s, hs). block(r0, rows, f) calls f with rows [r0, r0 + rows) of
  // the state.
  template <class Block>
  void tokens_through(const Sequence& s, int64_t hs, int64_t t, int n, const Span& at, Block&& block) {
    load_tile(s, hs, t, n, at);
    const int64_t rows = std::max<int64_t>(1, kBlockBytes / int64_t(sizeof(T)) / Vp);
    for (int64_t r0 = 0; r0 < p.K; r0 += rows) {
      const int64_t m = std::min(rows, p.K - r0);
      block(r0, m, [&](Matrix<T> S) { tile_through(S, n, r0, m, at); });
    }
    store_outputs(s, hs, t, n, at);
  }

  // A whole sequence, with the state in scratch.
  void forward(int64_t b, int64_t hs, const Span& at) {
    const Sequence s = sequence(p, b);
    const Matrix<T> S{state + at.begin, Vp};
    if (const View& from = p.initial_state; is_transposed(p, from))
      load_transposed<T>(S, Matrix<const T>{from.at<const T>(b, hs, 0) + at.begin * from.stride[3], from.stride[3]},
                         at.columns, int(p.K));
    else if (from)
      load<T>(S, Matrix<const T>{from.at<const T>(b, hs, 0) + at.begin, from.stride[2]}, int(p.K), at.columns);
    else
      for (int64_t r = 0; r < p.K; ++r) std::memset(S.row(r), 0, size_t(at.c1 - at.c0) * kVectorBytes);
    for (int64_t t = 0; t < s.length; t += tile)
      tokens_through(s, hs, s.begin + t, int(std::min(tile, s.length - t)), at,
                     [&](int64_t r0, int64_t, auto&& f) { f(Matrix<T>{state + r0 * Vp, Vp}); });
    if (const View& to = p.final_state; is_transposed(p, to))
      store_transposed<T>(Matrix<T>{to.at<T>(b, hs, 0) + at.begin * to.stride[3], to.stride[3]},
                          Matrix<const T>{S.data, Vp}, int(p.K), at.columns);
    else if (to)
      store<T>(Matrix<T>{to.at<T>(b, hs, 0) + at.begin, to.stride[2]}, Matrix<const T>{S.data, Vp}, int(p.K),
               at.columns);
  }

  // A decode call, with the state in its slot of the pool, stored as type P. The state is updated
  // in place, or a block of rows at a time through scratch.
  template <class P>
  void decode(int64_t b, int64_t hs, const Span& at) {
    const int64_t state_slot = slot(p, b);
    if (state_slot < 0) {
      for (int64_t h = hs * G; h < (hs + 1) * G; ++h)
        for (int64_t t = 0; t < p.N; ++t) std::memset(p.o.at<E>(b, h, t) + at.begin, 0, sizeof(E) * size_t(at.columns));
      return;
    }
    if (is_transposed(p, p.final_state)) return decode_transposed<P>(b, hs, state_slot, at);
    tokens_through(sequence(p, b), hs, 0, int(p.N), at, [&](int64_t r0, int64_t m, auto&& f) {
      const Matrix<P> pool{p.final_state.at<P>(state_slot, hs, r0), p.final_state.stride[2]};
      if constexpr (std::is_same_v<P, T>)
        if (at.columns == (at.c1 - at.c0) * kLanes<T>) return f(pool);
      const Matrix<T> copy{state, Vp};
      load<T>(Matrix<T>{copy.data + at.begin, Vp}, Matrix<const P>{pool.data + at.begin, pool.ld}, int(m), at.columns);
      f(copy);
      store<T>(Matrix<P>{pool.data + at.begin, pool.ld}, Matrix<const T>{copy.data + at.begin, Vp}, int(m), at.columns);
    });
  }

  // The same for a state whose keys are contiguous.
  template <class P>
  void decode_transposed(int64_t b, int64_t hs, int64_t state_slot, const Span& at) {
    const Sequence s = sequence(p, b);
    const int n = int(p.N);
    load_tile(s, hs, 0, n, at);
    const int64_t ld = p.final_state.stride[3];
    for (int r = at.begin; r < at.begin + at.columns; r += kRows) {
      const int rows = std::min(kRows, at.begin + at.columns - r);
      const Matrix<P> pool{p.final_state.at<P>(state_slot, hs, 0) + r * ld, ld};
      const Matrix<T> copy{state, Kp};
      if constexpr (std::is_same_v<P, T>)
        if (p.K % kLanes<T> == 0) {
          values_through(pool, n, r, rows);
          continue;
        }
      load<T>(copy, Matrix<const P>{pool.data, ld}, rows, int(p.K));
      values_through(copy, n, r, rows);
      store<T>(pool, Matrix<const T>{copy.data, Kp}, rows, int(p.K));
    }
    store_outputs(s, hs, 0, n, at);
  }

  // Moves values [r, r + rows) of a transposed state over the n tokens of the tile.
  void values_through(Matrix<T> S, int n, int r, int rows) const {
    for (int i = 0; i < n; ++i) {
      slow(i) ? update_values<Update::plus>(S, i, 0, r, rows) : update_values<Update::times>(S, i, 0, r, rows);
      for (int64_t g = 1; g < G; ++g) update_values<Update::none>(S, i, g, r, rows);
    }
  }

  template <Update kUpdate>
  LC_INLINE void update_values(Matrix<T> S, int i, int64_t g, int r, int rows) const {
    const T* q = q_copy + (i * G + g) * Kp;
    const T* k = k_copy + i * Kp;
    const T* v = v_copy + i * Vp + r;
    T* o = sums + (i * G + g) * Vp + r;
    const T d = kUpdate == Update::plus ? decay_minus_1[i] : decay[i];
    if (rows == kRows) return LC_ISA::update_values<T, kRows, kUpdate>(S, k, q, p.K, d, v, o);
    for (int j = 0; j < rows; ++j) LC_ISA::update_values<T, 1, kUpdate>({S.row(j), S.ld}, k, q, p.K, d, v + j, o + j);
  }

  // Piece `part` of `parts` of the columns of one state.
  void run(int64_t b, int64_t hs, int64_t part, int64_t parts) {
    const int64_t n = vectors<T>(p.V);
    const Span at = span(int(n * part / parts), int(n * (part + 1) / parts));
    if (p.op != LC_DECODE) return forward(b, hs, at);
    with_type(p.state_type, [&](auto s) {
      using P = decltype(s);
      if constexpr (std::is_same_v<P, T> || (sizeof(P) == 2 && sizeof(T) == 4)) decode<P>(b, hs, at);
    });
  }
};

// The number of pieces that the columns of one state are cut into.
int64_t splits(const Problem& p, int workers) {
  const int64_t states = p.B * p.Hs, most = vectors<float>(p.V);
  return balanced(states, workers) ? 1 : std::min<int64_t>(most, workers);
}

int workers(const Problem& p) {
  return workers_for(p, p.B * p.Hs * vectors<float>(p.V), std::max(flop(p), least_bytes(p) * 4));
}

size_t workspace(const Problem& p) { return scratch_bytes<RecurrentWorker>(p, workers(p)); }

void run(const Problem& p) {
  Tasks tasks(p);
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    run_workers(workers(p), [&](int index, int granted) {
      Arena arena(p.workspace);
      RecurrentWorker<E> worker = cut<RecurrentWorker, E>(p, arena, index);
      const int64_t parts = splits(p, granted);
      tasks.each(p.B * p.Hs * parts, index, granted,
                 [&](int64_t i) { worker.run(i / parts / p.Hs, i / parts % p.Hs, i % parts, parts); });
    });
  });
}

Cost cost(const Problem& p) {
  return predict(p, {flop(p), /*extra_bytes=*/0, /*depth=*/mean_length(p), /*tasks=*/double(p.B * p.H)},
                 /*efficiency=*/0.45, workers(p));
}

}  // namespace

extern const Method recurrent_cpu = {
    {"recurrent", "cpu", "token by token, as defined; decodes in place", "Katharopoulos et al. 2020, arXiv:2006.16236"},
    {Feature::forward | Feature::decode | Feature::state_indices | Feature::short_states | kAllTypes | kAllDecays |
     kSequences | kMamba2},
    refuses_nothing,
    cost,
    workspace,
    run};

}  // namespace lc::LC_ISA
