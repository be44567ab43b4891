// call.h - the parts that C++ tests share: tensors that own guarded memory, whole calls to run or
// to spoil, and the definition of the operator. One file: a call consists of all these parts.
#pragma once
#include <leetcore/leetcore.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <ostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace test {

using Bytes = std::vector<unsigned char>;
using Index = std::vector<int64_t>;
using Position = std::array<int64_t, 8>;  // one number per axis, then zeros

constexpr lc_dtype kF64 = {LC_FLOAT, 64, 1}, kF32 = {LC_FLOAT, 32, 1}, kF16 = {LC_FLOAT, 16, 1},
                   kBf16 = {LC_BFLOAT, 16, 1};
constexpr lc_dtype kI32 = {LC_INT, 32, 1}, kI64 = {LC_INT, 64, 1};
constexpr double kInf = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();

inline bool operator==(lc_dtype a, lc_dtype b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }
inline bool operator!=(lc_dtype a, lc_dtype b) { return !(a == b); }
inline const char* name(lc_dtype t) {
  return t == kF64 ? "f64" : t == kF32 ? "f32" : t == kF16 ? "f16" : t == kBf16 ? "bf16" : t == kI32 ? "i32" : "i64";
}

// ---- one element, as a double -------------------------------------------------------------------

template <class T>
T load_as(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
void store_as(void* p, double x) {
  const T y = static_cast<T>(x);
  std::memcpy(p, &y, sizeof y);
}

inline double load(const void* p, lc_dtype t) {
  if (t == kF64) return load_as<double>(p);
  if (t == kF32) return load_as<float>(p);
  if (t == kI32) return load_as<int32_t>(p);
  if (t == kI64) return static_cast<double>(load_as<int64_t>(p));
  const uint16_t u = load_as<uint16_t>(p);
  const bool f16 = t == kF16;
  const int mantissa_bits = f16 ? 10 : 7, exponent_bits = 15 - mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (u & 0x7fff) >> mantissa_bits, mantissa = u & ((1 << mantissa_bits) - 1);
  const double sign = u & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? kNan : sign * kInf;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

// Numbers are rounded to nearest even. For 16-bit formats x must be finite and in range.
inline void store(void* p, lc_dtype t, double x) {
  if (t == kF64) return store_as<double>(p, x);
  if (t == kF32) return store_as<float>(p, x);
  if (t == kI32) return store_as<int32_t>(p, x);
  if (t == kI64) return store_as<int64_t>(p, x);
  const bool f16 = t == kF16;
  const int mantissa_bits = f16 ? 10 : 7, bias = f16 ? 15 : 127;
  int exponent = 1 - bias;
  if (x != 0) exponent = std::max(exponent, std::ilogb(x));
  // Consecutive values of one exponent have consecutive bit patterns, and the pattern goes on
  // across exponents. So bits count units of the last place.
  const double units = std::nearbyint(std::ldexp(std::fabs(x), mantissa_bits - exponent));
  const int bits = ((exponent + bias - 1) << mantissa_bits) + static_cast<int>(units);
  const uint16_t u = static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0));
  std::memcpy(p, &u, sizeof u);
}

// ---- tensors ------------------------------------------------------------------------------------

inline void* at(const lc_tensor& t, const Position& position) {
  int64_t offset = 0;
  for (int i = 0; i < t.ndim; ++i)
    offset = t.strides ? offset + position[i] * t.strides[i] : offset * t.shape[i] + position[i];
  return static_cast<char*>(t.data) + t.byte_offset + offset * (t.dtype.bits / 8);
}

// Calls f(position) for every element, in row-major order of the shape.
template <class F>
void for_each_element(const lc_tensor& t, F&& f) {
  Position position = {};
  for (int i = 0; i < t.ndim; ++i)
    if (t.shape[i] <= 0) return;
  for (;;) {
    f(static_cast<const Position&>(position));
    int i = t.ndim - 1;
    while (i >= 0 && ++position[i] == t.shape[i]) position[i--] = 0;
    if (i < 0) return;
  }
}

inline std::vector<double> values(const lc_tensor& t) {
  std::vector<double> x;
  for_each_element(t, [&](const Position& i) { x.push_back(load(at(t, i), t.dtype)); });
  return x;
}

// An lc_tensor that owns its memory, with guard bytes around it. Tests may change the members of
// lc_tensor directly.
struct Tensor : lc_tensor {
  static constexpr size_t kGuard = 64;
  static constexpr unsigned char kUntouched = 0xA5;
  Bytes memory;
  int64_t sizes[8] = {}, steps[8] = {};

