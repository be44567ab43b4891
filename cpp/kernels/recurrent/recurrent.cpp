// recurrent.cpp - CPU: token by token, as the operator is defined; the one method that decodes, in a pool of states.
//
//   S_t = 2^L_t S_{t-1} + k_t v_t^T,   o_t = scale S_t^T q_t          L: log2 decays
//
//   Rows of S do not depend on one another: blocks of rows that fit the L1 cache go through a tile of tokens, four at a
//   time while a piece of a row is in registers, so that memory sees each state once per tile and once per decode call.
//   B (H 2KV + Hs 3KV) flop a token; scratch per worker K V + T (K (G+1) + V (G+1)) numbers, T <= 64 tokens, G = H / Hs
//   workers: (sequence, state) pairs; with few of those, the columns of V as well
//   Katharopoulos et al. 2020, arXiv:2006.16236
#include <cmath>

#include "../../cpu/cost.h"
#include "../../cpu/scratch.h"
#include "../../cpu/threads.h"
#include "../../cpu/tile.h"
#include "../../methods.h"

namespace lc::LC_ISA {
namespace {

constexpr int64_t kTileTokens = 64;
constexpr int64_t kBlockBytes = 16384;

double flop(const Problem& p) { return double(tokens(p)) * double(p.K * p.V) * (2. * double(p.H) + 3. * double(p.Hs)); }

// The tokens one pass over a block of rows takes: decay, k and q per row, v and the sums o in registers.
template <class T>
struct Pass {
  const T* decay;     // [tokens]: 2^L, or 2^L - 1
  Matrix<const T> k;  // [tokens, K]
  Matrix<const T> v;  // [tokens, V]
  Matrix<const T> q;  // [tokens or heads, K]
  Matrix<T> o;        // [tokens or heads, V]
};

// What a pass does to S before it is read. A decay close to 1 is given as 2^L - 1 and added as (2^L - 1) S + k v: the
// rounding error of 2^L itself would be raised to the power of the number of tokens, and that of 2^L S is biased.
enum class Update { none, times, plus };

// rows x N vectors of S at (r0, c): kTokens tokens of one q head, or one token of kHeads q heads.
template <class T, int kTokens, int kHeads, int N, Update kUpdate>
__attribute__((noinline)) void pass(Matrix<T> S, const Pass<T>& a, int64_t r0, int64_t rows, int c) {
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

// The same for vectors [c, end), as wide as the registers allow.
template <class T, int kTokens, int kHeads, Update kUpdate>
LC_INLINE void pass_over(Matrix<T> S, const Pass<T>& a, int64_t r0, int64_t rows, int c, int end) {
  constexpr int kWidest = (kRegisters / 2) / (kTokens * (kHeads + 1)) ? (kRegisters / 2) / (kTokens * (kHeads + 1)) : 1;
  constexpr int kFirst = kWidest >= 8 ? 8 : kWidest >= 4 ? 4 : kWidest >= 2 ? 2 : 1;
  for (; c + kFirst <= end; c += kFirst) pass<T, kTokens, kHeads, kFirst, kUpdate>(S, a, r0, rows, c * kLanes<T>);
  if constexpr (kFirst > 4)
    for (; c + 4 <= end; c += 4) pass<T, kTokens, kHeads, 4, kUpdate>(S, a, r0, rows, c * kLanes<T>);
  if constexpr (kFirst > 2)
    for (; c + 2 <= end; c += 2) pass<T, kTokens, kHeads, 2, kUpdate>(S, a, r0, rows, c * kLanes<T>);
  if constexpr (kFirst > 1)
    for (; c < end; ++c) pass<T, kTokens, kHeads, 1, kUpdate>(S, a, r0, rows, c * kLanes<T>);
}

int64_t tile_tokens(const Problem& p) {
  if (p.op == LC_DECODE) return std::max<int64_t>(1, p.N);
  return std::max<int64_t>(1, std::min({kTileTokens, 4 * kTileTokens / group(p), p.N}));
}

template <class E>
struct Worker {
  using T = Accumulator<E>;
  const Problem& p;
  const int64_t tile, G;
  T *state, *decay, *decay_minus_1, *k_copy, *q_copy, *v_copy, *sums;

  Worker(const Problem& problem, Arena& arena)
      : p(problem),
        tile(tile_tokens(p)),
        G(group(p)),
        state(arena.take<T>(p.K * padded<T>(p.V))),
        decay(arena.take<T>(tile)),
        decay_minus_1(arena.take<T>(tile)),
        k_copy(arena.take<T>(tile * padded<T>(p.K))),
        q_copy(arena.take<T>(tile * G * padded<T>(p.K))),
        v_copy(arena.take<T>(tile * padded<T>(p.V))),
        sums(arena.take<T>(tile * G * padded<T>(p.V))) {}

  // A token that forgets no more than 1 %. (Where more is forgotten, every few tokens, there are no old errors.)
  bool slow(int i) const { return decay[i] > T(0.99); }

  // Tokens [t, t + n) of (s, hs) for the vectors [c0, c1) of columns; block(r0, m, f) calls f with rows [r0, r0 + m) of
  // the state.
  template <class Block>
  void tokens_through(const Sequence& s, int64_t hs, int64_t t, int n, int c0, int c1, Block&& block) {
    const int Kp = padded<T>(p.K), Vp = padded<T>(p.V);
    const int begin = c0 * kLanes<T>, columns = std::min(int(p.V), c1 * kLanes<T>) - begin;
    load<T>(Matrix<T>{k_copy, Kp}, Matrix<const E>{p.k.at<const E>(s.row, k_head(p, hs), t), p.k.stride[2]}, n,
            int(p.K));
    load<T>(Matrix<T>{v_copy + begin, Vp},
            Matrix<const E>{p.v.at<const E>(s.row, v_head(p, hs), t) + begin, p.v.stride[2]}, n, columns);
    for (int64_t g = 0; g < G; ++g)  // [token, head]
      load<T>(Matrix<T>{q_copy + g * Kp, G * Kp},
              Matrix<const E>{p.q.at<const E>(s.row, q_head(p, hs * G + g), t), p.q.stride[2]}, n, int(p.K));
    for (int i = 0; i < n; ++i) {
      if (i && p.decay != Decay::per_token) {
        decay[i] = decay[0], decay_minus_1[i] = decay_minus_1[0];
      } else {
        const double x = log2_decay(p, s.row, hs, t + i);
        decay[i] = T(std::exp2(x)), decay_minus_1[i] = T(std::expm1(x / kLog2e));
      }
      for (int64_t g = 0; g < G; ++g) std::memset(sums + (i * G + g) * Vp + begin, 0, size_t(c1 - c0) * kVectorBytes);
    }

    const int64_t rows = std::max<int64_t>(1, kBlockBytes / int64_t(sizeof(T)) / Vp);
    for (int64_t r0 = 0; r0 < p.K; r0 += rows) {
      const int64_t m = std::min(rows, p.K - r0);
      block(r0, m, [&](Matrix<T> S) {
        const auto at = [&](int i, int64_t g, bool plus) {
          return Pass<T>{(plus ? decay_minus_1 : decay) + i,
                         {k_copy + i * Kp, Kp},
                         {v_copy + i * Vp, Vp},
                         {q_copy + (i * G + g) * Kp, Kp},
                         {sums + (i * G + g) * Vp, Vp}};
        };
        const auto four_alike = [&](int i) {
          return i + 4 <= n && slow(i) == slow(i + 1) && slow(i) == slow(i + 2) && slow(i) == slow(i + 3);
        };
        for (int i = 0; i < n;) {
          if (G == 1 && four_alike(i)) {
            if (slow(i))
              pass_over<T, 4, 1, Update::plus>(S, at(i, 0, true), r0, m, c0, c1);
            else
              pass_over<T, 4, 1, Update::times>(S, at(i, 0, false), r0, m, c0, c1);
            i += 4;
            continue;
          }
          if (slow(i))
            pass_over<T, 1, 1, Update::plus>(S, at(i, 0, true), r0, m, c0, c1);
          else
            pass_over<T, 1, 1, Update::times>(S, at(i, 0, false), r0, m, c0, c1);
          int64_t g = 1;
          for (; g + 4 <= G; g += 4) pass_over<T, 1, 4, Update::none>(S, at(i, g, false), r0, m, c0, c1);
          for (; g < G; ++g) pass_over<T, 1, 1, Update::none>(S, at(i, g, false), r0, m, c0, c1);
          ++i;
        }
      });
    }

    const Vec<T> scale = broadcast<T>(T(p.scale));
    for (int i = 0; i < n; ++i)
      for (int64_t g = 0; g < G; ++g) {
        T* sum = sums + (i * G + g) * Vp + begin;
        for (int j = 0; j < columns; j += kLanes<T>) store<T>(sum + j, load<T>(sum + j) * scale);
        store_row<T>(p.o.at<E>(s.row, hs * G + g, t + i) + begin, sum, columns);
      }
  }

  // The state in scratch for the whole sequence.
  void forward(int64_t b, int64_t hs, int c0, int c1) {
    const Sequence s = sequence(p, b);
    const int Vp = padded<T>(p.V), begin = c0 * kLanes<T>, columns = std::min(int(p.V), c1 * kLanes<T>) - begin;
    for (int64_t r = 0; r < p.K; ++r) {
      if (p.initial_state)
        load_row<T>(state + r * Vp + begin, p.initial_state.at<const T>(b, hs, r) + begin, columns);
      else
        std::memset(state + r * Vp + begin, 0, size_t(c1 - c0) * kVectorBytes);
    }
    for (int64_t t = 0; t < s.length; t += tile)
      tokens_through(s, hs, s.begin + t, int(std::min(tile, s.length - t)), c0, c1,
                     [&](int64_t r0, int64_t, auto&& f) { f(Matrix<T>{state + r0 * Vp, Vp}); });
    if (p.final_state)
      for (int64_t r = 0; r < p.K; ++r)
        store_row<T>(p.final_state.at<T>(b, hs, r) + begin, state + r * Vp + begin, columns);
  }

  // The state in its slot of the pool, in storage type P: in place, or a block of rows at a time through scratch.
  template <class P>
  void decode(int64_t b, int64_t hs, int c0, int c1) {
    const int Vp = padded<T>(p.V), begin = c0 * kLanes<T>, columns = std::min(int(p.V), c1 * kLanes<T>) - begin;
    const int64_t at = slot(p, b);
    if (at < 0) {
      for (int64_t h = hs * G; h < (hs + 1) * G; ++h)
        for (int64_t t = 0; t < p.N; ++t) std::memset(p.o.at<E>(b, h, t) + begin, 0, sizeof(E) * size_t(columns));
      return;
    }
    tokens_through(sequence(p, b), hs, 0, int(p.N), c0, c1, [&](int64_t r0, int64_t m, auto&& f) {
      const Matrix<P> pool{p.final_state.at<P>(at, hs, r0), p.final_state.stride[2]};
      if constexpr (std::is_same_v<P, T>)
        if (columns == (c1 - c0) * kLanes<T>) return f(pool);
      const Matrix<T> copy{state, Vp};
      load<T>(Matrix<T>{copy.data + begin, Vp}, Matrix<const P>{pool.data + begin, pool.ld}, int(m), columns);
      f(copy);
      store<T>(Matrix<P>{pool.data + begin, pool.ld}, Matrix<const T>{copy.data + begin, Vp}, int(m), columns);
    });
  }
};

// Pieces the columns of one state are cut into.
int64_t splits(const Problem& p, int workers) {
  const int64_t states = p.B * p.Hs, most = vectors<float>(p.V);
  return balanced(states, workers) ? 1 : std::min<int64_t>(most, workers);
}

int workers(const Problem& p) {
  return workers_for(p, p.B * p.Hs * vectors<float>(p.V), std::max(flop(p), least_bytes(p) * 4));
}

size_t workspace(const Problem& p) { return scratch_bytes<Worker>(p, workers(p)); }

void run(const Problem& p) {
  Tasks tasks(p);
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    using T = Accumulator<E>;
    run_workers(workers(p), [&](int index, int granted) {
      Arena arena(p.workspace);
      Worker<E> worker = cut<Worker, E>(p, arena, index);
      const int64_t parts = splits(p, granted), n = vectors<T>(p.V);
      tasks.each(p.B * p.Hs * parts, index, granted, [&](int64_t i) {
        const int64_t part = i % parts, hs = i / parts % p.Hs, b = i / parts / p.Hs;
        const int c0 = int(n * part / parts), c1 = int(n * (part + 1) / parts);
        if (p.op != LC_DECODE)
          worker.forward(b, hs, c0, c1);
        else
          with_type(p.state_type, [&](auto s) {
            using P = decltype(s);
            if constexpr (std::is_same_v<P, T> || (sizeof(P) == 2 && sizeof(T) == 4))
              worker.template decode<P>(b, hs, c0, c1);
          });
      });
    });
  });
}

const char* refuses(const Problem& p) { return p.op == LC_BACKWARD ? forward_only(p) : nullptr; }

Cost cost(const Problem& p) {
  return predict(p, {flop(p), /*extra_bytes=*/0, /*depth=*/mean_length(p), /*tasks=*/double(p.B * p.H)},
                 /*efficiency=*/0.45, workers(p));
}

}  // namespace

extern const Method recurrent_cpu = {
    {"recurrent", "cpu", "token by token, as defined; decodes in place", "Katharopoulos et al. 2020, arXiv:2006.16236"},
    refuses,
    cost,
    workspace,
    run};

}  // namespace lc::LC_ISA
