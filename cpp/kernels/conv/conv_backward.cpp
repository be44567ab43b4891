// conv_backward.cpp - CPU: the gradients of the causal convolution.
//
//   du_t = dy_t, or dy_t s (1 + u_t (1 - s)) with silu, where s = sigmoid(u_t)
//   dx_t = sum_i weight_i du_{t+W-1-i},  dweight_i = sum_t du_t x_{t-W+1+i},  dbias = sum_t du_t
//
//   u is computed again. Blocks of tokens and channels go through scratch, in every layout. Sums over
//   tokens are formed per block, then per group of pieces, then over the groups in their order, so
//   that they do not depend on the number of threads.
//   B D N (6W flop, silu: about 30 more)
//   Gu and Dao 2023 (Mamba), arXiv:2312.00752
#include "conv.h"

namespace lc::LC_ISA {
namespace {

constexpr int64_t kPieceTokens = 16 * kTokens;
constexpr int64_t kMostGroups = 16;
constexpr int kSums = int(kMostTaps) + 1;  // of the weights, and of the bias

template <class E>
struct BackwardWorker {
  using T = Accumulator<E>;
  static constexpr int L = kLanes<T>;
  static constexpr int kRows = kTokens + 2 * int(kMostTaps);
  const ConvProblem& p;
  const int W;
  Taps<T> taps;
  T *x, *du, *out, *state, *turned;

  BackwardWorker(const ConvProblem& problem, Arena& arena)
      : p(problem),
        W(int(p.W)),
        taps(p, arena, kChannels),
        x(arena.take<T>(kRows * kChannels)),
        du(arena.take<T>(kRows * kChannels)),
        out(arena.take<T>(kTokens * kChannels)),
        state(arena.take<T>(kTokens * kChannels)),
        turned(arena.take<T>(kChannels * kTokens)) {}

  static LC_INLINE Matrix<T> block(T* data, int row = 0) { return {data + row * kChannels, kChannels}; }

  // du of `rows` tokens from token t on; d_y is 0 after the sequence. x holds the inputs from token
  // t - W + 1 on.
  void load_du(const Piece& piece, int64_t t, int rows, int64_t d, int C) {
    const int live = int(std::min<int64_t>(rows, piece.place.length - t));
    if (p.d_y && live)
      load_block<T>(block(du), strided<const E>(p.d_y, piece.place.row, d, piece.place.begin + t), C, live);
    clear(du + (p.d_y ? live : 0) * kChannels, (rows - (p.d_y ? live : 0)) * int64_t{kChannels});
    if (!p.silu || !p.d_y) return;
    for (int r = 0; r < live; ++r)
      for (int c = 0; c < C; c += L) {
        Vec<T> u = load<T>(taps.bias + c);
        for (int i = 0; i < W; ++i)
          u = load<T>(taps.weight + i * taps.ld + c) * load<T>(x + (r + i) * kChannels + c) + u;
        const Vec<T> s = sigmoid<T>(u);
        T* to = du + r * kChannels + c;
        store<T>(to, load<T>(to) * (s * (T(1) + u * (T(1) - s))));
      }
  }

  // Writes the gradients of the n inputs from token t on to `out`. du holds those of u from token
  // `first` on. Inputs before the sequence are those of the initial state.
  void load_gradients(const Piece& piece, int64_t t, int n, int64_t first, int64_t d, int C) {
    // Input n - L + l of the sequence is number l of the final state.
    const int64_t l = t - piece.place.length + p.L;
    const int from = int(std::min<int64_t>(n, std::max<int64_t>(0, -l)));
    for (int r = 0; r < (p.d_final_state ? from : n); ++r) clear(out + r * kChannels, padded<T>(C));
    if (p.d_final_state && from < n)
      load_block<E>(block(out, from), p.state_type, p.d_final_state, piece.s, d, l + from, C, n - from);
    for (int r = 0; r < n; ++r)
      for (int i = 0; i < W; ++i) {
        const int64_t row = t + r + W - 1 - i - first;  // of du
        if (row < 0) continue;
        for (int c = 0; c < C; c += L) {
          T* to = out + r * kChannels + c;
          store<T>(to, load<T>(taps.weight + i * taps.ld + c) * load<T>(du + row * kChannels + c) + load<T>(to));
        }
      }
  }

  // Adds the sums over n tokens to sums [W + 1, kChannels].
  void add_sums(T* sums, int n, int C) const {
    for (int c = 0; c < C; c += L) {
      Vec<T> sum[kSums] = {};
      for (int r = 0; r < n; ++r) {
        const Vec<T> g = load<T>(du + r * kChannels + c);
        for (int i = 0; i < W; ++i) sum[i] = g * load<T>(x + (r + i) * kChannels + c) + sum[i];
        sum[W] += g;
      }
      for (int i = 0; i <= W; ++i) {
        T* to = sums + i * kChannels + c;
        store<T>(to, load<T>(to) + sum[i]);
      }
    }
  }