  Tensor() : lc_tensor{} {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  // Makes a dense tensor, or one with the outer dimensions in another order in memory (order[0] is
  // the slowest) and `gap` elements after every row.
  void make(lc_dtype type, const Index& size, Index order = {}, int64_t gap = 0) {
    const int rank = static_cast<int>(size.size());
    device = {LC_CPU, 0};
    dtype = type;
    ndim = rank;
    shape = sizes;
    strides = steps;
    std::fill_n(sizes, 8, 1);
    std::fill_n(steps, 8, 1);
    std::copy(size.begin(), size.end(), sizes);
    int64_t count = rank ? sizes[rank - 1] + gap : 1;
    if (order.empty())
      for (int i = 0; i + 1 < rank; ++i) order.push_back(i);
    for (int i = rank - 2; i >= 0; --i) {
      steps[order[i]] = count;
      count *= sizes[order[i]];
    }
    memory.assign(2 * kGuard + count * (type.bits / 8), kUntouched);
    data = memory.data() + kGuard;
    byte_offset = 0;
  }

  template <class F>
  void fill(F&& f) {
    for_each_element(*this, [&](const Position& i) { store(at(*this, i), dtype, f()); });
  }

  // Sets every element to NaN, if there is a tensor.
  void poison() {
    if (memory.empty()) return;
    for_each_element(*this, [&](const Position& i) { std::memset(at(*this, i), 0xFF, dtype.bits / 8); });
  }
};

// ---- the definition -----------------------------------------------------------------------------

// The inputs of a call as the definition reads them, for every layout, sharing of heads and form of
// decay.
struct Inputs {
  const lc_args& a;
  const bool absolute = false;  // whether to take absolute values of q, k, v, states and gradients
  const bool bnhd = a.flags & LC_LAYOUT_BNHD;
  const int head_axis = bnhd ? 2 : 1, token_axis = bnhd ? 1 : 2;
  const int64_t B = a.q->shape[0], N = a.q->shape[token_axis], K = a.q->shape[3], V = a.v->shape[3];
  const int64_t Hq = a.q->shape[head_axis], Hk = a.k->shape[head_axis], Hv = a.v->shape[head_axis];
  const int64_t Hs = std::max(Hk, Hv), H = std::max(Hq, Hs);
  const int64_t sequences = a.cu_seqlens ? a.cu_seqlens->shape[0] - 1 : B;

