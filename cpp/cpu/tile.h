// tile.h - the tile verbs of the CPU: load, zero, mma, map, store; the same names and meanings as on the GPU, so that a
// method's two sources read alike. T is the accumulator's type (float, double), E the storage type of the caller's
// tensors.
#pragma once
#include "simd.h"
#include "threads.h"

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

// Row-major memory; ld is the distance of rows in elements.
template <class T>
struct Matrix {
  T* data;
  int64_t ld;
  LC_INLINE T* row(int64_t i) const { return data + i * ld; }
};

// What was computed, counted in the build that tests costs (tests/cpp/cost_test.cpp).
#ifdef LC_COUNT
LC_INLINE void count_flop(int64_t n) { counted.flop += n; }
#else
LC_INLINE void count_flop(int64_t) {}
#endif

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

// x = f(i, j, x) for row i and the vector that starts at column j, both counted within the tile.
template <class T, int M, int N, class F>
LC_INLINE void map(Tile<T, M, N>& c, F&& f) {
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) c.x[i][j] = f(i, j * kLanes<T>, c.x[i][j]);
}

namespace detail {

// c_i += sum over l of a(i, l) row l of b
template <class T, int M, int N, class F>
LC_INLINE void mma(Tile<T, M, N>& c, F&& a, Matrix<const T> b, int depth) {
  count_flop(int64_t{2} * M * N * kLanes<T> * depth);
  for (int l = 0; l < depth; ++l) {
    Vec<T> row[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) row[j] = load<T>(b.data + l * b.ld + j * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec<T> x = broadcast<T>(a(i, l));
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) c.x[i][j] = x * row[j] + c.x[i][j];
    }
  }
}

}  // namespace detail

// c += a b over depth columns of a and rows of b. One chain of FMAs per element, in order of depth: the result does not
// depend on how the matrix is cut into tiles.
template <class T, int M, int N>
LC_INLINE void mma(Tile<T, M, N>& c, Matrix<const T> a, Matrix<const T> b, int depth) {
  detail::mma(c, [&](int i, int l) { return a.data[i * a.ld + l]; }, b, depth);
}

// c += a^T b over depth rows of a and b, in the same order.
template <class T, int M, int N>
LC_INLINE void mma_tn(Tile<T, M, N>& c, Matrix<const T> a, Matrix<const T> b, int depth) {
  detail::mma(c, [&](int i, int l) { return a.data[l * a.ld + i]; }, b, depth);
}

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

// The widest tile, and the tallest of each width, whose accumulators, one row of b and one element of a fit the
// registers.
constexpr int kTileWidth = kRegisters == 32 ? 4 : 2;
constexpr int tile_height(int width) {
  return kRegisters == 32 ? (width == 4 ? 6 : width == 3 ? 8 : 12) : kVectorBytes == 32 ? (width == 2 ? 6 : 8) : 4;
}

// Cuts columns of vectors [0, n) into panels of almost equal width.
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

// Not inlined: each size of tile gets registers of its own.
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

// Calls f(tile, i, c) for the tiles that cover rows [begin, end) and vectors [c, c + width) of a matrix.
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

// One row, widened to T and padded with zeros to whole vectors.
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

// to [columns, padded rows] = transpose of from [rows, columns]; what pads the rows is zero.
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

}  // namespace lc::LC_ISA
