// problem.cuh - the helpers of problem.h for kernels, which read a Problem through checked views.
#pragma once
#include "../problem.h"
#include "../simt/simt.h"

namespace lc::cuda {

using namespace simt;

// Row (b, h, n) of a tensor.
template <class T>
SIMT_DEV gptr<T> row(const View& w, int64_t b, int64_t h, int64_t n) {
  return {w.at<T>(b, h, n)};
}

// sequence() of problem.h. The host cannot check cu_seqlens on the device, so the bounds are
// clamped to [0, N] here.
SIMT_DEV Sequence sequence_between(const Problem& p, int64_t begin, int64_t end) {
  begin = begin < 0 ? 0 : begin > p.N ? p.N : begin;
  end = end < begin ? begin : end > p.N ? p.N : end;
  return {0, begin, end - begin};
}
SIMT_DEV Sequence sequence_at(const Problem& p, int64_t b) {
  if (!p.cu_bits) return {b, 0, p.N};
  if (p.cu_bits == 64) {
    const gptr<const int64_t> bounds{static_cast<const int64_t*>(p.cu_seqlens)};
    return sequence_between(p, bounds.ld(b), bounds.ld(b + 1));
  }
  const gptr<const int32_t> bounds{static_cast<const int32_t*>(p.cu_seqlens)};
  return sequence_between(p, bounds.ld(b), bounds.ld(b + 1));
}

// slot() of problem.h.
SIMT_DEV int64_t slot_at(const Problem& p, int64_t b) {
  if (!p.index_bits) return b;
  if (p.index_bits == 64) return gptr<const int64_t>{static_cast<const int64_t*>(p.state_indices)}.ld(b);
  return gptr<const int32_t>{static_cast<const int32_t*>(p.state_indices)}.ld(b);
}

// log_decay() and log2_decay() of problem.h.
SIMT_DEV double log_decay_at(const Problem& p, int64_t b, int64_t hs, int64_t n) {
  if (!p.log_decay) return p.uniform_log_decay;
  return p.decay_type == Type::f64 ? row<const double>(p.log_decay, b, hs, n).ld(0)
                                   : double(row<const float>(p.log_decay, b, hs, n).ld(0));
}
SIMT_DEV double log2_decay_at(const Problem& p, int64_t b, int64_t hs, int64_t n) {
  return log2_decay(p, log_decay_at(p, b, hs, n));
}

// 2^x - 1, accurate for x close to 0.
SIMT_DEV double ex2m1(double x) { return ::expm1(x * 0.6931471805599453); }
SIMT_DEV float ex2m1(float x) { return ::expm1f(x * 0.693147181f); }

// Sum over the lanes of a warp, returned to all lanes.
template <class T>
SIMT_DEV T warp_sum(T x) {
  SIMT_UNROLL
  for (int d = 1; d < 32; d *= 2) x += shfl_xor(x, d);
  return x;
}

// The greatest x of the lanes of a warp, returned to all lanes.
SIMT_DEV float warp_max(float x) {
  SIMT_UNROLL
  for (int d = 1; d < 32; d *= 2) {
    const float y = shfl_xor(x, d);
    x = y > x ? y : x;
  }
  return x;
}

// Inclusive sum over the lanes of a warp.
template <class T>
SIMT_DEV T cumulative(T x) {
  SIMT_UNROLL
  for (int d = 1; d < 32; d *= 2) {
    const T y = shfl_up(x, d);
    if (lane() >= d) x += y;
  }
  return x;
}

}  // namespace lc::cuda
