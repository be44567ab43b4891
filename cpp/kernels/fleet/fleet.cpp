// fleet.cpp - CPU: FleetAttention: o is a sum over ranks r of decayed cumulative sums y_r.
//
//   y_tr = 2^L_t y_{t-1,r} + k_tr v_t,   o_t = scale sum_r q_tr y_tr     L: log2 decays, y_0: S_0
//
//   The mask is applied as a recurrence, never by powers or logarithms of sums. y of a block of
//   ranks and a few vectors of columns stays in registers for a tile of tokens; o is in scratch.
//   B (H 2KV + Hs 3KV) flop per token; scratch per worker K V + T (G+1) (K+P) numbers, T <= 128
//   tokens, P columns of a pass, G = H / Hs
//   tasks: (sequence, state) pairs; if those are few, pieces of their columns of V
//   Wang et al. 2025 (LeetDecoding), arXiv:2501.02573
#include <cmath>

#include "../../cpu/cost.h"
#include "../../cpu/scratch.h"
#include "../../cpu/threads.h"
#include "../../cpu/tile.h"
#include "../../methods.h"

namespace lc::LC_ISA {
namespace {

constexpr int64_t kTileTokens = 128;
constexpr int kWide = 2;                    // vectors of columns of a pass
constexpr int kStateVecs = kRegisters / 2;  // vectors of the state that stay in registers
constexpr double kSlow = -0.0145;           // log2 0.99: if a token forgets more, old errors do not last

double flop(const Problem& p) { return double(tokens(p)) * double(p.K * p.V) * (2. * double(p.H) + 3. * double(p.Hs)); }

// The update of y by the tokens of a tile. With `times` it is 2^L y + k v. With `plus`, for decays
// close to 1, it is y + ((2^L - 1) y + k v): the rounding error of 2^L would be raised to the power
// of the number of tokens. A tile with tokens of both kinds is `mixed`: it adds 1 or 0 times y,
// with the same bits as a result.
enum class Update { times, plus, mixed };

// The operands of one pass of a tile of n tokens, for a block of ranks and a block of columns.
template <class T>
struct RankPass {
  int n;
  int64_t G;
  const T *decay, *keep;  // [n]: 2^L and 0, or 2^L - 1 and 1
  Matrix<const T> k, v;   // [n, ranks], [n, columns]
  Matrix<const T> q;      // [n G, ranks]
  Matrix<T> o;            // [n G, columns]
};

// y of R ranks <- its update by token t, whose k is at `k` and whose v is v.
template <Update kUpdate, class T, int R, int W>
LC_INLINE void update(Tile<T, R, W>& y, const RankPass<T>& a, int t, const T* k, const Vec<T> (&v)[W]) {
  const Vec<T> decay = broadcast<T>(a.decay[t]), keep = broadcast<T>(a.keep[t]);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vec<T> kt = broadcast<T>(k[r]);
#pragma GCC unroll 2
    for (int j = 0; j < W; ++j) {
      Vec<T>& x = y.x[r][j];
      const Vec<T> change = x * decay + kt * v[j];
      x = kUpdate == Update::times ? change : kUpdate == Update::plus ? x + change : x * keep + change;
    }
  }
}

// o += the sum over R ranks of q_r y_r, for one token of one q head.
template <class T, int R, int W>
LC_INLINE void read(const Tile<T, R, W>& y, const T* q, T* o) {
  Vec<T> sum[W];
#pragma GCC unroll 2
  for (int j = 0; j < W; ++j) sum[j] = load<T>(o + j * kLanes<T>);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vec<T> qt = broadcast<T>(q[r]);
#pragma GCC unroll 2
    for (int j = 0; j < W; ++j) sum[j] = qt * y.x[r][j] + sum[j];
  }
#pragma GCC unroll 2
  for (int j = 0; j < W; ++j) store<T>(o + j * kLanes<T>, sum[j]);
}

