// conv.cpp - CPU: the causal convolution of each channel with W taps, and its steps.
//
//   u_t = bias + sum_i weight_i x_{t-W+1+i}, y_t = u_t or silu(u_t)
//
//   Vectors run over channels or over tokens, whichever is contiguous in x and y. Other layouts and
//   tokens that read the initial state go through blocks in scratch.
//   B D N (2W flop, silu: about 20 more); x is read once and y written once: memory is the limit
//   tasks: (piece of a sequence, channels) pairs
//   Gu and Dao 2023 (Mamba), arXiv:2312.00752; Fu et al. 2022 (H3), arXiv:2212.14052
#include "conv.h"

namespace lc::LC_ISA {
namespace {

// How the elements of x and y are in memory.
enum class Layout { channels, tokens, scattered };  // what is contiguous

LC_INLINE Layout layout(const ConvProblem& p) {
  const auto contiguous = [&](int axis, int64_t size) {
    return size == 1 || (p.x.stride[axis] == 1 && p.y.stride[axis] == 1);
  };
  return contiguous(2, p.N) ? Layout::tokens : contiguous(1, p.D) ? Layout::channels : Layout::scattered;
}

// The channels and the tokens of one task.
struct TaskSize {
  int channels;
  int64_t tokens;
};
LC_INLINE TaskSize task_size(const ConvProblem& p) {
  const Layout form = layout(p);
  if (form == Layout::channels) return {kManyChannels, 128};
  if (form == Layout::scattered || p.N <= kTokens) return {4 * kChannels, 8 * kTokens};
  return {16, 4096};
}

// An output that does not stay in the caches is written past them.
constexpr double kCaches = 8e6;  // bytes

template <bool kPastCaches, class T, class E>
LC_INLINE void put(E* to, Vec<T> u) {
  if constexpr (kPastCaches)
    store_past_caches<T>(to, u);
  else
    store<T>(to, u);
}

// Loads, or stores, one vector, of which the first `lanes` elements exist, or all if lanes is 0.
template <class T, class E>
LC_INLINE Vec<T> load_some(const E* p, int lanes) {
  return lanes ? load<T>(p, lanes) : load<T>(p);
}
template <bool kPastCaches, class T, class E>
LC_INLINE void put_some(E* to, Vec<T> u, int lanes) {
  if (lanes)
    store<T>(to, u, lanes);
  else
    put<kPastCaches, T>(to, u);
}

// The elements from p to the next address at which a vector can be written past the caches.
template <class T, class E>
LC_INLINE int misaligned(const E* p) {
  constexpr size_t bytes = kLanes<T> * sizeof(E);
  return int((bytes - reinterpret_cast<uintptr_t>(p) % bytes) % bytes / sizeof(E));
}

// ---- vectors of channels ------------------------------------------------------------------------

// The last W - 1 inputs of consecutive channels, as rows of scratch in the order of the tokens. A
// new input takes the row of the oldest one.
template <class T>
struct History {
  T* row[kMostTaps - 1];
  int size;  // W - 1

