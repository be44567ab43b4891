// tile.cuh - the tile verbs of the GPU, on the primitives of simt.h. Only this file knows lanes,
// swizzles and the layout of fragments, so it is one file: its verbs share this knowledge.
//
// A Shared tile is in shared memory. A Strip is some rows of a matrix, held by one warp as float32
// sums. The left side of a product consists of pieces of 16 x 16: rows of a Shared tile (operand),
// its columns (operand_t), or a Strip. The matrix unit reads bf16, f16 or tf32 (10 bits of
// mantissa). A float product is made of three tf32 products.
//
// Layouts: PTX ISA, "Matrix fragments for mma". Lane (g, t) = (lane / 4, lane % 4) holds the pair
// of columns 2t, 2t + 1 of row g, in sums and in 16-bit operands. For tf32 the two numbers of a
// pair are at k = t and t + 4 of an m16n8k8: any order of k is right if both sides share it. So
// sums become operands, and 16-bit fragments become tf32 fragments, without leaving the registers
// of a lane.
#pragma once
#include "simt.h"

namespace simt {

// A kind of operand, stored as float. The matrix unit ignores the low 13 bits of a number.
struct tf32 {};
// A kind of operand: a number rounded to X, and the remainder as X. It takes two products and has
// twice the digits.
template <class X>
struct Twice {};
// x such that the matrix unit reads it rounded to nearest, to a quarter of the last place on
// average. This is one multiplication; cvt.rna takes four instructions. tf32 numbers stay exact,
// and infinities and NaN stay as they are.
SIMT_DEV float near_tf32(float x) { return x * (1 + 0.7f / 2048); }
// x without the bits that the matrix unit ignores.
SIMT_DEV float cut_tf32(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  u &= ~0x1fffu;
  std::memcpy(&x, &u, sizeof u);
  return x;
}
template <class X>
inline constexpr bool is_16_bit = sizeof(X) == 2;

// The position of a lane in a fragment. Every verb computes it again, since these numbers would
// take many registers.
struct Lane {
  int l = fresh(lane());
  SIMT_DEV int row() const { return l >> 2; }        // g
  SIMT_DEV int pair() const { return 2 * (l & 3); }  // 2t
  // The row and the column that this lane names for an ldmatrix of 16 x 16. `down`: matrices 0 and
  // 1 are one below the other; `across`: they are side by side.
  SIMT_DEV int down_row() const { return l & 15; }
  SIMT_DEV int down_column() const { return (l >> 4) * 8; }
  SIMT_DEV int across_row() const { return (l & 7) + (l >> 4) * 8; }
  SIMT_DEV int across_column() const { return (l >> 3 & 1) * 8; }
};

// ---- tiles in shared memory ---------------------------------------------------------------------

// [R, C]: each row in units of 16 bytes, which are permuted such that one access of a warp meets
// different banks.
template <class E, int R, int C>
struct Shared {
  static constexpr int kUnit = 16 / int(sizeof(E)), kSize = R * C;
  static_assert(C % (8 * kUnit) == 0, "8 units of 16 bytes are permuted");
  sptr<E> s;

  // Index of element (i0 + i, j0 + j). i0 is a multiple of 8. j0 is a multiple of 16 and j < 16, or
  // j0 is a multiple of a unit and j = 0.
  static SIMT_DEV int at(int i0, int j0, int i, int j) {
    const int unit = j0 / kUnit ^ j / kUnit ^ turn(i);
    return (i0 + i) * C + unit * kUnit + j % kUnit;
  }
  // Rows from i on, a multiple of 8.
  template <int R2>
  SIMT_DEV Shared<E, R2, C> rows(int i) const {
    return {s.sub(i * C, R2 * C)};
  }

