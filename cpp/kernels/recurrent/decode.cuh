// decode.cuh - GPU: a few tokens per sequence. The state is in a pool and is updated in place.
//
//   S <- 2^L_t S + length_t k_t v_t^T;   o_t = (scale q_t^T S + skip v_t) silu(gate_t)
//
//   for every token t and q head of the state. pool [slots, Hs, K, V] of type P; either of K and V
//   is contiguous. Shared memory has some pairs of a token and a q head, in the accumulator's type
//   T: q, k [pairs, K], v, skip and gate [pairs, width], sums [pairs, row groups, width]
//   block: `columns` groups of kColumns columns of V. A thread keeps kRows rows of one group in
//   registers for all tokens: kVectors vectors of 16 bytes along the contiguous dimension
//   grid: (sequence, state, slice); small batches have more slices; B (H 2KV + Hs 3KV) flop per
//   token. Memory bound: a thread loads all vectors before it uses one
//   Katharopoulos et al. 2020, arXiv:2006.16236
#pragma once
#include "../../cuda/lengths.cuh"
#include "../../cuda/staging.cuh"

namespace lc::cuda {

// kTransposed: K is contiguous in the pool.
template <class E, class P, bool kTransposed>
struct Decode {
  using T = Accumulator<E>;
  static constexpr const char* kName = "decode";
  static constexpr int kVector = 16 / int(sizeof(P)), kVectors = 4;
  static constexpr int kRows = kTransposed ? kVector : kVectors, kColumns = kTransposed ? kVectors : kVector;
  static constexpr int kPairs = 4, kMaxThreads = 256, kMinBlocks = kVector == 4 ? 3 : 2;
  struct Params {
    Problem p;
    unsigned slices;                            // of V
    unsigned heads, q_share, k_share, v_share;  // H / Hs, H / Hq, Hs / Hk, Hs / Hv: 64-bit divisions are calls
    int columns, row_groups;                    // threads of a block: across groups of columns, of rows
    int pairs;                                  // staged at once: kPairs, or all if there are fewer
    bool whole;                                 // whether all vectors are complete and aligned to 16 bytes

    LC_INLINE int width() const { return columns * kColumns; }
    LC_INLINE int rows() const { return row_groups * kRows; }  // K, padded
    LC_INLINE int threads() const { return columns * row_groups; }
    int64_t shared_bytes() const {
      return int64_t(sizeof(T)) * pairs * (2 * rows() + (3 + row_groups) * width() + kFactors);
    }
  };

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    const Block block(a);
    const int heads = int(a.heads), all_pairs = int(p.N) * heads;
    if (block.slot < 0 || block.slot >= p.slots) return write_zeros(p, block, heads, all_pairs);

    const Vectors state(a, block);
    Vector stored[kVectors] = {};
    state.load(stored);
    const Memory memory(a, block);
    stage(a, block, memory, 0, a.pairs);
    T S[kRows][kColumns];
    each_number([&](int i, int j, int vector, int at) { S[i][j] = widen(stored[vector].x[at]); });
    for (int first = 0; first < all_pairs; first += a.pairs) {
      const int n = all_pairs - first < a.pairs ? all_pairs - first : a.pairs;
      if (first) stage(a, block, memory, first, n);
      for (int pair = 0; is_active(a) && pair < n; ++pair) {
        if ((first + pair) % heads == 0) update(a, memory, pair, S);
        read(a, memory, pair, S);
      }
      if (first + n == all_pairs) {
        each_number([&](int i, int j, int vector, int at) { stored[vector].x[at] = narrow<P>(S[i][j]); });
        state.store(stored);
      }
      sync_cta();
      write(a, block, memory, first, n);
      if (first + n < all_pairs) sync_cta();
    }
  }

 private:
  // From this log2 decay on, 2^L - 1 is added to 1: the rounding error of 2^L would be raised to
  // the number of tokens.
  static constexpr double kSlow = -0.0145;

  static constexpr int kFactors = 3;  // of a pair: see Memory::factors

  using Vector = Packed<P, kVector>;

