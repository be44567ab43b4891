// conv.h - what the passes of the convolution share: blocks of tokens and channels in scratch, the
// weights of a block, and the division of a call into tasks. flop: as conv.cpp says.
//
//   A block is [tokens, channels] in the accumulator's type T, with kChannels numbers per row.
//
//   Gu and Dao 2023 (Mamba), arXiv:2312.00752
#pragma once
#include <algorithm>

#include "../../conv.h"
#include "../../cpu/activation.h"
#include "../../cpu/arena.h"
#include "../../cpu/threads.h"
#include "../../cpu/tile.h"

namespace lc::LC_ISA {

size_t conv_backward_workspace(const ConvProblem& p);
void conv_backward(const ConvProblem& p);

namespace {

constexpr int kChannels = 64, kTokens = 64;  // most of a block in scratch
constexpr int kManyChannels = 512;           // most of a block of a few tokens

template <class T>
LC_INLINE void clear(T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = 0;
}

// Elements of a tensor with the axes [channel, token].
template <class E>
struct Strided {
  E* data;
  int64_t channel, token;  // strides
};

template <class E>
LC_INLINE Strided<E> strided(const View& v, int64_t b, int64_t d, int64_t n) {
  return {v.at<E>(b, d, n), v.stride[1], v.stride[2]};
}

// Calls f with n as a constant, for n <= kMostTaps.
template <class F>
LC_INLINE void with_few(int n, F&& f) {
  switch (n) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    case 6:
      return f(std::integral_constant<int, 6>{});
    case 7:
      return f(std::integral_constant<int, 7>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
  }
}

// Copies n tokens of C channels element by element. A few contiguous tokens, as states and weights
// have them, are copied channel by channel.
template <class To, class From>
LC_INLINE void copy_elements(Strided<To> to, Strided<const From> from, int C, int n) {
  const auto turn = [&](auto count, int64_t t) {
    for (int c = 0; c < C; ++c)
      for (int i = 0; i < count; ++i)
        to.data[c * to.channel + (t + i) * to.token] = from.data[c * from.channel + (t + i) * from.token];
  };
  if (n <= kMostTaps)
    with_few(n, [&](auto count) { turn(count, 0); });
  else
    for (int t = 0; t < n; ++t) turn(std::integral_constant<int, 1>{}, t);
}

// Writes a block of n tokens and C channels to scratch. The channels up to the next whole vector
// become 0. Elements that are copied one by one are not read as vectors at once, since a vector
// waits until all stores to it are in the cache.
template <class T, class E>
__attribute__((noinline)) void load_block(Matrix<T> to, Strided<const E> from, int C, int n) {
  if (from.channel == 1 || C == 1) {
    for (int t = 0; t < n; ++t) load_row<T>(to.row(t), from.data + t * from.token, C);
  } else if (from.token == 1 && n > kMostTaps) {
    load_transposed<T>(to, Matrix<const E>{from.data, from.channel}, C, n);
  } else if constexpr (std::is_same_v<T, E>) {
    copy_elements(Strided<T>{to.data, 1, to.ld}, from, C, n);
    for (int t = 0; t < n; ++t) clear(to.row(t) + C, padded<T>(C) - C);
  } else {
    E part[kMostTaps * kManyChannels];
    for (int t = 0; t < n; t += int(kMostTaps)) {
      const int some = std::min(n - t, int(kMostTaps));
      copy_elements(Strided<E>{part, 1, kManyChannels},
                    Strided<const E>{from.data + t * from.token, from.channel, from.token}, C, some);
      for (int i = 0; i < some; ++i) load_row<T>(to.row(t + i), part + i * kManyChannels, C);
    }
  }
}

// Writes a block of scratch to memory. `turned` [kChannels, kTokens] holds its transpose.
template <class T, class E>
__attribute__((noinline)) void store_block(Strided<E> to, Matrix<const T> from, int C, int n, T* turned) {
  if (to.channel == 1 || C == 1) {
    for (int t = 0; t < n; ++t) store_row<T>(to.data + t * to.token, from.row(t), C);
  } else if (to.token == 1 && n > kMostTaps) {
    load_transposed<T>(Matrix<T>{turned, kTokens}, from, n, C);
    for (int c = 0; c < C; ++c) store_row<T>(to.data + c * to.channel, turned + c * kTokens, n);
  } else if constexpr (std::is_same_v<T, E>) {
    copy_elements(to, Strided<const T>{from.data, 1, from.ld}, C, n);
  } else {
    E part[kMostTaps * kManyChannels];
    for (int t = 0; t < n; t += int(kMostTaps)) {
      const int some = std::min(n - t, int(kMostTaps));
      for (int i = 0; i < some; ++i) store_row<T>(part + i * kManyChannels, from.row(t + i), C);
      copy_elements(Strided<E>{to.data + t * to.token, to.channel, to.token}, Strided<const E>{part, 1, kManyChannels},
                    C, some);
    }
  }
}

// The same for a tensor of `type`, which is E or float32.
template <class E, class T>
LC_INLINE void load_block(Matrix<T> to, Type type, const View& v, int64_t b, int64_t d, int64_t n, int C, int rows) {
  if (std::is_same_v<E, T> || type == Type::f32)
    load_block<T>(to, strided<const T>(v, b, d, n), C, rows);
  else
    load_block<T>(to, strided<const E>(v, b, d, n), C, rows);
}
template <class E, class T>
LC_INLINE void store_block(Type type, const View& v, int64_t b, int64_t d, int64_t n, Matrix<const T> from, int C,
                           int rows, T* turned) {
  if (std::is_same_v<E, T> || type == Type::f32)
    store_block<T>(strided<T>(v, b, d, n), from, C, rows, turned);
  else
    store_block<T>(strided<E>(v, b, d, n), from, C, rows, turned);
}

// The weights and the bias of consecutive channels, in scratch.
template <class T>
struct Taps {
  T* weight;  // [W, ld]
  T* bias;    // [ld]
  int64_t ld;
  int W;

