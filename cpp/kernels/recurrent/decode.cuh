// decode.cuh - GPU: a few tokens of each sequence through its state in a pool, in place: the state goes by once.
//
//   S <- 2^L_t S + k_t v_t^T;   o_t = scale q_t^T S     for every token t of the call and every q head of the state
//
//   pool [slots, Hs, K, V] of type P; of so many pairs of a token and a q head at a time in shared memory, as numbers
//   of the accumulator's type T: q, k [pairs, K], v [pairs, width], sums [pairs, row groups, width]
//   block: a piece of V, `columns` vectors of 16 bytes wide; a thread keeps one vector of kRows rows in registers, from
//   the first token to the last. grid: (sequence, state, piece), so many pieces that a small batch fills the device
//   B (H 2KV + Hs 3KV) flop a token; bound by memory: a thread asks for all of its rows before it uses one
//   Katharopoulos et al. 2020, arXiv:2006.16236
#pragma once
#include "../../cuda/problem.cuh"
#include "../../cuda/staging.cuh"

namespace lc::cuda {

template <class E, class P>
struct Decode {
  using T = Accumulator<E>;
  static constexpr const char* kName = "decode";
  static constexpr int kVector = 16 / int(sizeof(P)), kRows = 4;
  static constexpr int kPairs = 4, kMaxThreads = 256, kMinBlocks = kVector > 4 ? 2 : 3;
  struct Params {
    Problem p;
    unsigned pieces;                            // of V
    unsigned heads, q_share, k_share, v_share;  // H / Hs; H / Hq, Hs / Hk, Hs / Hv: a division of 64 bits is a call
    int columns, row_groups;                    // threads of a block: side by side, one below the other
    int pairs;                                  // at a time: kPairs, or fewer if there are fewer
    bool whole;                                 // every vector is complete, its address a multiple of 16

    LC_INLINE int width() const { return columns * kVector; }
    LC_INLINE int rows() const { return row_groups * kRows; }  // of a block: K, padded
    LC_INLINE int threads() const { return columns * row_groups; }
    int64_t shared_bytes() const {
      return int64_t(sizeof(T)) * pairs * (2 * rows() + width() + row_groups * width() + 2);
    }
  };

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    const unsigned block = bid().x / a.pieces, hs = block % unsigned(p.Hs), h = hs * a.heads;
    const int64_t b = block / unsigned(p.Hs), c0 = int64_t(bid().x % a.pieces) * a.width();
    const int64_t slot = slot_at(p, b);
    const int columns = int(p.V - c0 < a.width() ? p.V - c0 : a.width());
    const int heads = int(a.heads), all_pairs = int(p.N) * heads;
    const auto output = [&](int pair) { return row<E>(p.o, b, h + pair % heads, pair / heads).sub(c0); };
    if (slot < 0 || slot >= p.slots) {  // the whole block
      for (int pair = 0; pair < all_pairs; ++pair)
        for (int c = tid(); c < columns; c += nthreads()) output(pair).st(c, narrow<E>(0));
      return;
    }

    const bool active = tid() < a.threads();
    const int own_column = tid() % a.columns * kVector, own_group = tid() / a.columns, own_row = own_group * kRows;
    const int rows = !active ? 0 : p.K - own_row < kRows ? int(p.K) - own_row : kRows;
    const Vectors state = {row<P>(p.final_state, slot, hs, own_row).sub(c0 + own_column), p.final_state.stride[2], rows,
                           columns - own_column, a.whole};
    Vector stored[kRows] = {};
    state.load(stored);

    Smem smem;
    const auto q = smem.alloc<T>(a.pairs * a.rows()), k = smem.alloc<T>(a.pairs * a.rows());
    const auto v = smem.alloc<T>(a.pairs * a.width()), sums = smem.alloc<T>(a.pairs * a.row_groups * a.width());
    const auto decay = smem.alloc<T>(2 * a.pairs);
    const auto from_q = row<const E>(p.q, b, h / a.q_share, 0), from_k = row<const E>(p.k, b, hs / a.k_share, 0);
    const auto from_v = row<const E>(p.v, b, hs / a.v_share, 0).sub(c0);
    const int span = a.rows() > a.width() ? a.rows() : a.width();
    const auto stage = [&](int first, int n) {
      for (int at = tid(); at < n * span; at += nthreads()) {
        const int i = at / span, r = at % span;
        const int64_t t = (first + i) / heads, g = (first + i) % heads;
        const T x = r < p.K ? widen(from_q.ld(g * p.q.stride[1] + t * p.q.stride[2] + r)) : T(0);
        const T y = r < p.K ? widen(from_k.ld(t * p.k.stride[2] + r)) : T(0);
        const T z = r < columns ? widen(from_v.ld(t * p.v.stride[2] + r)) : T(0);
        if (r < a.rows()) q.st(i * a.rows() + r, x), k.st(i * a.rows() + r, y);
        if (r < a.width()) v.st(i * a.width() + r, z);
      }
      const int i = nthreads() - 1 - tid();  // threads that have less to copy
      if (i < n) {
        const double log2 = log2_decay_at(p, b, hs, (first + i) / heads);
        const bool slow = log2 > kSlow;
        decay.st(2 * i, slow ? T(ex2m1(log2)) : ex2(T(log2))), decay.st(2 * i + 1, T(slow));
      }
      sync_cta();
    };