 private:
  // 16 bits: ldmatrix reads 8 rows of one unit. 32 bits: a warp reads pairs in rows 0 to 3 or 4 to
  // 7, and numbers in rows 0, 2, 4, 6 or 1, 3, 5, 7, in two units each.
  static SIMT_DEV int turn(int i) { return is_16_bit<E> ? i & 7 : (i & 6) ^ (i & 1) << 2; }
};

// Copies n rows of `columns` numbers, `stride` apart, to the tile, and zeros after them up to
// column `wide`, a multiple of 16. Uses cp.async if all rows are `aligned` to 16 bytes. The caller
// does cp_commit and cp_wait.
template <class E, int R, int C>
SIMT_DEV void load_async(const Shared<E, R, C>& t, gptr<const E> from, int64_t stride, int n, int columns, bool aligned,
                         int wide = C) {
  using Tile = Shared<E, R, C>;
  constexpr int kUnits = C / Tile::kUnit, kAcross = kUnits < 32 ? kUnits : 32;
  const int thread = fresh(tid()), first = thread / kAcross, step = fresh(nthreads()) / kAcross;
  SIMT_UNROLL
  for (int u = 0; u < kUnits; u += kAcross) {
    const int column = (u + thread % kAcross) * Tile::kUnit;
    const int rest = columns - column, some = rest < 0 ? 0 : rest < Tile::kUnit ? rest : Tile::kUnit;
    if (column >= wide) continue;
    if (aligned) {
      for (int i = first; i < R; i += step)
        cp_async16(t.s, Tile::at(0, column, i, 0), from, i < n ? i * stride + (some ? column : 0) : 0,
                   i < n ? some * int(sizeof(E)) : 0);
    } else {
      SIMT_LOOP
      for (int i = first; i < R; i += step) {
        const int to = Tile::at(0, column, i, 0);
        SIMT_UNROLL
        for (int j = 0; j < Tile::kUnit; ++j)
          t.s.st(to + j, i < n && j < some ? from.ld(i * stride + column + j) : E{});
      }
    }
  }
}

// ---- sums ---------------------------------------------------------------------------------------

// [R, C]
template <int R, int C>
struct Strip {
  float x[R / 16][C / 8][4];
};

template <int R, int C>
SIMT_DEV void zero(Strip<R, C>& a) {
  SIMT_UNROLL
  for (int m = 0; m < R / 16; ++m) SIMT_UNROLL
  for (int n = 0; n < C / 8; ++n) SIMT_UNROLL
  for (int e = 0; e < 4; ++e) a.x[m][n][e] = 0;
}

// a_ij = f(i, j, a_ij)
template <int R, int C, class F>
SIMT_DEV void map(Strip<R, C>& a, F&& f) {
  const Lane lane;
  SIMT_UNROLL
  for (int m = 0; m < R / 16; ++m) SIMT_UNROLL
  for (int n = 0; n < C / 8; ++n) SIMT_UNROLL
  for (int e = 0; e < 4; ++e)
    a.x[m][n][e] = f(16 * m + lane.row() + (e >> 1) * 8, 8 * n + lane.pair() + (e & 1), a.x[m][n][e]);
}

// f(i, j, a_ij)
template <int R, int C, class F>
SIMT_DEV void each(const Strip<R, C>& a, F&& f) {
  const Lane lane;
  SIMT_UNROLL
  for (int m = 0; m < R / 16; ++m) SIMT_UNROLL
  for (int n = 0; n < C / 8; ++n) SIMT_UNROLL
  for (int e = 0; e < 4; ++e) f(16 * m + lane.row() + (e >> 1) * 8, 8 * n + lane.pair() + (e & 1), a.x[m][n][e]);
}
// a_i(j0 + j) = f(a_i(j0 + j), b_ij)
template <int R, int C, int L, class F>
SIMT_DEV void merge(Strip<R, L>& a, int j0, const Strip<R, C>& b, F&& f) {
  SIMT_UNROLL
  for (int m = 0; m < R / 16; ++m) SIMT_UNROLL
  for (int n = 0; n < C / 8; ++n) SIMT_UNROLL
  for (int e = 0; e < 4; ++e) a.x[m][j0 / 8 + n][e] = f(a.x[m][j0 / 8 + n][e], b.x[m][n][e]);
}

// to_(i0 + i) += sum_j a_ij, by one warp.
template <int R, int C>
SIMT_DEV void add_rows(sptr<float> to, int i0, const Strip<R, C>& a) {
  const Lane lane;
  SIMT_UNROLL
  for (int m = 0; m < R / 16; ++m) SIMT_UNROLL
  for (int r = 0; r < 2; ++r) {
    float sum = 0;
    SIMT_UNROLL
    for (int n = 0; n < C / 8; ++n) sum += a.x[m][n][2 * r] + a.x[m][n][2 * r + 1];
    SIMT_UNROLL
    for (int d = 1; d < 4; d *= 2) sum += shfl_xor(sum, d);
    const int i = i0 + 16 * m + 8 * r + lane.row();
    if (!lane.pair()) to.st(i, to.ld(i) + sum);
  }
  sync_warp();
}
// to_(j0 + j) += weight sum_i a_ij, by one warp.
template <int R, int C>
SIMT_DEV void add_columns(sptr<float> to, int j0, const Strip<R, C>& a, float weight) {
  const Lane lane;
  SIMT_UNROLL
  for (int n = 0; n < C / 8; ++n) {
    float2 sum{0, 0};
    SIMT_UNROLL
    for (int m = 0; m < R / 16; ++m) {
      sum.x += a.x[m][n][0] + a.x[m][n][2];
      sum.y += a.x[m][n][1] + a.x[m][n][3];
    }
    SIMT_UNROLL
    for (int d = 4; d < 32; d *= 2) {
      sum.x += shfl_xor(sum.x, d);
      sum.y += shfl_xor(sum.y, d);
    }
    const int j = j0 + 8 * n + lane.pair();
    if (!lane.row()) {
      const auto x = to.ldv<float2>(j);
      to.stv(j, float2{mul_add(weight, sum.x, x.x), mul_add(weight, sum.y, x.y)});
    }
  }
  sync_warp();
}

// t_(i0 + i)(j0 + j) = a_ij as E, or rounded to tf32. i0 is a multiple of 8, j0 of 16.
template <class X, class E, int R, int C, int R2, int C2>
SIMT_DEV void store(const Shared<E, R2, C2>& t, int i0, int j0, const Strip<R, C>& a) {
  const Lane lane;
  SIMT_UNROLL
  for (int m = 0; m < R / 16; ++m) SIMT_UNROLL
  for (int n = 0; n < C / 8; ++n) SIMT_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float x = a.x[m][n][2 * r], y = a.x[m][n][2 * r + 1];
    const int to = t.at(i0 + 16 * m + 8 * r, j0 + n / 2 * 16, lane.row(), n % 2 * 8 + lane.pair());
    if constexpr (is_16_bit<E>)
      t.s.stv(to, pack2<E>(x, y));
    else
      t.s.stv(to, std::is_same_v<X, tf32> ? float2{near_tf32(x), near_tf32(y)} : float2{x, y});
  }
}
// t_(i)(j0 + j) = a_ji as E: the transposed strip.
template <class E, int R, int C, int C2>
SIMT_DEV void store_t(const Shared<E, C, C2>& t, int j0, const Strip<R, C>& a) {
  const Lane lane;
  SIMT_UNROLL
  for (int m = 0; m < R / 16; ++m) SIMT_UNROLL
  for (int n = 0; n < C / 8; ++n) {
    const float (&c)[4] = a.x[m][n];
    SIMT_UNROLL
    for (int r = 0; r < 2; ++r) {
      if constexpr (is_16_bit<E>) {
        const uint32_t x = movmatrix_trans(pack2<E>(c[2 * r], c[2 * r + 1]));
        t.s.stv(t.at(8 * n, j0 + 16 * m, lane.row(), 8 * r + lane.pair()), x);
      } else {
        SIMT_UNROLL
        for (int e = 0; e < 2; ++e) t.s.st(t.at(8 * n, j0 + 16 * m, lane.pair() + e, 8 * r + lane.row()), c[2 * r + e]);
      }
    }
  }
}
// Writes columns [j0, j0 + kWide) of n rows to rows that are `stride` apart, by one warp. Writes
// only the first `columns` of the columns.
template <int kWide, class E, int R, int C>
SIMT_DEV void write_rows(gptr<E> to, int64_t stride, const Shared<E, R, C>& t, int j0, int n, int columns,
                         bool aligned) {
  constexpr int kUnit = Shared<E, R, C>::kUnit, kAcross = kWide / kUnit;
  const int own = fresh(lane()), j = own % kAcross * kUnit, some = columns - j < kUnit ? columns - j : kUnit;
  if (aligned && some == kUnit) {
    for (int i = own / kAcross; i < n; i += 32 / kAcross)
      to.stv(i * stride + j, t.s.template ldv<uint4>(t.at(0, j0 + j, i, 0)));
  } else {
    SIMT_LOOP
    for (int i = own / kAcross; i < n; i += 32 / kAcross)
      for (int e = 0; e < some; ++e) to.st(i * stride + j + e, t.s.ld(t.at(0, j0 + j, i, 0) + e));
  }
}