  LC_INLINE Taps(const ConvProblem& p, Arena& arena, int64_t channels)
      : weight(arena.take<T>(p.W * channels)), bias(arena.take<T>(channels)), ld(channels), W(int(p.W)) {}

  template <class E>
  LC_INLINE void load(const ConvProblem& p, int64_t d, int C) const {
    // View has the axes [d, w] of the weight first.
    const View w{p.weight.data, {0, p.weight.stride[0], p.weight.stride[1], 0}};
    const View b{p.bias.data, {0, p.bias.stride[0], 0, 0}};
    load_block<E>(Matrix<T>{weight, ld}, p.weight_type, w, 0, d, 0, C, W);
    if (p.bias)
      load_block<E>(Matrix<T>{bias, ld}, p.bias_type, b, 0, d, 0, C, 1);
    else
      clear(bias, padded<T>(C));
  }
  LC_INLINE Taps at(int c) const {
    Taps t = *this;
    t.weight += c;
    t.bias += c;
    return t;
  }
};

// A run of tokens [begin, end) of one sequence, both counted from the sequence's first token.
struct Piece {
  int64_t s;  // the sequence
  Sequence place;
  int64_t begin, end;
};

// Cuts sequences into pieces of at most `tokens` tokens. An empty sequence is one piece. The cuts
// depend on the lengths of the sequences alone.
class Pieces {
 public:
  // For packed sequences `first` [S + 1] becomes the number of pieces before each sequence.
  LC_INLINE Pieces(const ConvProblem& problem, Arena& arena, int64_t tokens)
      : p_(problem),
        tokens_(tokens),
        each_(count(problem.N)),
        first_(arena.take<int64_t>(problem.cu_bits ? problem.B + 1 : 0)) {}

  // The most pieces that a call can have. It needs no values of cu_seqlens.
  LC_INLINE int64_t most() const { return p_.cu_bits ? p_.B + p_.N / tokens_ : p_.B * each_; }

  // Counts the pieces, before any use by workers.
  LC_INLINE void make() {
    total_ = p_.B * each_;
    if (!p_.cu_bits) return;
    first_[0] = 0;
    for (int64_t s = 0; s < p_.B; ++s) first_[s + 1] = first_[s] + count(sequence(p_, s).length);
    total_ = first_[p_.B];
  }
  LC_INLINE int64_t total() const { return total_; }

  LC_INLINE Piece at(int64_t i) const {
    int64_t s = 0, first = 0;
    if (!p_.cu_bits) {
      s = i / each_;
      first = s * each_;
    } else {
      for (int64_t end = p_.B; end - s > 1;) (first_[(s + end) / 2] <= i ? s : end) = (s + end) / 2;
      first = first_[s];
    }
    const Sequence place = sequence(p_, s);
    const int64_t begin = (i - first) * tokens_;
    return {s, place, begin, std::min(place.length, begin + tokens_)};
  }

 private:
  LC_INLINE int64_t count(int64_t length) const { return std::max<int64_t>(1, (length + tokens_ - 1) / tokens_); }

  const ConvProblem& p_;
  int64_t tokens_, each_;
  int64_t* first_;
  int64_t total_ = 0;
};

// Work whose bytes pay for one more worker, as kFlopPerWorker in units of flop.
constexpr double kFlopPerByte = 10;
LC_INLINE int workers_of(const ConvProblem& p, int64_t tasks) {
  const double tensors = p.op == LC_BACKWARD ? 4 : 2;
  const double elements = double(p.D) * double(p.cu_bits ? p.N : p.B * p.N);
  return workers_for(p, tasks, kFlopPerByte * tensors * elements * (p.type == Type::f64 ? 8 : 4));
}

// Loads the inputs of tokens [t, t + n) of a piece's sequence as rows of scratch. Tokens before the
// sequence come from its initial state, in slot `state`.
template <class E, class T>
LC_INLINE void load_inputs(const ConvProblem& p, Matrix<T> to, const Piece& piece, const View& initial, int64_t state,
                           int64_t t, int n, int64_t d, int C) {
  const int before = int(std::min<int64_t>(n, std::max<int64_t>(0, -t)));
  if (before && initial)
    load_block<E>(to, p.state_type, initial, state, d, p.L + t, C, before);
  else
    for (int i = 0; i < before; ++i) clear(to.row(i), padded<T>(C));
  if (before < n)
    load_block<T>(Matrix<T>{to.row(before), to.ld},
                  strided<const E>(p.x, piece.place.row, d, piece.place.begin + t + before), C, n - before);
}

}  // namespace
}  // namespace lc::LC_ISA