  // Calls f(row, column, vector, place in the vector) for every number of a thread.
  template <class F>
  static SIMT_DEV void each_number(F&& f) {
    SIMT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      SIMT_UNROLL
      for (int j = 0; j < kColumns; ++j) kTransposed ? f(i, j, j, i) : f(i, j, i, j);
    }
  }

  // A thread's columns and rows. Adjacent threads have adjacent vectors.
  static SIMT_DEV bool is_active(const Params& a) { return tid() < a.threads(); }
  static SIMT_DEV int own_column(const Params& a) {
    return (kTransposed ? tid() / a.row_groups : tid() % a.columns) * kColumns;
  }
  static SIMT_DEV int own_group(const Params& a) { return kTransposed ? tid() % a.row_groups : tid() / a.columns; }
  static SIMT_DEV int own_row(const Params& a) { return own_group(a) * kRows; }

  // The part of the problem that a block has.
  struct Block {
    unsigned hs, h;  // state, and its first q head
    int64_t b, c0, slot;
    int columns;
    SIMT_DEV explicit Block(const Params& a) {
      const Problem& p = a.p;
      const unsigned block = bid().x / a.slices;
      hs = block % unsigned(p.Hs);
      h = hs * a.heads;
      b = block / unsigned(p.Hs);
      c0 = int64_t(bid().x % a.slices) * a.width();
      slot = slot_at(p, b);
      columns = int(p.V - c0 < a.width() ? p.V - c0 : a.width());
    }
    // The output of a pair of a token and a q head.
    SIMT_DEV gptr<E> output(const Problem& p, int heads, int pair) const {
      return row<E>(p.o, b, h + pair % heads, pair / heads).sub(c0);
    }
  };

  // The inputs of the block, and the shared memory for `pairs` pairs of a token and a q head.
  struct Memory {
    gptr<const E> from_q, from_k, from_v;
    sptr<T> q, k;           // [pairs, rows]
    sptr<T> v;              // [pairs, width]
    sptr<T> skipped, gate;  // [pairs, width]: skip v and silu(gate); 0 and 1 without them
    sptr<T> sums;           // [pairs, row groups, width]: parts of the outputs
    sptr<T> factors;        // [pairs, kFactors]: of the state; whether to add it to 1; the length of the token
    SIMT_DEV Memory(const Params& a, const Block& b) {
      Smem smem;
      q = smem.alloc<T>(a.pairs * a.rows());
      k = smem.alloc<T>(a.pairs * a.rows());
      v = smem.alloc<T>(a.pairs * a.width());
      skipped = smem.alloc<T>(a.pairs * a.width());
      gate = smem.alloc<T>(a.pairs * a.width());
      sums = smem.alloc<T>(a.pairs * a.row_groups * a.width());
      factors = smem.alloc<T>(kFactors * a.pairs);
      from_q = row<const E>(a.p.q, b.b, b.h / a.q_share, 0);
      from_k = row<const E>(a.p.k, b.b, b.hs / a.k_share, 0);
      from_v = row<const E>(a.p.v, b.b, b.hs / a.v_share, 0).sub(b.c0);
    }
  };

  static SIMT_DEV void write_zeros(const Problem& p, const Block& b, int heads, int all_pairs) {
    for (int pair = 0; pair < all_pairs; ++pair)
      for (int c = tid(); c < b.columns; c += nthreads()) b.output(p, heads, pair).st(c, narrow<E>(0));
  }

  // Copies q, k, v and the decays of n pairs from pair `first` on to shared memory.
  static SIMT_DEV void stage(const Params& a, const Block& b, const Memory& m, int first, int n) {
    const Problem& p = a.p;
    const int span = a.rows() > a.width() ? a.rows() : a.width(), heads = int(a.heads);
    for (int at = tid(); at < n * span; at += nthreads()) {
      const int i = at / span, r = at % span;
      const int64_t t = (first + i) / heads, g = (first + i) % heads;
      const T x = r < p.K ? widen(m.from_q.ld(g * p.q.stride[1] + t * p.q.stride[2] + r)) : T(0);
      const T y = r < p.K ? widen(m.from_k.ld(t * p.k.stride[2] + r)) : T(0);
      const T z = r < b.columns ? widen(m.from_v.ld(t * p.v.stride[2] + r)) : T(0);
      if (r < a.rows()) {
        m.q.st(i * a.rows() + r, x);
        m.k.st(i * a.rows() + r, y);
      }
      if (r < a.width()) {
        const bool own = r < b.columns;
        m.v.st(i * a.width() + r, z);
        m.skipped.st(i * a.width() + r, own && p.skip ? skip_at<T>(p, b.h + g, b.c0 + r) * z : T(0));
        m.gate.st(i * a.width() + r,
                  own && p.gate ? silu(T(widen(row<const E>(p.gate, b.b, b.h + g, t).ld(b.c0 + r)))) : T(1));
      }
    }
    SIMT_LOOP
    for (int i = nthreads() - 1 - tid(); i < n; i += nthreads()) {  // the last threads have the least to copy
      const int64_t t = (first + i) / heads;
      const T length = p.dt ? Length<T>(p, b.b, b.hs, t).value : T(1);
      const double log2 = p.dt ? log2_decay(p, rate_at(p, b.b, b.hs) * double(length)) : log2_decay_at(p, b.b, b.hs, t);
      const bool slow = log2 > kSlow;
      m.factors.st(kFactors * i, slow ? T(ex2m1(log2)) : ex2(T(log2)));
      m.factors.st(kFactors * i + 1, T(slow));
      m.factors.st(kFactors * i + 2, length);
    }
    sync_cta();
  }

  // S <- 2^L S + length k v^T for the token of a pair.
  static SIMT_DEV void update(const Params& a, const Memory& m, int pair, T (&S)[kRows][kColumns]) {
    const T factor = m.factors.ld(kFactors * pair), length = m.factors.ld(kFactors * pair + 2);
    const bool slow = m.factors.ld(kFactors * pair + 1) != 0;
    const auto key = m.k.template ldv<Packed<T, kRows>>(pair * a.rows() + own_row(a));
    auto value = m.v.template ldv<Packed<T, kColumns>>(pair * a.width() + own_column(a));
    SIMT_UNROLL
    for (int j = 0; j < kColumns; ++j) value.x[j] *= length;
    SIMT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      SIMT_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        const T x = mul_add(factor, S[i][j], key.x[i] * value.x[j]);
        S[i][j] = slow ? S[i][j] + x : x;
      }
    }
  }

  // This thread's part of q^T S for a pair.
  static SIMT_DEV void read(const Params& a, const Memory& m, int pair, const T (&S)[kRows][kColumns]) {
    const auto query = m.q.template ldv<Packed<T, kRows>>(pair * a.rows() + own_row(a));
    Packed<T, kColumns> sum = {};
    SIMT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      SIMT_UNROLL
      for (int j = 0; j < kColumns; ++j) sum.x[j] = mul_add(query.x[i], S[i][j], sum.x[j]);
    }
    m.sums.stv((pair * a.row_groups + own_group(a)) * a.width() + own_column(a), sum);
  }

  // Adds the parts of all row groups and writes the outputs of n pairs.
  static SIMT_DEV void write(const Params& a, const Block& b, const Memory& m, int first, int n) {
    for (int at = tid(); at < n * a.width(); at += nthreads()) {
      const int pair = at / a.width(), c = at % a.width();
      if (c >= b.columns) continue;
      T sum = 0;
      for (int g = 0; g < a.row_groups; ++g) sum += m.sums.ld((pair * a.row_groups + g) * a.width() + c);
      const T o = mul_add(sum, T(a.p.scale), m.skipped.ld(at)) * m.gate.ld(at);
      b.output(a.p, int(a.heads), first + pair).st(c, narrow<E>(o));
    }
  }

  // The vectors of one thread in the pool: those before `vectors`, and in each the numbers before
  // `numbers`, are parts of the state.
  struct Vectors {
    gptr<P> at;
    int64_t stride;
    int vectors, numbers;
    bool whole;

    SIMT_DEV Vectors(const Params& a, const Block& b) {
      const View& pool = a.p.final_state;
      const int rows = is_active(a) ? int(a.p.K) - own_row(a) : 0, columns = b.columns - own_column(a);
      at = row<P>(pool, b.slot, b.hs, own_row(a)).sub((b.c0 + own_column(a)) * pool.stride[3]);
      stride = pool.stride[kTransposed ? 3 : 2];
      vectors = kTransposed ? columns : rows;
      numbers = kTransposed ? rows : columns;
      whole = a.whole;
    }
    SIMT_DEV void load(Vector (&x)[kVectors]) const {
      if (whole) {
        SIMT_UNROLL
        for (int i = 0; i < kVectors; ++i)
          if (i < vectors && numbers > 0) x[i] = at.template ldv<Vector>(i * stride);
      } else {
        SIMT_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          SIMT_UNROLL
          for (int j = 0; j < kVector; ++j)
            if (i < vectors && j < numbers) x[i].x[j] = at.ld(i * stride + j);
        }
      }
    }
    SIMT_DEV void store(const Vector (&x)[kVectors]) const {
      if (whole) {
        SIMT_UNROLL
        for (int i = 0; i < kVectors; ++i)
          if (i < vectors && numbers > 0) at.template stv<Vector>(i * stride, x[i]);
      } else {
        SIMT_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          SIMT_UNROLL
          for (int j = 0; j < kVector; ++j)
            if (i < vectors && j < numbers) at.st(i * stride + j, x[i].x[j]);
        }
      }
    }
  };
};

}  // namespace lc::cuda