// Reads columns [j0, j0 + kWide) of n rows that are `stride` apart, by one warp, as write_rows
// writes them. Columns from `columns` on and rows from n on become 0.
template <int kWide, class E, int R, int C>
SIMT_DEV void read_rows(const Shared<E, R, C>& t, int j0, gptr<const E> from, int64_t stride, int n, int columns,
                        bool aligned) {
  constexpr int kUnit = Shared<E, R, C>::kUnit, kAcross = kWide / kUnit;
  const int own = fresh(lane()), j = own % kAcross * kUnit, some = columns - j < kUnit ? columns - j : kUnit;
  int i = own / kAcross;
  if (aligned && some == kUnit) {
    SIMT_LOOP
    for (; i < n; i += 32 / kAcross) t.s.stv(t.at(0, j0 + j, i, 0), from.template ldv<uint4>(i * stride + j));
  }
  SIMT_LOOP
  for (; i < R; i += 32 / kAcross)
    for (int e = 0; e < kUnit; ++e)
      t.s.st(t.at(0, j0 + j, i, 0) + e, i < n && e < some ? from.ld(i * stride + j + e) : E{});
}

// ---- operands -----------------------------------------------------------------------------------

// A piece of 16 x 16 on the left side of a product: for one m16n8k16, or two m16n8k8.
template <class X>
struct Left {
  uint32_t x[4];
};
template <>
struct Left<float> {
  float x[2][4];
};
template <>
struct Left<tf32> {
  float x[2][4];
};

