// conv.cpp - CPU: the causal convolution of each channel with W taps, and its steps.
//
//   u_t = bias + sum_i weight_i x_{t-W+1+i}, y_t = u_t or silu(u_t)
//
//   Vectors run over channels or over tokens, whichever is contiguous in x and y. Other layouts, and
//   tokens that read the initial state, go through blocks in scratch.
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
LC_INLINE TaskSize task_size(Layout layout) {
  if (layout == Layout::channels) return {512, 128};
  if (layout == Layout::tokens) return {16, 4096};
  return {kChannels, 8 * kTokens};
}

// An output that does not stay in the caches is written past them.
constexpr double kPastCaches = 8e6;  // bytes

// u_j = bias + sum_i weight_i x_(j+i) for J vectors of outputs, `step` elements apart. x holds the
// oldest input of the first output, and taps are `tap` elements apart. Only the first `lanes`
// elements of a vector exist, where lanes is not 0.
template <int J, int kTaps, bool kSilu, class T, class E>
LC_INLINE void outputs(Vec<T> (&u)[J], const E* x, int64_t step, int64_t tap, const T* weight, int64_t ld, Vec<T> bias,
                       int taps, int lanes = 0) {
#pragma GCC unroll 4
  for (int j = 0; j < J; ++j) u[j] = bias;
  const int W = kTaps ? kTaps : taps;
#pragma GCC unroll 4
  for (int i = 0; i < W; ++i) {
    const Vec<T> w = load<T>(weight + i * ld);
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      const E* from = x + j * step + i * tap;
      u[j] = w * (lanes ? load<T>(from, lanes) : load<T>(from)) + u[j];
    }
  }
  if constexpr (kSilu) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) u[j] = silu<T>(u[j]);
  }
}

// The outputs that are not a whole vector.
template <bool kSilu, class T, class In, class Out>
__attribute__((noinline)) void edge(const In* x, Out* y, int64_t tap, const T* weight, int64_t ld, Vec<T> bias,
                                    int taps, int lanes) {
  if (!lanes) return;
  Vec<T> u[1];
  outputs<1, 0, kSilu>(u, x, 0, tap, weight, ld, bias, taps, lanes);
  store<T>(y, u[0], lanes);
}

// The elements from p to the next address at which a vector can be written past the caches.
template <class T, class E>
LC_INLINE int misaligned(const E* p) {
  constexpr size_t bytes = kLanes<T> * sizeof(E);
  return int((bytes - reinterpret_cast<uintptr_t>(p) % bytes) % bytes / sizeof(E));
}

template <bool kPastCaches, class T, class E>
LC_INLINE void put(E* to, Vec<T> u) {
  if constexpr (kPastCaches)
    store_past_caches<T>(to, u);
  else
    store<T>(to, u);
}

// y [n, C] of x [n + W - 1, C], rows of channels. With kPastCaches all rows of y have one
// alignment.
template <int kTaps, bool kSilu, bool kPastCaches, class T, class In, class Out>
__attribute__((noinline)) void along_channels(Matrix<const In> x, Matrix<Out> y, int64_t n, int C,
                                              const Taps<T>& taps) {
  constexpr int L = kLanes<T>;
  const int head = kPastCaches ? std::min(C, misaligned<T>(y.data)) : 0, tail = head + (C - head) / L * L;
  const auto rows = [&](auto J, int64_t t) {
    for (int j = 0; j < J; ++j)
      for (const auto& [c, lanes] : {std::pair{0, head}, std::pair{tail, C - tail}})
        edge<kSilu, T>(x.row(t + j) + c, y.row(t + j) + c, x.ld, taps.weight + c, taps.ld, load<T>(taps.bias + c),
                       taps.W, lanes);
    for (int c = head; c < tail; c += L) {
      Vec<T> u[J];
      outputs<J, kTaps, kSilu>(u, x.row(t) + c, x.ld, x.ld, taps.weight + c, taps.ld, load<T>(taps.bias + c), taps.W);
      for (int j = 0; j < J; ++j) put<kPastCaches, T>(y.row(t + j) + c, u[j]);
    }
  };
  int64_t t = 0;
  for (; t + 4 <= n; t += 4) rows(std::integral_constant<int, 4>{}, t);
  for (; t < n; ++t) rows(std::integral_constant<int, 1>{}, t);
}

