// lengths.cuh - GPU: what Mamba-2 adds to the operator: lengths of tokens, the skip and the gate.
//
//   length_t    = clamp(softplus(dt_t + dt_bias))       softplus(x) = max(x, 0) + log(1 + e^-|x|)
//   log_decay_t = log_decay length_t                    log_decay: per unit of length
//
//   TokenLengths writes both as [B, Hs, N], which the other kernels of the call read. T: float64
//   for float64 inputs, else float32. block: 32 heads of 32 tokens, turned in shared memory, since
//   dt is usually [B, N, Hs] in memory. Mamba-2, arXiv:2405.21060
#pragma once
#include "problem.cuh"

namespace lc::cuda {

// ---- one number of a tensor whose type is known at run time -------------------------------------

template <class T>
SIMT_DEV T number(Type type, const void* data, int64_t at) {
  if (type == Type::f64) return T(gptr<const double>{static_cast<const double*>(data)}.ld(at));
  if (type == Type::f32) return T(gptr<const float>{static_cast<const float*>(data)}.ld(at));
  if (type == Type::f16) return T(widen(gptr<const f16>{static_cast<const f16*>(data)}.ld(at)));
  return T(widen(gptr<const bf16>{static_cast<const bf16*>(data)}.ld(at)));
}
SIMT_DEV void set_number(Type type, void* data, int64_t at, double x) {
  if (type == Type::f64) return gptr<double>{static_cast<double*>(data)}.st(at, x);
  if (type == Type::f32) return gptr<float>{static_cast<float*>(data)}.st(at, float(x));
  if (type == Type::f16) return gptr<f16>{static_cast<f16*>(data)}.st(at, narrow<f16>(float(x)));
  gptr<bf16>{static_cast<bf16*>(data)}.st(at, narrow<bf16>(float(x)));
}
SIMT_DEV int64_t offset(const View& w, int64_t b, int64_t h, int64_t n) {
  return b * w.stride[0] + h * w.stride[1] + n * w.stride[2];
}

// ---- lengths ------------------------------------------------------------------------------------

SIMT_DEV float exp_of(float x) { return ::expf(x); }
SIMT_DEV double exp_of(double x) { return ::exp(x); }
SIMT_DEV float log1p_of(float x) { return ::log1pf(x); }
SIMT_DEV double log1p_of(double x) { return ::log1p(x); }

template <class T>
struct Length {
  T value, slope;  // the length, and its derivative by dt

  SIMT_DEV Length(const Problem& p, int64_t b, int64_t hs, int64_t n) {
    T u = number<T>(p.dt_type, p.dt.data, offset(p.dt, b, hs, n));
    if (p.dt_bias) u += number<T>(p.dt_bias_type, p.dt_bias.data, hs * p.dt_bias.stride[1]);
    value = u;
    slope = 1;
    if (p.softplus) {
      const T small = exp_of(u > 0 ? -u : u);
      value = (u > 0 ? u : T(0)) + log1p_of(small);
      slope = (u > 0 ? T(1) : small) / (1 + small);
    }
    if (value < T(p.dt_min)) {
      value = T(p.dt_min);
      slope = 0;
    } else if (value > T(p.dt_max)) {
      value = T(p.dt_max);
      slope = 0;
    }
  }
};

// The log-decay per unit of length.
SIMT_DEV double rate_at(const Problem& p, int64_t b, int64_t hs) {
  const double rate = log_decay_at(p, b, hs, 0);
  return rate > kLeastRate ? rate : kLeastRate;
}

template <class T>
struct TokenLengths {
  static constexpr const char* kName = "token lengths";
  static constexpr int kMaxThreads = 256, kMinBlocks = 4, kSide = 32;
  static constexpr int kSharedBytes = kSide * (kSide + 1) * int(sizeof(T));
  struct Params {
    Problem p;
    T *lengths, *log_decays;
  };
  static LC_INLINE int64_t blocks_of(int64_t n) { return (n + kSide - 1) / kSide; }

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    const int64_t along = blocks_of(p.N), across = blocks_of(p.Hs);
    const int64_t t0 = bid().x % along * kSide, h0 = bid().x / along % across * kSide, b = bid().x / along / across;
    const int tokens = int(p.N - t0 < kSide ? p.N - t0 : kSide), heads = int(p.Hs - h0 < kSide ? p.Hs - h0 : kSide);
    Smem smem;
    const auto tile = smem.alloc<T>(kSide * (kSide + 1));
    const bool heads_first = p.dt.stride[1] == 1;
    for (int at = tid(); at < kSide * kSide; at += nthreads()) {
      const int h = heads_first ? at % kSide : at / kSide, t = heads_first ? at / kSide : at % kSide;
      if (h < heads && t < tokens) tile.st(h * (kSide + 1) + t, Length<T>(p, b, h0 + h, t0 + t).value);
    }
    sync_cta();
    for (int at = tid(); at < kSide * kSide; at += nthreads()) {
      const int h = at / kSide, t = at % kSide;
      if (h >= heads || t >= tokens) continue;
      const T length = tile.ld(h * (kSide + 1) + t);
      const int64_t to = (b * p.Hs + h0 + h) * p.N + t0 + t;
      gptr<T>{a.lengths}.st(to, length);
      gptr<T>{a.log_decays}.st(to, T(rate_at(p, b, h0 + h) * double(length)));
    }
  }
};

// ---- skip and gate ------------------------------------------------------------------------------

// Skip of head h for one column.
template <class T>
SIMT_DEV T skip_at(const Problem& p, int64_t h, int64_t column) {
  return number<T>(p.skip_type, p.skip.data, h * p.skip.stride[1] + column * p.skip.stride[3]);
}
SIMT_DEV double silu(double x) { return x / (1 + exp_of(-x)); }
SIMT_DEV float silu(float x) { return x * rcp(1 + ex2(float(-kLog2e) * x)); }

}  // namespace lc::cuda