template <class X>
struct Left<Twice<X>> {
  Left<X> big, small;
};

// 16 (k) x 16 (n) on the right side of a product, as stored: [2 * (n / 8) + k / 8], each a pair
// along k.
template <class E>
struct Right {
  uint32_t x[4];
};
template <>
struct Right<float> {
  float2 x[4];
};

// A 16-bit or float fragment of storage type E as an operand of kind X.
template <class X, class E>
SIMT_DEV Left<X> left(const Left<E>& a) {
  if constexpr (std::is_same_v<X, E>) {
    return a;
  } else {
    Left<X> b;
    SIMT_UNROLL
    for (int s = 0; s < 2; ++s) SIMT_UNROLL
    for (int i = 0; i < 2; ++i) {
      if constexpr (is_16_bit<X>) {
        b.x[2 * s + i] = pack2<X>(a.x[s][i], a.x[s][i + 2]);
      } else if constexpr (is_16_bit<E>) {
        const float2 pair = unpack2<E>(a.x[2 * s + i]);
        b.x[s][i] = pair.x;
        b.x[s][i + 2] = pair.y;
      } else {
        b.x[s][i] = near_tf32(a.x[s][i]);
        b.x[s][i + 2] = near_tf32(a.x[s][i + 2]);
      }
    }
    return b;
  }
}

// The pair of half s in row g or g + 8 (r) of a fragment.
template <class X>
SIMT_DEV float2 pair(const Left<X>& a, int s, int r) {
  if constexpr (is_16_bit<X>)
    return unpack2<X>(a.x[2 * s + r]);
  else
    return {a.x[s][r], a.x[s][r + 2]};
}
// The two k8 halves of n8 tile i as pairs of floats.
template <class E>
SIMT_DEV float2 pair(const Right<E>& b, int i) {
  if constexpr (is_16_bit<E>)
    return unpack2<E>(b.x[i]);
  else
    return b.x[i];
}

template <class X>
inline constexpr bool is_twice = false;
template <class X>
inline constexpr bool is_twice<Twice<X>> = true;

