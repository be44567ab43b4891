// tile.h - the tile verbs of the CPU: load, zero, mma, map, store. Names and meanings are those of
// the GPU's verbs, so that the two sources of a method read alike. T is the type of accumulators
// (float, double), E the storage type of the caller's tensors, and X the type of a product's
// operands.
#pragma once
#include "counted.h"
#include "simd.h"

namespace lc::LC_ISA {

template <class E>
using Accumulator = std::conditional_t<std::is_same_v<E, double>, double, float>;

// Calls f(E{}) with the storage type of t.
template <class F>
LC_INLINE void with_type(Type t, F&& f) {
  switch (t) {
    case Type::f64:
      return f(double{});
    case Type::f32:
      return f(float{});
    case Type::f16:
      return f(f16{});
    case Type::bf16:
      return f(bf16{});
  }
}

template <class T>
LC_INLINE int vectors(int64_t columns) {
  return int((columns + kLanes<T> - 1) / kLanes<T>);
}
template <class T>
LC_INLINE int padded(int64_t columns) {
  return vectors<T>(columns) * kLanes<T>;
}

// Row-major memory; ld is the distance between rows in elements.
template <class T>
struct Matrix {
  T* data;
  int64_t ld;
  LC_INLINE T* row(int64_t i) const { return data + i * ld; }
};

// ---- register tiles: M rows of N vectors --------------------------------------------------------

template <class T, int M_, int N_>
struct Tile {
  static constexpr int M = M_, N = N_;
  Vec<T> x[M][N];
};

template <class T, int M, int N>
LC_INLINE void zero(Tile<T, M, N>& c) {
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) c.x[i][j] = Vec<T>{};
}

// Replaces each vector x by f(i, j, x): i is its row and j its first column, both counted within
// the tile.
template <class T, int M, int N, class F>
LC_INLINE void map(Tile<T, M, N>& c, F&& f) {
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) c.x[i][j] = f(i, j * kLanes<T>, c.x[i][j]);
}

// ---- products -----------------------------------------------------------------------------------

// The left operand of a product: rows of X numbers (operand), or columns, that is a transposed
// matrix (operand_t). X decides which instructions multiply. Today it is the accumulator's type,
// and the instruction is the vector FMA. Another kind of operand is another X with an mma of its
// own.
template <class X, bool kTransposed>
struct Operand {
  using Kind = X;
  const X* data;
  int64_t ld;
  LC_INLINE X at(int i, int l) const { return kTransposed ? data[l * ld + i] : data[i * ld + l]; }
};
template <class X>
LC_INLINE Operand<X, false> operand(const X* data, int64_t ld) {
  return {data, ld};
}
template <class X>
LC_INLINE Operand<X, true> operand_t(const X* data, int64_t ld) {
  return {data, ld};
}

// c += a b over `depth` columns of a and rows of b. Each element is one chain of FMAs in order of
// depth, so the result does not depend on how the matrix is cut into tiles.
template <class T, int M, int N, class A>
LC_INLINE void mma(Tile<T, M, N>& c, A a, Matrix<const typename A::Kind> b, int depth) {
  static_assert(std::is_same_v<typename A::Kind, T>, "no instruction for operands of this type");
  count_flop(int64_t{2} * M * N * kLanes<T> * depth);
  for (int l = 0; l < depth; ++l) {
    Vec<T> row[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) row[j] = load<T>(b.data + l * b.ld + j * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec<T> x = broadcast<T>(a.at(i, l));
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) c.x[i][j] = x * row[j] + c.x[i][j];
    }
  }
}

// ---- tiles and memory ---------------------------------------------------------------------------

template <class T, int M, int N>
LC_INLINE void load(Tile<T, M, N>& c, Matrix<const T> from) {
  map(c, [&](int i, int j, Vec<T>) { return load<T>(from.row(i) + j); });
}
template <class T, int M, int N>
LC_INLINE void store(Matrix<T> to, const Tile<T, M, N>& c) {
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store<T>(to.row(i) + j * kLanes<T>, c.x[i][j]);
}

// The largest tiles that fit the registers: the width in vectors, and the height for each width.
// The registers hold the accumulators, one row of b and one element of a.
constexpr int kTileWidth = kRegisters == 32 ? 4 : 2;
constexpr int tile_height(int width) {
  return kRegisters == 32 ? (width == 4 ? 6 : width == 3 ? 8 : 12) : kVectorBytes == 32 ? (width == 2 ? 6 : 8) : 4;
}

// The columns [0, n) of a matrix, counted in vectors and cut into panels of almost equal width.
struct Panels {
  int n, count;
  LC_INLINE explicit Panels(int vectors) : n(vectors), count((vectors + kTileWidth - 1) / kTileWidth) {}
  LC_INLINE int begin(int panel) const { return n * panel / count; }
  LC_INLINE int width(int panel) const { return begin(panel + 1) - begin(panel); }
  template <class T>
  LC_INLINE int column(int panel) const {
    return begin(panel) * kLanes<T>;
  }
  template <class T>
  LC_INLINE int columns(int panel) const {
    return width(panel) * kLanes<T>;
  }
};