  static double read(const lc_tensor& t, const Position& i) { return load(at(t, i), t.dtype); }
  std::vector<double> token(const lc_tensor& t, int64_t b, int64_t h, int64_t n) const {
    std::vector<double> x(t.shape[3]);
    for (int64_t d = 0; d < t.shape[3]; ++d) x[d] = read(t, bnhd ? Position{b, n, h, d} : Position{b, h, n, d});
    return absolute ? magnitudes(x) : x;
  }
  std::vector<double> state(const lc_tensor* t) const {
    if (!t) return std::vector<double>(sequences * Hs * K * V);
    return absolute ? magnitudes(values(*t)) : values(*t);
  }
  static std::vector<double> magnitudes(std::vector<double> x) {
    for (double& y : x) y = std::fabs(y);
    return x;
  }
  // The offset of a token in a row-major copy of a tensor with this number of heads and columns.
  int64_t place(int64_t heads, int64_t columns, int64_t b, int64_t h, int64_t n) const {
    return (bnhd ? (b * N + n) * heads + h : (b * heads + h) * N + n) * columns;
  }
  // The offset of a token's decay in a row-major copy of log_decay, in the form that the call has.
  int64_t decay_place(int64_t b, int64_t h, int64_t n) const {
    const int rank = a.log_decay->ndim;
    return rank == 0 ? 0 : rank == 1 ? h : rank == 2 ? b * Hs + h : place(Hs, 1, b, h, n);
  }
  Position of_token(int64_t b, int64_t h, int64_t n) const { return bnhd ? Position{b, n, h} : Position{b, h, n}; }
  double log_decay(int64_t b, int64_t h, int64_t n) const {
    const Position forms[] = {{}, {h}, {b, h}, of_token(b, h, n)};
    return a.log_decay ? read(*a.log_decay, forms[a.log_decay->ndim]) : 0;
  }
  double decay(int64_t b, int64_t h, int64_t n) const {
    const double d = length(b, h, n), g = log_decay(b, h, n);
    return d == 0 || g == 0 ? 1 : std::exp(d * g);
  }
  // dt + dt_bias of a token, its length, and the derivative of the length by dt.
  double dt(int64_t b, int64_t h, int64_t n) const {
    return read(*a.dt, of_token(b, h, n)) + (a.dt_bias ? read(*a.dt_bias, {h}) : 0);
  }
  double unlimited(int64_t b, int64_t h, int64_t n) const {
    const double u = dt(b, h, n);
    return !(a.flags & LC_DT_SOFTPLUS) ? u : std::max(u, 0.) + std::log1p(std::exp(-std::fabs(u)));
  }
  double most() const { return a.dt_max == 0 ? kInf : a.dt_max; }
  double length(int64_t b, int64_t h, int64_t n) const {
    return a.dt ? std::min(std::max(unlimited(b, h, n), a.dt_min), most()) : 1;
  }
  double slope(int64_t b, int64_t h, int64_t n) const {
    const double x = unlimited(b, h, n);
    if (x < a.dt_min || x > most()) return 0;
    return a.flags & LC_DT_SOFTPLUS ? 1 / (1 + std::exp(-dt(b, h, n))) : 1;
  }
  double skip(int64_t h, int64_t column) const {
    return a.skip ? read(*a.skip, a.skip->ndim == 1 ? Position{h} : Position{h, column}) : 0;
  }
  double gate(int64_t b, int64_t h, int64_t n, int64_t column) const {
    if (!a.gate) return 1;
    const double z = read(*a.gate, bnhd ? Position{b, n, h, column} : Position{b, h, n, column});
    return z / (1 + std::exp(-z));
  }
  int64_t row(int64_t s) const { return a.cu_seqlens ? 0 : s; }
  int64_t bound(int64_t s, bool end) const {
    return a.cu_seqlens ? static_cast<int64_t>(read(*a.cu_seqlens, {s + end})) : end ? N : 0;
  }
};

struct Answer {
  std::vector<double> o, state;            // row-major in the shapes of o and final_state
  std::vector<double> o_size, state_size;  // the same sums over absolute values: the scale of errors
};

// S_t = exp(d_t g_t) S_{t-1} + d_t k_t v_t^T,   o_t = (scale q_t^T S_t + skip v_t) silu(gate_t)
//
// It is computed token by token in double, for any valid lc_args. d_t is 1 without dt. It must run
// before the call, which may overwrite the states that it reads.
inline Answer reference(const lc_args& a) {
  const Inputs in{a};
  const int64_t N = in.N, K = in.K, V = in.V, Hs = in.Hs, H = in.H;
  const bool decode = a.op == LC_DECODE;
  const int64_t states = decode ? a.final_state->shape[0] : in.sequences;
  Answer answer;
  answer.o.assign(in.B * H * N * V, 0);
  answer.o_size = answer.o;
  answer.state.assign(states * Hs * K * V, 0);
  const lc_tensor* start = decode ? a.final_state : a.initial_state;
  if (start) answer.state = values(*start);
  answer.state_size = answer.state;
  for (double& x : answer.state_size) x = std::fabs(x);

  for (int64_t s = 0; s < in.sequences; ++s) {
    const int64_t row = in.row(s), first = in.bound(s, false), end = in.bound(s, true);
    const int64_t slot = a.state_indices ? static_cast<int64_t>(Inputs::read(*a.state_indices, {s})) : s;
    if (slot < 0 || slot >= states) continue;
    for (int64_t hs = 0; hs < Hs; ++hs) {
      double* S = answer.state.data() + (slot * Hs + hs) * K * V;
      double* S_size = answer.state_size.data() + (slot * Hs + hs) * K * V;
      for (int64_t n = first; n < end; ++n) {
        const double w = in.decay(row, hs, n);
        const std::vector<double> k = in.token(*a.k, row, hs * in.Hk / Hs, n);
        const std::vector<double> v = in.token(*a.v, row, hs * in.Hv / Hs, n);
        const double d = in.length(row, hs, n);
        for (int64_t i = 0; i < K; ++i) {
          for (int64_t j = 0; j < V; ++j) {
            S[i * V + j] = w * S[i * V + j] + d * k[i] * v[j];
            S_size[i * V + j] = w * S_size[i * V + j] + std::fabs(d * k[i] * v[j]);
          }
        }
        for (int64_t h = hs * (H / Hs); h < (hs + 1) * (H / Hs); ++h) {
          const std::vector<double> q = in.token(*a.q, row, h * in.Hq / H, n);
          const int64_t at_o = in.place(H, V, row, h, n);
          for (int64_t i = 0; i < K; ++i) {
            for (int64_t j = 0; j < V; ++j) {
              answer.o[at_o + j] += a.scale * q[i] * S[i * V + j];
              answer.o_size[at_o + j] += std::fabs(a.scale * q[i]) * S_size[i * V + j];
            }
          }
          for (int64_t j = 0; j < V; ++j) {
            const double skipped = in.skip(h, j) * v[j], gate = in.gate(row, h, n, j);
            answer.o[at_o + j] = (answer.o[at_o + j] + skipped) * gate;
            answer.o_size[at_o + j] = (answer.o_size[at_o + j] + std::fabs(skipped)) * std::fabs(gate);
          }
        }
      }
    }
  }
  return answer;
}

struct Gradients {
  // Row-major, in the shapes of the inputs.
  std::vector<double> d_q, d_k, d_v, d_log_decay, d_initial_state, d_dt;
  // The gradient that a call writes to tensor t.
  const std::vector<double>& of(const lc_args& a, const lc_tensor* t) const {
    if (t == a.d_dt) return d_dt;
    return t == a.d_q ? d_q : t == a.d_k ? d_k : t == a.d_v ? d_v : t == a.d_log_decay ? d_log_decay : d_initial_state;
  }
  // For each value of d_log_decay: the root of the sum of squares of the terms of all tokens.
  std::vector<double> d_log_decay_size;
};

// The derivative of `reference`, token by token backward in time, with all states kept. With dS the
// gradient of S_t,
//   dq_t = scale S_t dO_t,  dk_t = d_t dS v_t,  dv_t = d_t dS^T k_t
//   dg_t = exp(d_t g_t) <dS, S_{t-1}>, of which d_t goes to g and g to d_t;  d_t also gets k_t^T dS v_t
// With `absolute`: the same sums over absolute values, to which rounding errors are relative.
inline Gradients reference_gradients(const lc_args& a, bool absolute = false) {
  const Inputs in{a, absolute};
  const double scale = absolute ? std::fabs(a.scale) : a.scale;
  const int64_t N = in.N, K = in.K, V = in.V, Hs = in.Hs, H = in.H, KV = K * V;
  Gradients d;
  d.d_q.assign(in.B * in.Hq * N * K, 0);
  d.d_k.assign(in.B * in.Hk * N * K, 0);
  d.d_v.assign(in.B * in.Hv * N * V, 0);
  d.d_initial_state = in.state(a.d_final_state);
  if (a.log_decay) d.d_log_decay.assign(values(*a.log_decay).size(), 0);
  d.d_log_decay_size = d.d_log_decay;
  if (a.dt) d.d_dt.assign(in.B * Hs * N, 0);
  const std::vector<double> initial = in.state(a.initial_state);
  for (int64_t s = 0; s < in.sequences; ++s) {
    const int64_t row = in.row(s), first = in.bound(s, false), count = in.bound(s, true) - first;
    for (int64_t hs = 0; hs < Hs; ++hs) {
      const int64_t hk = hs * in.Hk / Hs, hv = hs * in.Hv / Hs, at_state = (s * Hs + hs) * KV;
      std::vector<double> states((count + 1) * KV);  // before each token, and at the end
      std::copy_n(initial.begin() + at_state, KV, states.begin());
      for (int64_t t = 0; t < count; ++t) {
        const std::vector<double> k = in.token(*a.k, row, hk, first + t), v = in.token(*a.v, row, hv, first + t);
        const double w = in.decay(row, hs, first + t), length = in.length(row, hs, first + t);
        for (int64_t i = 0; i < KV; ++i)
          states[(t + 1) * KV + i] = w * states[t * KV + i] + length * k[i / V] * v[i % V];
      }
      double* dS = d.d_initial_state.data() + at_state;
      for (int64_t t = count - 1; t >= 0; --t) {
        const int64_t n = first + t;
        const double *before = &states[t * KV], *S = before + KV;
        for (int64_t h = hs * (H / Hs); a.d_o && h < (hs + 1) * (H / Hs); ++h) {
          const int64_t hq = h * in.Hq / H;
          const std::vector<double> q = in.token(*a.q, row, hq, n), d_o = in.token(*a.d_o, row, h, n);
          double* d_q = &d.d_q[in.place(in.Hq, K, row, hq, n)];
          for (int64_t i = 0; i < KV; ++i) {
            d_q[i / V] += scale * S[i] * d_o[i % V];
            dS[i] += scale * q[i / V] * d_o[i % V];
          }
        }
        const std::vector<double> k = in.token(*a.k, row, hk, n), v = in.token(*a.v, row, hv, n);
        double *d_k = &d.d_k[in.place(in.Hk, K, row, hk, n)], *d_v = &d.d_v[in.place(in.Hv, V, row, hv, n)];
        const double w = in.decay(row, hs, n), length = in.length(row, hs, n);
        double d_decay = 0, d_length = 0;
        for (int64_t i = 0; i < KV; ++i) {
          d_k[i / V] += length * dS[i] * v[i % V];
          d_v[i % V] += length * dS[i] * k[i / V];
          d_length += k[i / V] * dS[i] * v[i % V];
          d_decay += w * dS[i] * before[i];
          dS[i] *= w;
        }
        if (a.dt) {
          const double g = in.log_decay(row, hs, n);
          if (std::isfinite(g)) d_length += (absolute ? std::fabs(g) : g) * d_decay;
          d.d_dt[in.place(Hs, 1, row, hs, n)] = d_length * in.slope(row, hs, n);
        }
        d_decay *= length;
        if (!a.log_decay) continue;
        d.d_log_decay[in.decay_place(row, hs, n)] += d_decay;
        d.d_log_decay_size[in.decay_place(row, hs, n)] += d_decay * d_decay;
      }
    }
  }
  for (double& x : d.d_log_decay_size) x = std::sqrt(x);
  return d;
}

inline double norm(const std::vector<double>& x) {
  double sum = 0;
  for (double y : x) sum += y * y;
  return std::sqrt(sum);
}

// ||x - want|| / ||size||; infinite if x is not finite.
inline double relative_error(const std::vector<double>& x, const std::vector<double>& want,
                             const std::vector<double>& size) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (x[i] - want[i]) * (x[i] - want[i]);
    norm += size[i] * size[i];
  }
  if (!std::isfinite(difference)) return kInf;
  return difference == 0 ? 0 : std::sqrt(difference / norm);
}