// (c0 c1) += a b, 16 x 16 each.
template <class X, class E>
SIMT_DEV void product(float (&c0)[4], float (&c1)[4], const Left<X>& a, const Right<E>& b) {
  if constexpr (is_twice<X>) {
    product(c0, c1, a.small, b);
    product(c0, c1, a.big, b);
  } else if constexpr (is_16_bit<X>) {
    static_assert(std::is_same_v<X, E>);
    Mma<X>::m16n8k16(c0, a.x, b.x[0], b.x[1]);
    Mma<X>::m16n8k16(c1, a.x, b.x[2], b.x[3]);
  } else {
    SIMT_UNROLL
    for (int s = 0; s < 2; ++s) {
      const float2 b0 = pair(b, s), b1 = pair(b, 2 + s);
      if constexpr (std::is_same_v<X, tf32>) {
        const bool exact = is_16_bit<E>;
        Mma<float>::m16n8k8(c0, a.x[s], exact ? b0.x : near_tf32(b0.x), exact ? b0.y : near_tf32(b0.y));
        Mma<float>::m16n8k8(c1, a.x[s], exact ? b1.x : near_tf32(b1.x), exact ? b1.y : near_tf32(b1.y));
      } else {  // small b + a small + a b: the matrix unit cuts each number to its big part, and small products come first
        float small[4];
        SIMT_UNROLL
        for (int e = 0; e < 4; ++e) small[e] = a.x[s][e] - cut_tf32(a.x[s][e]);
        Mma<float>::m16n8k8(c0, small, b0.x, b0.y);
        Mma<float>::m16n8k8(c1, small, b1.x, b1.y);
        Mma<float>::m16n8k8(c0, a.x[s], b0.x - cut_tf32(b0.x), b0.y - cut_tf32(b0.y));
        Mma<float>::m16n8k8(c1, a.x[s], b1.x - cut_tf32(b1.x), b1.y - cut_tf32(b1.y));
        Mma<float>::m16n8k8(c0, a.x[s], b0.x, b0.y);
        Mma<float>::m16n8k8(c1, a.x[s], b1.x, b1.y);
      }
    }
  }
}

// The left operands of mma: piece(m, l) is the 16 x 16 numbers at (16 m, 16 l).

// Rows of a tile from i on, a multiple of 8.
template <class X, class E, int R, int C>
struct Rows {
  using Kind = X;
  Shared<E, R, C> t;
  int i;
  Lane lane;
  SIMT_DEV Left<X> piece(int m, int l) const {
    Left<E> a;
    if constexpr (is_16_bit<E>) {
      ldmatrix_x4(a.x, t.s, t.at(i + 16 * m, 16 * l, lane.down_row(), lane.down_column()));
    } else {
      SIMT_UNROLL
      for (int r = 0; r < 2; ++r) SIMT_UNROLL
      for (int s = 0; s < 2; ++s) {
        const auto x = t.s.template ldv<float2>(t.at(i + 16 * m + 8 * r, 16 * l, lane.row(), 8 * s + lane.pair()));
        a.x[s][r] = x.x;
        a.x[s][r + 2] = x.y;
      }
    }
    return left<X>(a);
  }
};
template <class X, class E, int R, int C>
SIMT_DEV Rows<X, E, R, C> operand(const Shared<E, R, C>& t, int i) {
  return {t, i, {}};
}

// Columns of a tile from j on, a multiple of 16, as rows: the transposed tile.
template <class X, class E, int R, int C>
struct Columns {
  using Kind = X;
  Shared<E, R, C> t;
  int j;
  Lane lane;
  SIMT_DEV Left<X> piece(int m, int l) const {
    Left<E> a;
    if constexpr (is_16_bit<E>) {
      ldmatrix_x4_trans(a.x, t.s, t.at(16 * l, j + 16 * m, lane.across_row(), lane.across_column()));
    } else {
      SIMT_UNROLL
      for (int s = 0; s < 2; ++s) SIMT_UNROLL
      for (int e = 0; e < 4; ++e)
        a.x[s][e] = t.s.ld(t.at(16 * l + 8 * s, j + 16 * m, lane.pair() + (e >> 1), lane.row() + (e & 1) * 8));
    }
    return left<X>(a);
  }
};
template <class X, class E, int R, int C>
SIMT_DEV Columns<X, E, R, C> operand_t(const Shared<E, R, C>& t, int j) {
  return {t, j, {}};
}

// A strip, rounded to X piece by piece.
template <class X, int R, int C>
struct Rounded {
  using Kind = X;
  const Strip<R, C>& a;
  SIMT_DEV Left<X> piece(int m, int l) const {
    Left<X> b;
    SIMT_UNROLL
    for (int s = 0; s < 2; ++s) {
      const float (&c)[4] = a.x[m][2 * l + s];
      if constexpr (is_16_bit<X>) {
        b.x[2 * s] = pack2<X>(c[0], c[1]);
        b.x[2 * s + 1] = pack2<X>(c[2], c[3]);
      } else if constexpr (std::is_same_v<X, tf32>) {
        b.x[s][0] = near_tf32(c[0]);
        b.x[s][1] = near_tf32(c[2]);
        b.x[s][2] = near_tf32(c[1]);
        b.x[s][3] = near_tf32(c[3]);
      } else {
        b.x[s][0] = c[0];
        b.x[s][1] = c[2];
        b.x[s][2] = c[1];
        b.x[s][3] = c[3];
      }
    }
    return b;
  }
};
template <class X, int R, int C>
SIMT_DEV Rounded<X, R, C> operand(const Strip<R, C>& a) {
  return {a};
}