    stage(0, a.pairs);
    T S[kRows][kVector];
    SIMT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      SIMT_UNROLL
      for (int j = 0; j < kVector; ++j) S[i][j] = widen(stored[i].x[j]);
    }
    for (int first = 0; first < all_pairs; first += a.pairs) {
      const int n = all_pairs - first < a.pairs ? all_pairs - first : a.pairs;
      if (first) stage(first, n);
      for (int pair = 0; active && pair < n; ++pair) {
        if ((first + pair) % heads == 0) {
          const T factor = decay.ld(2 * pair);
          const bool slow = decay.ld(2 * pair + 1) != 0;
          const auto key = k.template ldv<Packed<T, kRows>>(pair * a.rows() + own_row);
          const auto value = v.template ldv<Packed<T, kVector>>(pair * a.width() + own_column);
          SIMT_UNROLL
          for (int i = 0; i < kRows; ++i) {
            SIMT_UNROLL
            for (int j = 0; j < kVector; ++j) {
              const T x = mul_add(factor, S[i][j], key.x[i] * value.x[j]);
              S[i][j] = slow ? S[i][j] + x : x;
            }
          }
        }
        const auto query = q.template ldv<Packed<T, kRows>>(pair * a.rows() + own_row);
        Packed<T, kVector> sum = {};
        SIMT_UNROLL
        for (int i = 0; i < kRows; ++i) {
          SIMT_UNROLL
          for (int j = 0; j < kVector; ++j) sum.x[j] = mul_add(query.x[i], S[i][j], sum.x[j]);
        }
        sums.stv((pair * a.row_groups + own_group) * a.width() + own_column, sum);
      }
      if (first + n == all_pairs) {
        SIMT_UNROLL
        for (int i = 0; i < kRows; ++i) {
          SIMT_UNROLL
          for (int j = 0; j < kVector; ++j) stored[i].x[j] = narrow<P>(S[i][j]);
        }
        state.store(stored);
      }
      sync_cta();
      for (int at = tid(); at < n * a.width(); at += nthreads()) {
        const int pair = at / a.width(), c = at % a.width();
        if (c >= columns) continue;
        T sum = 0;
        for (int g = 0; g < a.row_groups; ++g) sum += sums.ld((pair * a.row_groups + g) * a.width() + c);
        output(first + pair).st(c, narrow<E>(sum * T(p.scale)));
      }
    }
  }

 private:
  // Above it 2^L - 1 is added to 1, since the error of 2^L would be raised to the power of the number of tokens.
  static constexpr double kSlow = -0.0145;

  using Vector = Packed<P, kVector>;

  // The rows of one thread in the pool, of which `numbers` from its first one on are in the piece.
  struct Vectors {
    gptr<P> at;
    int64_t stride;
    int rows, numbers;
    bool whole;

    SIMT_DEV void load(Vector (&x)[kRows]) const {
      if (whole) {
        SIMT_UNROLL
        for (int i = 0; i < kRows; ++i)
          if (i < rows && numbers > 0) x[i] = at.template ldv<Vector>(i * stride);
      } else {
        SIMT_UNROLL
        for (int i = 0; i < kRows; ++i) {
          SIMT_UNROLL
          for (int j = 0; j < kVector; ++j)
            if (i < rows && j < numbers) x[i].x[j] = at.ld(i * stride + j);
        }
      }
    }
    SIMT_DEV void store(const Vector (&x)[kRows]) const {
      if (whole) {
        SIMT_UNROLL
        for (int i = 0; i < kRows; ++i)
          if (i < rows && numbers > 0) at.template stv<Vector>(i * stride, x[i]);
      } else {
        SIMT_UNROLL
        for (int i = 0; i < kRows; ++i) {
          SIMT_UNROLL
          for (int j = 0; j < kVector; ++j)
            if (i < rows && j < numbers) at.st(i * stride + j, x[i].x[j]);
        }
      }
    }
  };
};

}  // namespace lc::cuda