// The accuracy that the project promises for inputs, or a state, of this dtype.
inline double output_tolerance(lc_dtype t) { return t == kF64 ? 1e-12 : t == kF32 ? 5e-6 : t == kF16 ? 1e-3 : 4e-3; }
inline double state_tolerance(lc_dtype t) { return t == kF64 ? 1e-12 : t == kF32 ? 5e-6 : t == kF16 ? 5e-4 : 3e-3; }
inline double gradient_tolerance(lc_dtype t) { return t == kF64 ? 1e-11 : t == kF32 ? 2e-5 : t == kF16 ? 1e-3 : 1e-2; }

// ---- a call -------------------------------------------------------------------------------------

enum class Decay { none, scalar, head, batch, token };  // rank of log_decay: absent, 0, 1, 2, 3
constexpr double kMixed = -1;                           // gamma: elements of log_decay differ

struct Spec {
  lc_op op = LC_FORWARD;
  lc_device device = {LC_CPU, 0};  // of every tensor except a scalar
  int64_t B = 2, Hq = 2, Hk = 2, Hv = 2, N = 5, K = 3, V = 4;
  lc_dtype dtype = kF32;
  Decay decay = Decay::head;
  double gamma = kMixed;
  double scale = 0.5;
  double magnitude = 1;  // of k and v
  bool bnhd = false;
  bool strided = false;                 // reordered axes, gaps between rows, an offset of one element
  bool initial = false, final = false;  // LC_BACKWARD: initial_state and d_final_state
  bool in_place = false;                // final_state is initial_state
  Index cu;                             // packed: cu_seqlens
  lc_dtype cu_dtype = kI32;
  int64_t slots = 0;  // LC_DECODE: slots of the pool; 0: B
  Index indices;      // LC_DECODE: state_indices
  lc_dtype index_dtype = kI32;
  lc_dtype pool = {0, 0, 0};  // LC_DECODE: dtype of the pool; bits 0: the dtype of states
  bool d_o = true;            // LC_BACKWARD: whether d_o is given
  unsigned wants = 63;        // LC_BACKWARD: a bit for each of d_q, d_k, d_v, d_log_decay, d_initial_state, d_dt
  bool dt = false;            // lengths of tokens, with dt_bias if softplus
  bool softplus = false;
  double dt_min = 0, dt_max = 0;
  int skip = 0;             // rank of skip, 0: absent
  bool gate = false;        // not LC_BACKWARD
  bool transposed = false;  // states have contiguous keys