// y [n] of x [n + W - 1], tokens of the first channel of `taps`.
template <int kTaps, bool kSilu, bool kPastCaches, class T, class E>
__attribute__((noinline)) void along_tokens(const E* x, E* y, int64_t n, const Taps<T>& taps) {
  constexpr int L = kLanes<T>;
  T weight[kMostTaps * L];
  for (int i = 0; i < taps.W; ++i) store<T>(weight + i * L, broadcast<T>(taps.weight[i * taps.ld]));
  const Vec<T> bias = broadcast<T>(taps.bias[0]);
  const int head = kPastCaches ? int(std::min<int64_t>(n, misaligned<T>(y))) : 0;
  const auto whole = [&](auto J, int64_t t) {
    for (; t + J * L <= n; t += J * L) {
      Vec<T> u[J];
      outputs<J, kTaps, kSilu>(u, x + t, L, 1, weight, L, bias, taps.W);
      for (int j = 0; j < J; ++j) put<kPastCaches, T>(y + t + j * L, u[j]);
    }
    return t;
  };
  edge<kSilu, T>(x, y, 1, weight, L, bias, taps.W, head);
  int64_t t = whole(std::integral_constant<int, 4>{}, head);
  t = whole(std::integral_constant<int, 1>{}, t);
  edge<kSilu, T>(x + t, y + t, 1, weight, L, bias, taps.W, int(n - t));
}

template <class E>
struct ForwardWorker {
  using T = Accumulator<E>;
  const ConvProblem& p;
  const Layout form;
  const bool past_caches;
  Taps<T> taps;
  T *in, *out, *turned;

  ForwardWorker(const ConvProblem& problem, Arena& arena)
      : p(problem),
        form(layout(p)),
        past_caches(double(p.cu_bits ? p.N : p.B * p.N) * double(p.D) * sizeof(E) > kPastCaches &&
                    (form == Layout::tokens || p.y.stride[2] % kLanes<T> == 0)),
        taps(p, arena, task_size(form).channels),
        in(arena.take<T>((kTokens + kMostTaps) * kChannels)),
        out(arena.take<T>(kTokens * kChannels)),
        turned(arena.take<T>(kChannels * kTokens)) {}

  // Calls f with the number of taps, 0 if it is not compiled in, and with whether there is an
  // activation.
  template <class F>
  LC_INLINE void with_options(F&& f) const {
    using Four = std::integral_constant<int, 4>;
    using Any = std::integral_constant<int, 0>;
    if (p.silu)
      p.W == 4 ? f(Four{}, std::true_type{}) : f(Any{}, std::true_type{});
    else
      p.W == 4 ? f(Four{}, std::false_type{}) : f(Any{}, std::false_type{});
  }

  // The state that a sequence starts from, and its slot.
  LC_INLINE const View& initial() const { return p.op == LC_DECODE ? p.final_state : p.initial_state; }
  LC_INLINE int64_t state_of(int64_t s) const { return p.op == LC_DECODE ? slot(p, s) : s; }

  // Tokens [t, t + n) of a piece, through scratch.
  void through_scratch(const Piece& piece, int64_t t, int n, int64_t d, int C) {
    for (int c = 0; c < C; c += kChannels) {
      const int wide = std::min(kChannels, C - c);
      load_inputs<E>(p, Matrix<T>{in, kChannels}, piece, initial(), state_of(piece.s), t - p.W + 1, n + int(p.W) - 1,
                     d + c, wide);
      with_options([&](auto W, auto silu) {
        along_channels<W, silu, false>(Matrix<const T>{in, kChannels}, Matrix<T>{out, kChannels}, n, wide, taps.at(c));
      });
      store_block<T>(strided<E>(p.y, piece.place.row, d + c, piece.place.begin + t), Matrix<const T>{out, kChannels},
                     wide, n, turned);
    }
  }

  // Tokens [t, t + n) of a piece, none of which reads the initial state.
  void direct(const Piece& piece, int64_t t, int64_t n, int64_t d, int C) {
    const int64_t first = piece.place.begin + t;
    const E* x = p.x.at<const E>(piece.place.row, d, first) - (p.W - 1) * p.x.stride[2];
    E* y = p.y.at<E>(piece.place.row, d, first);
    const auto all = [&](auto past) {
      with_options([&](auto W, auto silu) {
        if (form == Layout::channels)
          return along_channels<W, silu, past>(Matrix<const E>{x, p.x.stride[2]}, Matrix<E>{y, p.y.stride[2]}, n, C,
                                               taps);
        for (int c = 0; c < C; ++c)
          along_tokens<W, silu, past>(x + c * p.x.stride[1], y + c * p.y.stride[1], n, taps.at(c));
      });
    };
    past_caches ? all(std::true_type{}) : all(std::false_type{});
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
    const int64_t length = piece.end - piece.begin, reads_state = piece.begin ? 0 : std::min(length, p.W - 1);
    const bool none_direct = form == Layout::scattered || (form == Layout::tokens && length <= kTokens);
    const int64_t direct_from = none_direct ? piece.end : piece.begin + reads_state;
    for (int64_t t = piece.begin; t < direct_from; t += kTokens)
      through_scratch(piece, t, int(std::min<int64_t>(kTokens, direct_from - t)), d, C);
    if (direct_from < piece.end) direct(piece, direct_from, piece.end - direct_from, d, C);
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
        size(task_size(layout(p))),
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
