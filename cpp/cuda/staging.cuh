// staging.cuh - rows of global memory, widened, into shared memory: with any stride, any alignment and any length.
#pragma once
#include "../simt/simt.h"

namespace lc::cuda {

using namespace simt;

// n numbers that are loaded or stored at once.
template <class T, int n>
struct alignas(n * sizeof(T)) Packed {
  T x[n];
};

// The distance of rows of n numbers, four of which are stored at once at the same place of eight neighbouring rows:
// those lie in different banks.
constexpr int padded(int n) { return n + 4; }

// to[i][j] = f(i, from[i][j]), rows of shared memory `pitch` apart, for i < n and j < columns; zeros in the rest of
// [kRows, width], width <= kWidth.
template <int kRows, int kWidth, class E, class F>
SIMT_DEV void stage_rows(sptr<Accumulator<E>> to, int pitch, int width, gptr<const E> from, int64_t stride, int n,
                         int columns, F&& f) {
  for (int at = tid(); at < kRows * kWidth; at += nthreads()) {
    const int i = at / kWidth, j = at % kWidth;
    if (j < width) to.st(i * pitch + j, i < n && j < columns ? f(i, widen(from.ld(i * stride + j))) : 0);
  }
}

// to[j][i] = from[i][j] for i < n and j < columns, rows of shared memory padded(kRows) apart; zeros in the rest of
// [kWidth, kRows].
template <int kRows, int kWidth, class E>
SIMT_DEV void stage_columns(sptr<Accumulator<E>> to, gptr<const E> from, int64_t stride, int n, int columns) {
  for (int at = tid(); at < kRows / 4 * kWidth; at += nthreads()) {
    const int i = at / kWidth * 4, j = at % kWidth;
    Packed<Accumulator<E>, 4> four;
    SIMT_UNROLL
    for (int m = 0; m < 4; ++m) four.x[m] = i + m < n && j < columns ? widen(from.ld((i + m) * stride + j)) : 0;
    to.stv(j * padded(kRows) + i, four);
  }
}

}  // namespace lc::cuda