// An operand of floats, as Twice<X>.
template <class X, class A>
struct InTwo {
  using Kind = Twice<X>;
  A a;
  SIMT_DEV Left<Twice<X>> piece(int m, int l) const {
    const Left<float> whole = a.piece(m, l);
    const Left<X> big = left<X>(whole);
    Left<float> rest;
    SIMT_UNROLL
    for (int s = 0; s < 2; ++s) SIMT_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float2 x = pair(big, s, r);
      rest.x[s][r] = whole.x[s][r] - (is_16_bit<X> ? x.x : cut_tf32(x.x));
      rest.x[s][r + 2] = whole.x[s][r + 2] - (is_16_bit<X> ? x.y : cut_tf32(x.y));
    }
    return {big, left<X>(rest)};
  }
};
template <class X, class A>
SIMT_DEV InTwo<X, A> in_two(const A& a) {
  return {a};
}

// a diag(w), where w is in shared memory or is read like it. The numbers are weighted in the type
// of A, or as floats, and converted to X.
template <class X, class A, class W>
struct Weighted {
  using Kind = X;
  A a;
  W w;
  Lane lane;
  SIMT_DEV Left<X> piece(int m, int l) const {
    using E = std::conditional_t<std::is_same_v<X, float>, float, typename A::Kind>;
    Left<E> piece = left<E>(a.piece(m, l));
    SIMT_UNROLL
    for (int s = 0; s < 2; ++s) {
      const auto f = w.template ldv<float2>(16 * l + 8 * s + lane.pair());
      SIMT_UNROLL
      for (int i = 0; i < 2; ++i) {
        if constexpr (is_16_bit<E>) {
          const float2 x = unpack2<E>(piece.x[2 * s + i]);
          piece.x[2 * s + i] = pack2<E>(x.x * f.x, x.y * f.y);
        } else {
          piece.x[s][i] *= f.x;
          piece.x[s][i + 2] *= f.y;
        }
      }
    }
    return left<X>(piece);
  }
};
template <class X, class A, class W>
SIMT_DEV Weighted<X, A, W> weighted(const A& a, const W& w) {
  return {a, w, {}};
}

// An operand [R, L] that is kept in registers.
template <class X, int R, int L>
struct Held {
  using Kind = X;
  Left<X> x[R / 16][L / 16];
  SIMT_DEV const Left<X>& piece(int m, int l) const { return x[m][l]; }
};
template <int R, int L, class A>
SIMT_DEV Held<typename A::Kind, R, L> hold(const A& a) {
  Held<typename A::Kind, R, L> to;
  SIMT_UNROLL
  for (int m = 0; m < R / 16; ++m) SIMT_UNROLL
  for (int l = 0; l < L / 16; ++l) to.x[m][l] = a.piece(m, l);
  return to;
}

// a_ij = f(a_ij, b_ij, of_row(i)), piece by piece of the operand b.
template <int R, int C, class B, class W, class F>
SIMT_DEV void merge_operand(Strip<R, C>& a, const B& b, W&& of_row, F&& f) {
  const Lane lane;
  SIMT_UNROLL
  for (int m = 0; m < R / 16; ++m) {
    const float weight[2] = {of_row(16 * m + lane.row()), of_row(16 * m + lane.row() + 8)};
    SIMT_UNROLL
    for (int l = 0; l < C / 16; ++l) {
      sync_warp();  // else the compiler loads all pieces first, for which there may be no registers
      const auto piece = b.piece(m, l);
      SIMT_UNROLL
      for (int s = 0; s < 2; ++s) SIMT_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float2 x = pair(piece, s, r);
        float* to = &a.x[m][2 * l + s][2 * r];
        to[0] = f(to[0], x.x, weight[r]);
        to[1] = f(to[1], x.y, weight[r]);
      }
    }
  }
}