  LC_INLINE History(T* rows, int64_t ld, int W) : size(W - 1) {
    for (int i = 0; i < size; ++i) row[i] = rows + i * ld;
  }
  // Moves the oldest row to the end, where a new input has been written to it.
  LC_INLINE void advance() {
    T* const oldest = row[0];
    for (int i = 1; i < size; ++i) row[i - 1] = row[i];
    row[size - 1] = oldest;
  }
};

// J <= 2 outputs of V vectors of channels from c on, and their inputs into the history.
template <int J, int V, int kTaps, bool kSilu, bool kPastCaches, class T>
LC_INLINE void step(const History<T>& history, Matrix<const T> x, Matrix<T> y, int c, Taps<T> taps, int lanes = 0) {
  constexpr int L = kLanes<T>;
  const int W = kTaps ? kTaps : taps.W;
  Vec<T> u[V][J];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int at = c + v * L;
    const T* weight = taps.weight + at;
    Vec<T> in[J];
    for (int j = 0; j < J; ++j) {
      in[j] = load_some<T>(x.row(j) + at, lanes);
      u[v][j] = load<T>(taps.bias + at);
    }
#pragma GCC unroll 4
    for (int i = 0; i < W - 1; ++i) {
      const Vec<T> before = load<T>(history.row[i] + at);
      u[v][0] = load<T>(weight + i * taps.ld) * before + u[v][0];
      if constexpr (J == 2)
        if (i > 0) u[v][1] = load<T>(weight + (i - 1) * taps.ld) * before + u[v][1];
    }
    const Vec<T> newest = load<T>(weight + (W - 1) * taps.ld);
    u[v][0] = newest * in[0] + u[v][0];
    if constexpr (J == 2) u[v][1] = newest * in[1] + (load<T>(weight + (W - 2) * taps.ld) * in[0] + u[v][1]);
    if (W > 2) put_some<false, T>(history.row[0] + at, in[0], lanes);
    put_some<false, T>(history.row[W > 2 ? J - 1 : 0] + at, in[J - 1], lanes);
  }
  if constexpr (kSilu)
    for (int v = 0; v < V; ++v)
      for (int j = 0; j < J; ++j) u[v][j] = silu<T>(u[v][j]);
  for (int j = 0; j < J; ++j)
    for (int v = 0; v < V; ++v) put_some<kPastCaches, T>(y.row(j) + c + v * L, u[v][j], lanes);
}

// The channels [c, c + lanes), which are less than a vector, of one token.
template <bool kSilu, class T>
__attribute__((noinline)) void edge(const History<T>& history, Matrix<const T> x, Matrix<T> y, int c,
                                    const Taps<T>& taps, int lanes) {
  if (lanes) step<1, 1, 0, kSilu, false>(history, x, y, c, taps, lanes);
}

// y [n, C] of x [n, C], rows of channels. The history holds the inputs before x, and then the last
// ones of x. Whole cache lines are written at once. With kPastCaches all rows of y have one
// alignment.
template <int kTaps, bool kSilu, bool kPastCaches, class T>
__attribute__((noinline)) void along_channels(History<T>& history, Matrix<const T> x, Matrix<T> y, int64_t n, int C,
                                              Taps<T> taps) {
  constexpr int L = kLanes<T>, kLine = 64 / kVectorBytes;
  const int head = kPastCaches ? std::min(C, misaligned<T>(y.data)) : 0, tail = head + (C - head) / L * L;
  const auto tokens = [&](auto J) {
    const History<T> first = history;
    for (int j = 0; j < J; ++j) {
      edge<kSilu>(history, {x.row(j), x.ld}, {y.row(j), y.ld}, 0, taps, head);
      edge<kSilu>(history, {x.row(j), x.ld}, {y.row(j), y.ld}, tail, taps, C - tail);
      history.advance();
    }
    const Taps<T> local = taps;
    const Matrix<const T> from = x;
    const Matrix<T> to = y;
    const T* next = from.row(n > J ? J : 0);
    int c = head;
    for (; c + kLine * L <= tail; c += kLine * L) {
      for (int j = 0; j < J; ++j) __builtin_prefetch(next + j * from.ld + c);
      step<J, kLine, kTaps, kSilu, kPastCaches>(first, from, to, c, local);
    }
    for (; c < tail; c += L) step<J, 1, kTaps, kSilu, kPastCaches>(first, from, to, c, local);
    x.data += J * x.ld;
    y.data += J * y.ld;
  };
  for (; n >= 2; n -= 2) tokens(std::integral_constant<int, 2>{});
  if (n) tokens(std::integral_constant<int, 1>{});
}

// ---- vectors of tokens --------------------------------------------------------------------------

// Outputs of V vectors of tokens: x is the oldest input of the first output. weight [W] are whole
// vectors.
template <int V, int kTaps, bool kSilu, bool kPastCaches, class T>
LC_INLINE void step(const T* x, T* y, const Vec<T>* weight, Vec<T> bias, int taps, int lanes = 0) {
  constexpr int L = kLanes<T>;
  Vec<T> u[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) u[v] = bias;
  const int W = kTaps ? kTaps : taps;
#pragma GCC unroll 4
  for (int i = 0; i < W; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) u[v] = weight[i] * load_some<T>(x + v * L + i, lanes) + u[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) put_some<kPastCaches, T>(y + v * L, kSilu ? silu<T>(u[v]) : u[v], lanes);
}

template <bool kSilu, class T>
__attribute__((noinline)) void edge(const T* x, T* y, const Vec<T>* weight, Vec<T> bias, int taps, int lanes) {
  if (lanes) step<1, 0, kSilu, false, T>(x, y, weight, bias, taps, lanes);
}

// y [n] of x [n + W - 1], tokens of the first channel of `taps`.
template <int kTaps, bool kSilu, bool kPastCaches, class T>
__attribute__((noinline)) void along_tokens(const T* x, T* y, int64_t n, const Taps<T>& taps) {
  constexpr int L = kLanes<T>, V = 4;
  Vec<T> weight[kMostTaps];
  for (int i = 0; i < taps.W; ++i) weight[i] = broadcast<T>(taps.weight[i * taps.ld]);
  const Vec<T> bias = broadcast<T>(taps.bias[0]);
  const int head = kPastCaches ? int(std::min<int64_t>(n, misaligned<T>(y))) : 0;
  edge<kSilu, T>(x, y, weight, bias, taps.W, head);
  int64_t t = head;
  for (; t + V * L <= n; t += V * L) step<V, kTaps, kSilu, kPastCaches, T>(x + t, y + t, weight, bias, taps.W);
  for (; t + L <= n; t += L) step<1, kTaps, kSilu, kPastCaches, T>(x + t, y + t, weight, bias, taps.W);
  edge<kSilu, T>(x + t, y + t, weight, bias, taps.W, int(n - t));
}

// Writes n outputs, rounded to E.
template <class T, class E>
LC_INLINE void put_row(E* to, const T* from, int n, bool past_caches) {
  constexpr int L = kLanes<T>;
  if (!past_caches) return store_row<T>(to, from, n);
  int i = std::min(n, misaligned<T>(to));
  if (i) store<T>(to, load<T>(from), i);
  for (; i + L <= n; i += L) store_past_caches<T>(to + i, load<T>(from + i));
  if (i < n) store<T>(to + i, load<T>(from + i), n - i);
}

template <class E>
struct ForwardWorker {
  using T = Accumulator<E>;
  const ConvProblem& p;
  const Layout form;
  const bool past_caches;
  static constexpr int64_t kWidened = 1024;  // inputs of 16 bits at once
  // The largest of: a block of tokens and channels, the history of many channels, widened inputs.
  static constexpr int64_t kInputs =
      std::max({(kTokens + kMostTaps) * int64_t{kChannels}, (kMostTaps - 1) * int64_t{kManyChannels}, kWidened + 64});
  Taps<T> taps;
  T *in, *out, *turned;