namespace detail {

// It is not inlined, so that the compiler allocates registers for each size of tile alone.
template <class T, int M, int N, class F>
__attribute__((noinline)) void one_tile(F& f, int i, int c) {
  Tile<T, M, N> tile;
  f(tile, i, c);
}

template <class T, int M, int N, class F>
LC_INLINE void tiles_of_height(F& f, int& i, int end, int c) {
  if constexpr (M <= tile_height(N))
    for (; i + M <= end; i += M) one_tile<T, M, N>(f, i, c);
}

template <class T, int N, class F>
LC_INLINE void tiles_of_width(F& f, int i, int end, int c) {
  tiles_of_height<T, tile_height(N), N>(f, i, end, c);
  tiles_of_height<T, 4, N>(f, i, end, c);
  tiles_of_height<T, 2, N>(f, i, end, c);
  tiles_of_height<T, 1, N>(f, i, end, c);
}

}  // namespace detail

// Calls f(tile, i, c) for the tiles that cover rows [begin, end) and vectors [c, c + width) of a
// matrix.
template <class T, class F>
LC_INLINE void for_tiles(int begin, int end, int c, int width, F&& f) {
  if constexpr (kTileWidth == 4) {
    if (width == 4) return detail::tiles_of_width<T, 4>(f, begin, end, c);
    if (width == 3) return detail::tiles_of_width<T, 3>(f, begin, end, c);
  }
  if (width == 2) return detail::tiles_of_width<T, 2>(f, begin, end, c);
  if (width == 1) return detail::tiles_of_width<T, 1>(f, begin, end, c);
}

// ---- matrices in memory -------------------------------------------------------------------------

// Copies one row, widened to T and padded with zeros to whole vectors.
template <class T, class E>
LC_INLINE void load_row(T* to, const E* from, int columns) {
  int j = 0;
  for (; j + kLanes<T> <= columns; j += kLanes<T>) store<T>(to + j, load<T>(from + j));
  if (j < columns) store<T>(to + j, load<T>(from + j, columns - j));
}
template <class T, class E>
LC_INLINE void store_row(E* to, const T* from, int columns) {
  int j = 0;
  for (; j + kLanes<T> <= columns; j += kLanes<T>) store<T>(to + j, load<T>(from + j));
  if (j < columns) store<T>(to + j, load<T>(from + j), columns - j);
}

template <class T, class E>
LC_INLINE void load(Matrix<T> to, Matrix<const E> from, int rows, int columns) {
  for (int i = 0; i < rows; ++i) load_row<T>(to.row(i), from.row(i), columns);
}
template <class T, class E>
LC_INLINE void store(Matrix<E> to, Matrix<const T> from, int rows, int columns) {
  for (int i = 0; i < rows; ++i) store_row<T>(to.row(i), from.row(i), columns);
}

// Writes the transpose of `from` [rows, columns] to `to` [columns, padded rows]. The padding is
// zero.
template <class T, class E>
LC_INLINE void load_transposed(Matrix<T> to, Matrix<const E> from, int rows, int columns) {
  constexpr int L = kLanes<T>;
  for (int i = 0; i < rows; i += L)
    for (int j = 0; j < columns; j += L) {
      const int live = rows - i < L ? rows - i : L, wide = columns - j < L ? columns - j : L;
      Vec<T> r[L];
      if (live == L && wide == L) {
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) r[l] = load<T>(from.row(i + l) + j);
      } else {
        for (int l = 0; l < L; ++l) r[l] = l < live ? load<T>(from.row(i + l) + j, wide) : Vec<T>{};
      }
      transpose<T>(r);
      if (wide == L) {
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) store<T>(to.row(j + l) + i, r[l]);
      } else {
        for (int l = 0; l < wide; ++l) store<T>(to.row(j + l) + i, r[l]);
      }
    }
}

// Writes the transpose of `from` [rows, columns], whose rows are padded to whole vectors, to `to`
// [columns, rows].
template <class T, class E>
LC_INLINE void store_transposed(Matrix<E> to, Matrix<const T> from, int rows, int columns) {
  constexpr int L = kLanes<T>;
  for (int i = 0; i < rows; i += L)
    for (int j = 0; j < columns; j += L) {
      const int live = rows - i < L ? rows - i : L, wide = columns - j < L ? columns - j : L;
      Vec<T> r[L];
      for (int l = 0; l < L; ++l) r[l] = l < live ? load<T>(from.row(i + l) + j) : Vec<T>{};
      transpose<T>(r);
      for (int l = 0; l < wide; ++l) {
        if (live == L)
          store<T>(to.row(j + l) + i, r[l]);
        else
          store<T>(to.row(j + l) + i, r[l], live);
      }
    }
}

}  // namespace lc::LC_ISA