// to_j += weight sum_i a_ij b_ij, by one warp.
template <int R, int C, class B>
SIMT_DEV void add_products(sptr<float> to, const Strip<R, C>& a, const B& b, float weight) {
  SIMT_UNROLL
  for (int l = 0; l < C / 16; ++l) {
    Strip<R, 16> ab;
    SIMT_UNROLL
    for (int m = 0; m < R / 16; ++m) {
      const auto piece = b.piece(m, l);
      SIMT_UNROLL
      for (int s = 0; s < 2; ++s) SIMT_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float2 x = pair(piece, s, r);
        ab.x[m][s][2 * r] = a.x[m][2 * l + s][2 * r] * x.x;
        ab.x[m][s][2 * r + 1] = a.x[m][2 * l + s][2 * r + 1] * x.y;
      }
    }
    add_columns(to, 16 * l, ab, weight);
  }
}

// ---- products -----------------------------------------------------------------------------------

namespace tile {

template <class E, int R, int C>
SIMT_DEV Right<E> right_nt(const Shared<E, R, C>& b, int n, int l, const Lane& lane) {
  Right<E> r;
  if constexpr (is_16_bit<E>) {
    ldmatrix_x4(r.x, b.s, b.at(16 * n, 16 * l, lane.across_row(), lane.across_column()));
  } else {
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i)
      r.x[i] = b.s.template ldv<float2>(b.at(16 * n + (i >> 1) * 8, 16 * l, lane.row(), (i & 1) * 8 + lane.pair()));
  }
  return r;
}
template <class E, int R, int C>
SIMT_DEV Right<E> right(const Shared<E, R, C>& b, int l, int j, const Lane& lane) {
  Right<E> r;
  if constexpr (is_16_bit<E>) {
    ldmatrix_x4_trans(r.x, b.s, b.at(16 * l, j, lane.down_row(), lane.down_column()));
  } else {
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * l + (i & 1) * 8, column = (i >> 1) * 8 + lane.row();
      r.x[i] = {b.s.ld(b.at(row, j, lane.pair(), column)), b.s.ld(b.at(row, j, lane.pair() + 1, column))};
    }
  }
  return r;
}

template <bool kRounded, class A, class B>
SIMT_DEV void add_product(float (&c0)[4], float (&c1)[4], const A& a, const B& b) {
  if constexpr (kRounded) {
    float d0[4] = {}, d1[4] = {};
    product(d0, d1, a, b);
    SIMT_UNROLL
    for (int e = 0; e < 4; ++e) {
      c0[e] += d0[e];
      c1[e] += d1[e];
    }
  } else {
    product(c0, c1, a, b);
  }
}

}  // namespace tile

// c += a b^T: a [R, L], b [C, L]. kLower: b is lower triangular; pieces (n, l) with l > n are not
// read. kRounded: sums of more than 16 products are rounded to nearest, while the matrix unit
// truncates.
template <bool kLower = false, bool kRounded = false, int R, int C, class A, class E, int L>
SIMT_DEV void mma_nt(Strip<R, C>& c, const A& a, const Shared<E, C, L>& b) {
  const Lane lane;
  SIMT_UNROLL
  for (int l = 0; l < L / 16; ++l) {
    Left<typename A::Kind> pieces[R / 16];
    SIMT_UNROLL
    for (int m = 0; m < R / 16; ++m) pieces[m] = a.piece(m, l);
    SIMT_UNROLL
    for (int n = kLower ? l : 0; n < C / 16; ++n) {
      const Right<E> r = tile::right_nt(b, n, l, lane);
      SIMT_UNROLL
      for (int m = 0; m < R / 16; ++m) tile::add_product<kRounded>(c.x[m][2 * n], c.x[m][2 * n + 1], pieces[m], r);
    }
  }
}
// c += a b: a [R, L]; b is columns [j, j + C) of a tile [L, C2].
template <bool kRounded = false, int R, int C, class A, class E, int L, int C2>
SIMT_DEV void mma(Strip<R, C>& c, const A& a, const Shared<E, L, C2>& b, int j) {
  const Lane lane;
  SIMT_UNROLL
  for (int l = 0; l < L / 16; ++l) {
    Left<typename A::Kind> pieces[R / 16];
    SIMT_UNROLL
    for (int m = 0; m < R / 16; ++m) pieces[m] = a.piece(m, l);
    SIMT_UNROLL
    for (int n = 0; n < C / 16; ++n) {
      const Right<E> r = tile::right(b, l, j + 16 * n, lane);
      SIMT_UNROLL
      for (int m = 0; m < R / 16; ++m) tile::add_product<kRounded>(c.x[m][2 * n], c.x[m][2 * n + 1], pieces[m], r);
    }
  }
}

}  // namespace simt