// Moves y of R ranks and W vectors of columns, which is at S, over all tokens of the tile.
template <class T, int R, int W, Update kUpdate>
__attribute__((noinline)) void pass(Matrix<T> S, const RankPass<T>& a) {
  count_flop(a.n * R * W * kLanes<T> * (3 + 2 * a.G));
  Tile<T, R, W> y;
  load(y, Matrix<const T>{S.data, S.ld});
  const T *k = a.k.data, *q = a.q.data, *v = a.v.data;
  T* o = a.o.data;
  for (int t = 0; t < a.n; ++t, k += a.k.ld, v += a.v.ld) {
    Vec<T> vt[W];
#pragma GCC unroll 2
    for (int j = 0; j < W; ++j) vt[j] = load<T>(v + j * kLanes<T>);
    update<kUpdate>(y, a, t, k, vt);
    for (int64_t g = 0; g < a.G; ++g, q += a.q.ld, o += a.o.ld) read(y, q, o);
  }
  store(S, y);
}

// Passes over the ranks [r, K), R of them at a time and then fewer.
template <class T, int R, int W, Update kUpdate>
LC_INLINE void ranks(Matrix<T> S, const RankPass<T>& tile, int64_t r, int64_t K) {
  for (; r + R <= K; r += R) {
    RankPass<T> a = tile;
    a.k.data += r;
    a.q.data += r;
    pass<T, R, W, kUpdate>(Matrix<T>{S.row(r), S.ld}, a);
  }
  if constexpr (R > 1) ranks<T, R / 2, W, kUpdate>(S, tile, r, K);
}

template <class T, int W>
LC_INLINE void ranks(Matrix<T> S, const RankPass<T>& tile, int64_t K, Update update) {
  constexpr int R = kStateVecs / W;
  switch (update) {
    case Update::times:
      return ranks<T, R, W, Update::times>(S, tile, 0, K);
    case Update::plus:
      return ranks<T, R, W, Update::plus>(S, tile, 0, K);
    case Update::mixed:
      return ranks<T, R, W, Update::mixed>(S, tile, 0, K);
  }
}

int64_t tile_tokens(const Problem& p) {
  return std::max<int64_t>(1, std::min({kTileTokens, 4 * kTileTokens / group(p), p.N}));
}

template <class E>
struct FleetWorker {
  using T = Accumulator<E>;
  static constexpr int kColumns = kWide * kLanes<T>;
  const Problem& p;
  const int64_t tile;  // most tokens of a tile
  const int64_t G;     // q heads per state
  const int64_t Kp;    // distance between rows of k and q, an odd number of cache lines if K fills an even number
  T *state, *decay, *keep, *k, *q, *v, *sums;

  FleetWorker(const Problem& problem, Arena& arena)
      : p(problem),
        tile(tile_tokens(p)),
        G(group(p)),
        Kp(padded<T>(p.K) + 64 / int64_t(sizeof(T))),
        state(arena.take<T>(p.K * padded<T>(p.V))),
        decay(arena.take<T>(tile)),
        keep(arena.take<T>(tile)),
        k(arena.take<T>(tile * Kp)),
        q(arena.take<T>(tile * G * Kp)),
        v(arena.take<T>(tile * kColumns)),
        sums(arena.take<T>(tile * G * kColumns)) {}

  // Loads the decays of tokens [t, t + n) and returns the kind of update that they need.
  Update load_decays(const Sequence& s, int64_t hs, int64_t t, int n) {
    int slow = 0;
    for (int i = 0; i < n; ++i) {
      if (i && p.decay != Decay::per_token) {
        decay[i] = decay[0];
        keep[i] = keep[0];
      } else {
        const double x = log2_decay(p, s.row, hs, t + i);
        keep[i] = x > kSlow;
        decay[i] = T(x > kSlow ? std::expm1(x / kLog2e) : std::exp2(x));
      }
      slow += keep[i] > 0;
    }
    return slow == 0 ? Update::times : slow == n ? Update::plus : Update::mixed;
  }