  Spec() = default;
  Spec(lc_dtype inputs, int64_t tokens, int64_t key_dim, int64_t value_dim)
      : N(tokens), K(key_dim), V(value_dim), dtype(inputs) {}
  void heads(int64_t of_q, int64_t of_k, int64_t of_v) {
    Hq = of_q;
    Hk = of_k;
    Hv = of_v;
  }
};

// What a call of Mamba-2 has besides plain tensors: a part of it, or everything.
enum class Parts { lengths, limits, outputs, states, all };
inline constexpr Parts kParts[] = {Parts::lengths, Parts::limits, Parts::outputs, Parts::states, Parts::all};

inline Spec mamba2(lc_dtype dtype, int64_t N, int64_t K, int64_t V, Parts parts) {
  Spec spec(dtype, N, K, V);
  spec.heads(1, 1, 3);
  spec.B = 1;
  const bool all = parts == Parts::all;
  spec.dt = parts != Parts::outputs && parts != Parts::states;
  spec.softplus = parts == Parts::limits || all;
  if (parts == Parts::limits) {
    spec.dt_min = 0.05;
    spec.dt_max = 0.5;
    spec.decay = Decay::batch;
  }
  spec.skip = all ? 2 : parts == Parts::outputs ? 1 : 0;
  spec.gate = all || parts == Parts::outputs;
  spec.transposed = all || parts == Parts::states;
  spec.bnhd = parts != Parts::lengths;
  spec.strided = parts == Parts::states;
  spec.initial = spec.final = true;
  return spec;
}