  ForwardWorker(const ConvProblem& problem, Arena& arena)
      : p(problem),
        form(layout(p)),
        past_caches(double(p.cu_bits ? p.N : p.B * p.N) * double(p.D) * sizeof(E) > kCaches),
        taps(p, arena, task_size(p).channels),
        in(arena.take<T>(kInputs)),
        out(arena.take<T>(kTokens * kChannels)),
        turned(arena.take<T>(kChannels * kTokens)) {}

  // Calls f with the number of taps, 0 if it is not compiled in, with whether there is an
  // activation, and with `past`.
  template <class F>
  LC_INLINE void with_options(bool past, F&& f) const {
    using True = std::true_type;
    using False = std::false_type;
    const auto with = [&](auto W, auto silu) { past ? f(W, silu, True{}) : f(W, silu, False{}); };
    using Four = std::integral_constant<int, 4>;
    using Any = std::integral_constant<int, 0>;
    if (p.silu)
      p.W == 4 ? with(Four{}, True{}) : with(Any{}, True{});
    else
      p.W == 4 ? with(Four{}, False{}) : with(Any{}, False{});
  }

  // The state that a sequence starts from, and its slot.
  LC_INLINE const View& initial() const { return p.op == LC_DECODE ? p.final_state : p.initial_state; }
  LC_INLINE int64_t state_of(int64_t s) const { return p.op == LC_DECODE ? slot(p, s) : s; }

