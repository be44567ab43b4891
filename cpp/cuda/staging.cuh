// staging.cuh - copies rows of global memory, widened, to shared memory, for any stride, alignment
// and length.
#pragma once
#include "../simt/simt.h"

namespace lc::cuda {

using namespace simt;

// n numbers that one instruction loads or stores.
template <class T, int n>
struct alignas(n * sizeof(T)) Packed {
  T x[n];
};

// Distance of rows of n numbers in shared memory, such that the same four numbers of eight adjacent
// rows are in different banks.
constexpr int padded(int n) { return n + 4; }

// to[i][j] = f(i, from[i][j]) for i < n and j < columns, zeros in the rest of [kRows, kColumns].
template <int kRows, int kColumns, class E, class F>
SIMT_DEV void stage_rows(sptr<Accumulator<E>> to, gptr<const E> from, int64_t stride, int n, int columns, F&& f) {
  for (int at = tid(); at < kRows * kColumns; at += nthreads()) {
    const int i = at / kColumns, j = at % kColumns;
    to.st(i * padded(kColumns) + j, i < n && j < columns ? f(i, widen(from.ld(i * stride + j))) : 0);
  }
}

// to[j][i] = from[i][j] for i < n and j < columns, zeros in the rest of [kColumns, kRows].
template <int kRows, int kColumns, class E>
SIMT_DEV void stage_columns(sptr<Accumulator<E>> to, gptr<const E> from, int64_t stride, int n, int columns) {
  for (int at = tid(); at < kRows / 4 * kColumns; at += nthreads()) {
    const int i = at / kColumns * 4, j = at % kColumns;
    Packed<Accumulator<E>, 4> four;
    SIMT_UNROLL
    for (int m = 0; m < 4; ++m) four.x[m] = i + m < n && j < columns ? widen(from.ld((i + m) * stride + j)) : 0;
    to.stv(j * padded(kRows) + i, four);
  }
}

}  // namespace lc::cuda