inline std::ostream& operator<<(std::ostream& out, const Spec& s) {
  constexpr const char* ops[] = {"forward", "backward", "decode"};
  out << ops[s.op] << " " << name(s.dtype) << " B=" << s.B << " H=" << s.Hq << "/" << s.Hk << "/" << s.Hv
      << " N=" << s.N << " K=" << s.K << " V=" << s.V << " decay rank " << int(s.decay) - 1 << " gamma=" << s.gamma
      << (s.bnhd ? " bnhd" : "") << (s.strided ? " strided" : "") << (s.initial ? " initial" : "")
      << (s.final ? " final" : "") << (s.in_place ? " in place" : "");
  if (s.dt) out << " dt" << (s.softplus ? " softplus" : "") << " in [" << s.dt_min << ", " << s.dt_max << "]";
  out << (s.skip ? " skip" : "") << (s.gate ? " gate" : "") << (s.transposed ? " transposed" : "");
  if (s.op == LC_BACKWARD) out << (s.d_o ? "" : " no d_o") << " wants " << s.wants;
  if (!s.cu.empty()) out << " packed in " << s.cu.size() - 1;
  return out;
}

// The valid call that a Spec describes. Contents are random, of unit variance or, with `even`, of
// magnitudes near 1.
struct Call {
  Spec spec;
  lc_args args = {};
  Tensor q, k, v, log_decay, initial_state, state_indices, cu_seqlens, o, final_state;
  Tensor d_o, d_final_state, d_q, d_k, d_v, d_log_decay, d_initial_state;
  Tensor dt, dt_bias, skip, gate, d_dt;
  Bytes scratch;

  explicit Call(const Spec& s, unsigned seed = 1, bool even = false) : spec(s) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform(0.5, 1.5);
    const auto number = [&] { return !even ? normal(random) : random() % 2 ? uniform(random) : -uniform(random); };
    const int64_t Hs = std::max(s.Hk, s.Hv), H = std::max(s.Hq, Hs);
    const auto token_tensor = [&](Tensor& t, lc_dtype type, Index size) {  // size in the order b, h, n, d
      if (s.bnhd) std::swap(size[1], size[2]);
      if (s.strided && size.size() == 4) {
        t.make(type, size, {2, 0, 1}, 3);
        shift(t);
      } else {
        t.make(type, size);
      }
    };
    const auto state_tensor = [&](Tensor& t, lc_dtype type, int64_t states) {
      const int64_t rows = s.transposed ? s.V : s.K, columns = s.transposed ? s.K : s.V;
      if (s.strided) {
        t.make(type, {states, Hs, rows, columns}, {1, 0, 2}, 2);
        shift(t);
      } else {
        t.make(type, {states, Hs, rows, columns});
      }
      if (s.transposed) {
        std::swap(t.sizes[2], t.sizes[3]);
        std::swap(t.steps[2], t.steps[3]);
      }
      t.fill(number);
    };