  // Tokens [t, t + n) of a piece, through scratch.
  void through_scratch(const Piece& piece, int64_t t, int n, int64_t d, int C) {
    const int before = int(p.W) - 1;
    for (int c = 0; c < C; c += kChannels) {
      const int wide = std::min(kChannels, C - c);
      load_inputs<E>(p, Matrix<T>{in, kChannels}, piece, initial(), state_of(piece.s), t - before, n + before, d + c,
                     wide);
      History<T> history(in, kChannels, int(p.W));
      with_options(false, [&](auto W, auto silu, auto) {
        along_channels<W, silu, false, T>(history, {in + before * kChannels, kChannels}, {out, kChannels}, n, wide,
                                          taps.at(c));
      });
      store_block<T>(strided<E>(p.y, piece.place.row, d + c, piece.place.begin + t), Matrix<const T>{out, kChannels},
                     wide, n, turned);
    }
  }

  // A piece with contiguous channels. Numbers of 16 bits go through scratch, two tokens at a time.
  void channels(const Piece& piece, int64_t d, int C) {
    const int64_t ld = taps.ld, first = piece.place.begin + piece.begin, n = piece.end - piece.begin;
    load_inputs<E>(p, Matrix<T>{in, ld}, piece, initial(), state_of(piece.s), piece.begin - p.W + 1, int(p.W) - 1, d,
                   C);
    History<T> history(in, ld, int(p.W));
    const Matrix<const E> x{p.x.at<const E>(piece.place.row, d, first), p.x.stride[2]};
    const Matrix<E> y{p.y.at<E>(piece.place.row, d, first), p.y.stride[2]};
    if constexpr (std::is_same_v<E, T>) {
      with_options(past_caches && y.ld % kLanes<T> == 0,
                   [&](auto W, auto silu, auto past) { along_channels<W, silu, past, T>(history, x, y, n, C, taps); });
    } else {
      T* const wide = turned;
      for (int64_t t = 0; t < n; t += 2) {
        const int some = n - t < 2 ? 1 : 2;
        for (int j = 0; j < some; ++j) load_row<T>(wide + j * ld, x.row(t + j), C);
        with_options(false, [&](auto W, auto silu, auto) {
          along_channels<W, silu, false, T>(history, {wide, ld}, {out, ld}, some, C, taps);
        });
        for (int j = 0; j < some; ++j) put_row<T>(y.row(t + j), out + j * ld, C, past_caches);
      }
    }
  }

  // Tokens [t, t + n) of a piece with contiguous tokens, none of which reads the initial state.
  // Numbers of 16 bits go through scratch.
  void tokens(const Piece& piece, int64_t t, int64_t n, int64_t d, int C) {
    const int before = int(p.W) - 1;
    for (int c = 0; c < C; ++c) {
      const E* x = p.x.at<const E>(piece.place.row, d + c, piece.place.begin + t) - before;
      E* y = p.y.at<E>(piece.place.row, d + c, piece.place.begin + t);
      if constexpr (std::is_same_v<E, T>) {
        with_options(past_caches,
                     [&](auto W, auto silu, auto past) { along_tokens<W, silu, past, T>(x, y, n, taps.at(c)); });
      } else {
        for (int64_t i = 0; i < n; i += kWidened) {
          const int some = int(std::min(kWidened, n - i));
          load_row<T>(in, x + i, some + before);
          with_options(false,
                       [&](auto W, auto silu, auto) { along_tokens<W, silu, false, T>(in, out, some, taps.at(c)); });
          put_row<T>(y + i, out, some, past_caches);
        }
      }
    }
  }