  // All gradients of tokens [t, t + n) of a piece.
  void tokens(const Piece& piece, int64_t t, int n, int64_t d, int C, T* sums) {
    const int ahead = int(std::min<int64_t>(W - 1, piece.place.length - t - n));
    load_inputs<E>(p, block(x), piece, p.initial_state, piece.s, t - W + 1, W - 1 + n + ahead, d, C);
    load_du(piece, t, n + W - 1, d, C);
    if (sums) add_sums(sums, n, C);
    if (p.d_x && n) {
      load_gradients(piece, t, n, t, d, C);
      store_block<T>(strided<E>(p.d_x, piece.place.row, d, piece.place.begin + t), Matrix<const T>(constant(out)), C, n,
                     turned);
    }
    if (t || !p.d_initial_state) return;
    for (int64_t l = 0; l < p.L; l += kTokens) {
      const int rows = int(std::min<int64_t>(kTokens, p.L - l));
      load_gradients(piece, l - p.L, rows, 0, d, C);
      store_block<E, T>(p.state_type, p.d_initial_state, piece.s, d, l, constant(out), C, rows, turned);
    }
  }

  static LC_INLINE Matrix<const T> constant(const T* data) { return {data, kChannels}; }

  void run(const Piece& piece, int64_t d, int C, T* sums) {
    int64_t t = piece.begin;
    do {
      tokens(piece, t, int(std::min<int64_t>(kTokens, piece.end - t)), d, C, sums);
      t += kTokens;
    } while (t < piece.end);
  }
};

// The tasks of a backward pass. A group is a run of consecutive pieces; each group has sums of its
// own.
struct Backward {
  const ConvProblem& p;
  const int64_t blocks;  // of channels
  const bool has_sums;
  Arena arena;
  Pieces pieces;
  int64_t groups;
  char* sums;
  const int workers;

  Backward(const ConvProblem& problem, void* memory)
      : p(problem),
        blocks((p.D + kChannels - 1) / kChannels),
        has_sums(p.d_weight || p.d_bias),
        arena(memory),
        pieces(p, arena, kPieceTokens),
        groups(std::min(kMostGroups, std::max<int64_t>(1, pieces.most()))),
        sums(arena.take<char>(has_sums ? groups * blocks * block_bytes() : 0)),
        workers(workers_of(p, groups * blocks)) {}

  int64_t block_bytes() const { return (p.W + 1) * kChannels * (p.type == Type::f64 ? 8 : 4); }
  template <class T>
  T* sums_of(int64_t group, int64_t block) const {
    return has_sums ? reinterpret_cast<T*>(sums + (group * blocks + block) * block_bytes()) : nullptr;
  }
  int channels(int64_t block) const { return int(std::min<int64_t>(kChannels, p.D - block * kChannels)); }
};

// Adds the sums of all groups in their order and writes d_weight and d_bias.
template <class E, class T = Accumulator<E>>
void write_sums(const Backward& call, int64_t block, T* turned) {
  const ConvProblem& p = call.p;
  T* total = call.sums_of<T>(0, block);
  for (int64_t group = 1; group < call.groups; ++group) {
    const T* more = call.sums_of<T>(group, block);
    for (int64_t i = 0; i < (p.W + 1) * kChannels; ++i) total[i] += more[i];
  }
  const View weight{p.d_weight.data, {0, p.d_weight.stride[0], p.d_weight.stride[1], 0}};
  const View bias{p.d_bias.data, {0, p.d_bias.stride[0], 0, 0}};
  const int64_t d = block * kChannels;
  if (weight)
    store_block<E, T>(p.weight_type, weight, 0, d, 0, Matrix<const T>{total, kChannels}, call.channels(block), int(p.W),
                      turned);
  if (bias)
    store_block<E, T>(p.bias_type, bias, 0, d, 0, Matrix<const T>{total + p.W * kChannels, kChannels},
                      call.channels(block), 1, turned);
}

}  // namespace

size_t conv_backward_workspace(const ConvProblem& p) {
  Backward call(p, nullptr);
  with_type(p.type, [&](auto e) {
    for (int i = 0; i < call.workers; ++i) BackwardWorker<decltype(e)>(p, call.arena);
  });
  return call.arena.used();
}

void conv_backward(const ConvProblem& p) {
  Backward call(p, p.workspace);
  call.pieces.make();
  Tasks tasks(p), ends(p);
  Barrier barrier;
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    using T = Accumulator<E>;
    run_workers(call.workers, [&](int index, int granted) {
      Arena arena = call.arena;
      for (int i = 0; i < index; ++i) BackwardWorker<E>(p, arena);
      BackwardWorker<E> worker(p, arena);
      tasks.each(call.groups * call.blocks, index, granted, [&](int64_t i) {
        const int64_t group = i / call.blocks, block = i % call.blocks, total = call.pieces.total();
        T* sums = call.sums_of<T>(group, block);
        if (sums) clear(sums, (p.W + 1) * kChannels);
        worker.taps.template load<E>(p, block * kChannels, call.channels(block));
        for (int64_t j = total * group / call.groups; j < total * (group + 1) / call.groups; ++j)
          worker.run(call.pieces.at(j), block * kChannels, call.channels(block), sums);
      });
      if (!call.has_sums) return;
      barrier.wait(granted);
      ends.each(call.blocks, index, granted, [&](int64_t block) { write_sums<E>(call, block, worker.turned); });
    });
  });
}

}  // namespace lc::LC_ISA