    token_tensor(q, s.dtype, {s.B, s.Hq, s.N, s.K});
    token_tensor(k, s.dtype, {s.B, s.Hk, s.N, s.K});
    token_tensor(v, s.dtype, {s.B, s.Hv, s.N, s.V});
    q.fill(number);
    for (Tensor* t : {&k, &v}) t->fill([&] { return s.magnitude * number(); });
    const auto decay_tensor = [&](Tensor& t) {
      switch (s.decay) {
        case Decay::none:
          break;
        case Decay::scalar:
          t.make(wide(), {});
          break;
        case Decay::head:
          t.make(wide(), {Hs});
          break;
        case Decay::batch:
          t.make(wide(), {s.B, Hs});
          break;
        case Decay::token:
          token_tensor(t, wide(), {s.B, Hs, s.N});
          break;
      }
    };
    decay_tensor(log_decay);
    if (s.decay != Decay::none)
      log_decay.fill([&] {
        constexpr double kGammas[] = {0, 1e-4, 0.5, 0.9, 0.99, 1 - 1e-6, 1};
        return std::log(s.gamma == kMixed ? kGammas[random() % 7] : s.gamma);
      });
    if (s.dt) {
      token_tensor(dt, s.dtype, {s.B, Hs, s.N});
      dt.fill([&] { return s.softplus ? number() : random() % 8 ? std::fabs(number()) : 0; });
      if (s.softplus) {
        dt_bias.make(wide(), {Hs});
        dt_bias.fill([&] { return number() - 2; });
      }
    }
    if (s.skip) {
      skip.make(wide(), s.skip == 1 ? Index{H} : Index{H, s.V});
      skip.fill(number);
    }
    if (s.gate) {
      token_tensor(gate, s.dtype, {s.B, H, s.N, s.V});
      gate.fill(number);
    }
    if (!s.cu.empty()) {
      cu_seqlens.make(s.cu_dtype, {static_cast<int64_t>(s.cu.size())});
      fill(cu_seqlens, s.cu);
    }
    const int64_t states = s.cu.empty() ? s.B : static_cast<int64_t>(s.cu.size()) - 1;
    if (s.op == LC_DECODE) {
      state_tensor(final_state, s.pool.bits ? s.pool : wide(), s.slots ? s.slots : s.B);
      if (!s.indices.empty()) {
        state_indices.make(s.index_dtype, {static_cast<int64_t>(s.indices.size())});
        fill(state_indices, s.indices);
      }
    } else {
      if (s.initial || s.in_place) state_tensor(initial_state, wide(), states);
      if (s.final) state_tensor(s.op == LC_BACKWARD ? d_final_state : final_state, wide(), states);
    }
    if (s.op == LC_BACKWARD) {
      if (s.d_o) {
        token_tensor(d_o, s.dtype, {s.B, H, s.N, s.V});
        d_o.fill(number);
      }
      if (s.wants & 1) token_tensor(d_q, s.dtype, {s.B, s.Hq, s.N, s.K});
      if (s.wants & 2) token_tensor(d_k, s.dtype, {s.B, s.Hk, s.N, s.K});
      if (s.wants & 4) token_tensor(d_v, s.dtype, {s.B, s.Hv, s.N, s.V});
      if (s.wants & 8) decay_tensor(d_log_decay);
      if (s.wants & 16) state_tensor(d_initial_state, wide(), states);
      if (s.wants & 32 && s.dt) token_tensor(d_dt, s.dtype, {s.B, Hs, s.N});
    } else {
      token_tensor(o, s.dtype, {s.B, H, s.N, s.V});
    }

    for (Tensor* t : tensors())
      if (t->ndim || t == &d_log_decay) t->device = s.device;

    args.struct_size = sizeof args;
    args.op = s.op;
    args.scale = s.scale;
    args.flags = (s.bnhd ? LC_LAYOUT_BNHD : 0) | (s.dt && s.softplus ? LC_DT_SOFTPLUS : 0);
    args.dt_min = s.dt_min;
    args.dt_max = s.dt_max;
    const auto given = [](const Tensor& t) { return t.memory.empty() ? nullptr : &t; };
    args.q = given(q);
    args.k = given(k);
    args.v = given(v);
    args.log_decay = given(log_decay);
    args.initial_state = given(initial_state);
    args.state_indices = given(state_indices);
    args.cu_seqlens = given(cu_seqlens);
    args.o = given(o);
    args.final_state = s.in_place ? given(initial_state) : given(final_state);
    args.d_o = given(d_o);
    args.d_final_state = given(d_final_state);
    args.d_q = given(d_q);
    args.d_k = given(d_k);
    args.d_v = given(d_v);
    args.d_log_decay = given(d_log_decay);
    args.d_initial_state = given(d_initial_state);
    args.dt = given(dt);
    args.dt_bias = given(dt_bias);
    args.skip = given(skip);
    args.gate = given(gate);
    args.d_dt = given(d_dt);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  static void fill(Tensor& t, const Index& x) {
    auto next = x.begin();
    t.fill([&] { return static_cast<double>(*next++); });
  }

  std::vector<Tensor*> tensors() {
    return {&q,
            &k,
            &v,
            &log_decay,
            &initial_state,
            &state_indices,
            &cu_seqlens,
            &o,
            &final_state,
            &d_o,
            &d_final_state,
            &d_q,
            &d_k,
            &d_v,
            &d_log_decay,
            &d_initial_state,
            &dt,
            &dt_bias,
            &skip,
            &gate,
            &d_dt};
  }
  std::vector<Tensor*> gradients() { return {&d_q, &d_k, &d_v, &d_log_decay, &d_initial_state, &d_dt}; }
  lc_dtype wide() const { return spec.dtype == kF64 ? kF64 : kF32; }  // the dtype of states and decays
  std::vector<const lc_tensor*> written() const {
    std::vector<const lc_tensor*> all;
    for (const lc_tensor* t :
         {args.o, args.final_state, args.d_q, args.d_k, args.d_v, args.d_log_decay, args.d_initial_state, args.d_dt})
      if (t) all.push_back(t);
    return all;
  }
  std::vector<Bytes> memory() {
    std::vector<Bytes> all;
    for (Tensor* t : tensors()) all.push_back(t->memory);
    return all;
  }