  void write_zeros(const Piece& piece, int64_t d, int C) {
    clear(out, kTokens * kChannels);
    for (int64_t t = piece.begin; t < piece.end; t += kTokens)
      for (int c = 0; c < C; c += kChannels)
        store_block<T>(strided<E>(p.y, piece.place.row, d + c, piece.place.begin + t), Matrix<const T>{out, kChannels},
                       std::min(kChannels, C - c), int(std::min<int64_t>(kTokens, piece.end - t)), turned);
  }

  // The final state may be the initial state: blocks are read before they are written, and a later
  // block reads no earlier input than the last one wrote.
  void write_final_state(const Piece& piece, int64_t d, int C) {
    const int64_t state = state_of(piece.s);
    for (int c = 0; c < C; c += kChannels)
      for (int64_t l = 0; l < p.L; l += kTokens) {
        const int n = int(std::min<int64_t>(kTokens, p.L - l)), wide = std::min(kChannels, C - c);
        load_inputs<E>(p, Matrix<T>{in, kChannels}, piece, initial(), state, piece.place.length - p.L + l, n, d + c,
                       wide);
        store_block<E, T>(p.state_type, p.final_state, state, d + c, l, Matrix<const T>{in, kChannels}, wide, n,
                          turned);
      }
  }

  void run(const Piece& piece, int64_t d, int C) {
    if (state_of(piece.s) < 0) return write_zeros(piece, d, C);
    taps.template load<E>(p, d, C);
    if (form == Layout::channels) {
      channels(piece, d, C);
    } else {
      const int64_t length = piece.end - piece.begin, reads_state = piece.begin ? 0 : std::min(length, p.W - 1);
      const bool none_direct = form == Layout::scattered || length <= kTokens;
      const int64_t end = none_direct ? piece.end : piece.begin + reads_state;
      for (int64_t t = piece.begin; t < end; t += kTokens)
        through_scratch(piece, t, int(std::min<int64_t>(kTokens, end - t)), d, C);
      if (end < piece.end) tokens(piece, end, piece.end - end, d, C);
    }
    if (piece.begin == 0 && p.final_state) write_final_state(piece, d, C);
  }
};

// The tasks of a forward pass or step.
struct Forward {
  const ConvProblem& p;
  const TaskSize size;
  const int64_t blocks;  // of channels
  Arena arena;
  Pieces pieces;
  const int workers;

  explicit Forward(const ConvProblem& problem, void* memory)
      : p(problem),
        size(task_size(p)),
        blocks((p.D + size.channels - 1) / size.channels),
        arena(memory),
        pieces(p, arena, size.tokens),
        workers(workers_of(p, pieces.most() * blocks)) {}
};

size_t workspace(const ConvProblem& p) {
  if (p.op == LC_BACKWARD) return conv_backward_workspace(p);
  Forward f(p, nullptr);
  with_type(p.type, [&](auto e) {
    for (int i = 0; i < f.workers; ++i) ForwardWorker<decltype(e)>(p, f.arena);
  });
  return f.arena.used();
}

void run(const ConvProblem& p) {
  if (p.op == LC_BACKWARD) return conv_backward(p);
  Forward f(p, p.workspace);
  f.pieces.make();
  Tasks tasks(p);
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    run_workers(f.workers, [&](int index, int granted) {
      Arena arena = f.arena;
      for (int i = 0; i < index; ++i) ForwardWorker<E>(p, arena);
      ForwardWorker<E> worker(p, arena);
      tasks.each(f.pieces.total() * f.blocks, index, granted, [&](int64_t i) {
        const int64_t d = i % f.blocks * f.size.channels;
        worker.run(f.pieces.at(i / f.blocks), d, int(std::min<int64_t>(f.size.channels, p.D - d)));
      });
      finish_stores();
    });
  });
}

}  // namespace

extern const Conv conv = {workspace, run};

}  // namespace lc::LC_ISA