  // Computes tokens [t, t + n) of (s, hs) in the vectors [c0, c1) of columns.
  void tokens_through(const Sequence& s, int64_t hs, int64_t t, int n, int c0, int c1) {
    const Update update = load_decays(s, hs, t, n);
    load<T>(Matrix<T>{k, Kp}, Matrix<const E>{p.k.at<const E>(s.row, k_head(p, hs), t), p.k.stride[2]}, n, int(p.K));
    for (int64_t g = 0; g < G; ++g)  // [token, head]
      load<T>(Matrix<T>{q + g * Kp, G * Kp},
              Matrix<const E>{p.q.at<const E>(s.row, q_head(p, hs * G + g), t), p.q.stride[2]}, n, int(p.K));

    for (int c = c0; c < c1; c += kWide) {
      const int begin = c * kLanes<T>, wide = std::min(kWide, c1 - c);
      const int columns = std::min(int(p.V) - begin, wide * kLanes<T>);
      load<T>(Matrix<T>{v, kColumns}, Matrix<const E>{p.v.at<const E>(s.row, v_head(p, hs), t) + begin, p.v.stride[2]},
              n, columns);
      std::memset(sums, 0, sizeof(T) * size_t(n * G * kColumns));
      const RankPass<T> a{n, G, decay, keep, {k, Kp}, {v, kColumns}, {q, Kp}, {sums, kColumns}};
      const Matrix<T> S{state + begin, padded<T>(p.V)};
      if (wide == kWide)
        ranks<T, kWide>(S, a, p.K, update);
      else
        ranks<T, 1>(S, a, p.K, update);
      store_outputs(s, hs, t, n, begin, columns);
    }
  }

  void store_outputs(const Sequence& s, int64_t hs, int64_t t, int n, int begin, int columns) const {
    const Vec<T> scale = broadcast<T>(T(p.scale));
    for (int64_t i = 0; i < n * G; ++i) {
      T* sum = sums + i * kColumns;
      for (int j = 0; j < kColumns; j += kLanes<T>) store<T>(sum + j, load<T>(sum + j) * scale);
      store_row<T>(p.o.at<E>(s.row, hs * G + i % G, t + i / G) + begin, sum, columns);
    }
  }

  // A whole sequence in the vectors [c0, c1) of columns.
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
      tokens_through(s, hs, s.begin + t, int(std::min(tile, s.length - t)), c0, c1);
    if (p.final_state)
      for (int64_t r = 0; r < p.K; ++r)
        store_row<T>(p.final_state.at<T>(b, hs, r) + begin, state + r * Vp + begin, columns);
  }
};

// The number of pieces that the columns of one state are cut into.
int64_t splits(const Problem& p, int workers) {
  const int64_t states = p.B * p.Hs, most = vectors<float>(p.V);
  return balanced(states, workers) ? 1 : std::min<int64_t>(most, workers);
}

int workers(const Problem& p) { return workers_for(p, p.B * p.Hs * vectors<float>(p.V), flop(p)); }

size_t workspace(const Problem& p) { return scratch_bytes<FleetWorker>(p, workers(p)); }

void run(const Problem& p) {
  Tasks tasks(p);
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    run_workers(workers(p), [&](int index, int granted) {
      Arena arena(p.workspace);
      FleetWorker<E> worker = cut<FleetWorker, E>(p, arena, index);
      const int64_t parts = splits(p, granted), n = vectors<Accumulator<E>>(p.V);
      tasks.each(p.B * p.Hs * parts, index, granted, [&](int64_t i) {
        const int64_t part = i % parts, hs = i / parts % p.Hs, b = i / parts / p.Hs;
        worker.forward(b, hs, int(n * part / parts), int(n * (part + 1) / parts));
      });
    });
  });
}

Cost cost(const Problem& p) {
  return predict(p, {flop(p), /*extra_bytes=*/0, /*depth=*/mean_length(p), /*tasks=*/double(p.B * p.H)},
                 /*efficiency=*/0.6, workers(p));
}

}  // namespace

extern const Method fleet_cpu = {
    {"fleet", "cpu", "rank by rank: decayed cumulative sums", "Wang et al. 2025 (LeetDecoding), arXiv:2501.02573"},
    {Feature::forward | kAllTypes | kAllDecays | kSequences},
    refuses_nothing,
    cost,
    workspace,
    run};

}  // namespace lc::LC_ISA