  void restore(const std::vector<Bytes>& before) {
    const std::vector<Tensor*> all = tensors();
    for (size_t i = 0; i < all.size(); ++i) std::copy(before[i].begin(), before[i].end(), all[i]->memory.begin());
  }

  // Makes a workspace of exactly the size that the library asks for, full of NaN and guarded.
  lc_status make_workspace() {
    args.workspace = nullptr;
    const lc_status status = lc_workspace(&args, &args.workspace_bytes);
    if (status != LC_OK) return status;
    const size_t alignment = spec.device.type == LC_CUDA ? 256 : 64;
    scratch.assign(args.workspace_bytes + alignment + 2 * Tensor::kGuard, Tensor::kUntouched);
    const auto start = reinterpret_cast<uintptr_t>(scratch.data()) + Tensor::kGuard;
    args.workspace = scratch.data() + Tensor::kGuard + (alignment - start % alignment) % alignment;
    std::memset(args.workspace, 0xFF, args.workspace_bytes);
    return LC_OK;
  }
  lc_status run() {
    const lc_status status = make_workspace();
    return status == LC_OK ? lc_run(&args) : status;
  }

  // Whether the call wrote only to its outputs and workspace: the bytes around the workspace, and
  // every byte of the tensors except the elements of outputs, must be those of `before`.
  bool stayed_inside(const std::vector<Bytes>& before) {
    const auto* begin = static_cast<unsigned char*>(args.workspace);
    for (const unsigned char& byte : scratch)
      if ((&byte < begin || &byte >= begin + args.workspace_bytes) && byte != Tensor::kUntouched) return false;
    std::vector<Bytes> now = memory();
    for (const lc_tensor* output : written()) {
      if (std::count(output->shape, output->shape + output->ndim, 0)) continue;
      const auto* first = static_cast<unsigned char*>(at(*output, {}));
      const std::vector<Tensor*> all = tensors();
      size_t i = 0;
      while (i < all.size() &&
             (first < all[i]->memory.data() || first >= all[i]->memory.data() + all[i]->memory.size()))
        ++i;
      for_each_element(*output, [&](const Position& position) {
        const size_t where = static_cast<unsigned char*>(at(*output, position)) - all[i]->memory.data();
        std::copy_n(before[i].begin() + where, output->dtype.bits / 8, now[i].begin() + where);
      });
    }
    return now == before;
  }

 private:
  // Moves the tensor by one element, as in a view of a larger array.
  static void shift(Tensor& t) {
    t.byte_offset = t.dtype.bits / 8;
    t.memory.insert(t.memory.end(), t.byte_offset, Tensor::kUntouched);
    t.data = t.memory.data() + Tensor::kGuard;
  }
};

template <class T>
std::string describe(const T& x) {
  std::ostringstream out;
  out << x;
  return out.str();
}

// An output of a call, the values that it must have, and the tolerance of its error relative to
// `size`.
struct Output {
  const char* name;
  Tensor* tensor;
  const std::vector<double>*want, *size;
  double tolerance;
};

// The outputs of a backward call on a GPU, where d_log_decay is also made of 16-bit products. If
// its terms cancel, errors are relative to the terms.
inline std::vector<Output> gradient_outputs(Call& call, const Gradients& d) {
  const double tolerance = gradient_tolerance(call.spec.dtype);
  const bool cancels = norm(d.d_log_decay) < norm(d.d_log_decay_size);
  return {{"d_q", &call.d_q, &d.d_q, &d.d_q, tolerance},
          {"d_k", &call.d_k, &d.d_k, &d.d_k, tolerance},
          {"d_v", &call.d_v, &d.d_v, &d.d_v, tolerance},
          {"d_log_decay", &call.d_log_decay, &d.d_log_decay, cancels ? &d.d_log_decay_size : &d.d_log_decay,
           call.spec.dtype == kF32 ? tolerance : 2 * tolerance},
          {"d_initial_state", &call.d_initial_state, &d.d_initial_state, &d.d_initial_state, tolerance},
          {"d_dt", &call.d_dt, &d.d_dt, &d.d_dt, call.spec.dtype == kF32 ? tolerance : 2 * tolerance}};
}

}  // namespace test
