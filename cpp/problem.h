// problem.h - one validated call as plain data, which every method and every kernel gets by value.
#pragma once
#include <leetcore/leetcore.h>

#include <stdexcept>
#include <string>

// Functions of headers are always inlined. Otherwise the linker could use an out-of-line copy that
// was compiled for one instruction set in code that runs on every machine.
#ifdef __CUDACC__
#define LC_INLINE __host__ __device__ inline __attribute__((always_inline))
#else
#define LC_INLINE inline __attribute__((always_inline))
#endif

namespace lc {

class Interrupt;

enum class Type : uint8_t { f64, f32, f16, bf16 };

// Strided memory over [b, h, n, d]. Strides count elements and may be 0 (broadcast) or negative;
// stride[3] is 1, except in transposed states. A state has the axes [b, h, key, value], log_decay
// and dt have [b, h, n, -], dt_bias has [-, h, -, -], skip has [-, h, -, value].
struct View {
  void* data = nullptr;
  int64_t stride[4] = {};
  LC_INLINE explicit operator bool() const { return data != nullptr; }
  template <class T>
  LC_INLINE T* at(int64_t b, int64_t h, int64_t n) const {
    return static_cast<T*>(data) + b * stride[0] + h * stride[1] + n * stride[2];
  }
};

enum class Decay : uint8_t { none, constant, per_token };

struct Problem {
  lc_op op;
  lc_device device;
  Type type;        // q, k, v, o
  Type state_type;  // initial_state and final_state
  Type decay_type;  // log_decay
  Decay decay;
  bool tf32;
  int32_t cu_bits;            // width of the integers of cu_seqlens, 32 or 64; 0: sequences are not packed
  int64_t B;                  // sequences: the batch, or the packed sequences
  int64_t N;                  // tokens of one batch entry; packed: tokens of all sequences
  int64_t K, V;               // key and value head dims
  int64_t H, Hq, Hk, Hv, Hs;  // heads of o, q, k, v; Hs distinct (k, v) pairs, each with a state and a decay
  int64_t slots;              // LC_DECODE: slots of the pool
  double scale;
  View q, k, v, o;                  // [B, H?, N, K|V]
  View log_decay;                   // [B, Hs, N] of decay_type, broadcast by zero strides
  double uniform_log_decay;         // the decay of every token of all heads, where log_decay is absent
  View initial_state, final_state;  // [B | slots, Hs, K, V] of state_type
  View dt, dt_bias, skip, gate;     // [B, Hs, N], [Hs], [H, V] and [B, H, N, V]
  Type dt_type, dt_bias_type, skip_type;
  bool softplus;          // whether lengths are softplus(dt + dt_bias)
  double dt_min, dt_max;  // the limits of lengths
  // LC_BACKWARD reads d_o and d_final_state and writes the other gradients, where they are present.
  // A gradient has the shape and the type of the tensor in its name. d_log_decay is summed along
  // axes with stride 0.
  View d_o, d_final_state, d_q, d_k, d_v, d_log_decay, d_initial_state, d_dt;
  const void* cu_seqlens;     // [B + 1]
  int32_t index_bits;         // width of the integers of state_indices, 32 or 64; 0: sequence b uses slot b
  const void* state_indices;  // [B], stride 1
  void* workspace;
  size_t workspace_bytes;
  void* stream;
  int threads;           // the most that a CPU method may use
  Interrupt* interrupt;  // ends the call early; nullptr: absent
};

// Entries of the batch: 1 for packed sequences.
LC_INLINE int64_t batch(const Problem& p) { return p.cu_bits ? 1 : p.B; }

// Tokens of all sequences.
LC_INLINE int64_t tokens(const Problem& p) { return batch(p) * p.N; }

// Whether the key dimension of a state is contiguous, and the value dimension is not.
LC_INLINE bool is_transposed(const Problem& p, const View& state) {
  return p.V > 1 && state.stride[2] == 1 && state.stride[3] != 1;
}

// Query heads that read one state; they read the same head of k and of v.
LC_INLINE int64_t group(const Problem& p) { return p.H / p.Hs; }
LC_INLINE int64_t q_head(const Problem& p, int64_t h) { return h * p.Hq / p.H; }
LC_INLINE int64_t k_head(const Problem& p, int64_t hs) { return hs * p.Hk / p.Hs; }
LC_INLINE int64_t v_head(const Problem& p, int64_t hs) { return hs * p.Hv / p.Hs; }

// The place of sequence b in q, k, v, o and log_decay: its batch entry, its first token, its number
// of tokens. P is Problem, or another struct with its fields of sequences and slots.
struct Sequence {
  int64_t row, begin, length;
};
template <class P>
LC_INLINE int64_t cu_seqlen(const P& p, int64_t i) {
  return p.cu_bits == 64 ? static_cast<const int64_t*>(p.cu_seqlens)[i] : static_cast<const int32_t*>(p.cu_seqlens)[i];
}
template <class P>
LC_INLINE Sequence sequence(const P& p, int64_t b) {
  if (!p.cu_bits) return {b, 0, p.N};
  const int64_t begin = cu_seqlen(p, b);
  return {0, begin, cu_seqlen(p, b + 1) - begin};
}

// The slot of sequence b in the pool; -1 skips the sequence.
template <class P>
LC_INLINE int64_t slot(const P& p, int64_t b) {
  if (!p.index_bits) return b;
  return p.index_bits == 64 ? static_cast<const int64_t*>(p.state_indices)[b]
                            : static_cast<const int32_t*>(p.state_indices)[b];
}

// log2 of one token's decay, clamped: sums of such values stay finite, and 2^floor is exactly 0 in
// the type of sums.
inline constexpr double kLog2e = 1.4426950408889634;
LC_INLINE double clamped_log2(const Problem& p, double x) {
  const double floor = p.type == Type::f64 ? -1100 : -160;
  return x > floor ? x : floor;
}
LC_INLINE double log2_decay(const Problem& p, double g) { return clamped_log2(p, g * kLog2e); }
LC_INLINE double log_decay(const Problem& p, int64_t row, int64_t hs, int64_t n) {
  if (!p.log_decay) return p.uniform_log_decay;
  return p.decay_type == Type::f64 ? *p.log_decay.at<double>(row, hs, n) : *p.log_decay.at<float>(row, hs, n);
}
LC_INLINE double log2_decay(const Problem& p, int64_t row, int64_t hs, int64_t n) {
  return log2_decay(p, log_decay(p, row, hs, n));
}

// The least log-decay per unit of length: it is finite, so that a token of length 0 does not decay
// the state.
inline constexpr double kLeastRate = -1e300;

struct Error : std::runtime_error {
  lc_status status;
  Error(lc_status s, const std::string& text) : std::runtime_error(text), status(s) {}
};
[[noreturn]] void fail(lc_status status, const char* format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

// Validation, in check.cpp alone. Both throw Error. check_structure reads no values of tensors, and
// o may be absent. check also requires the outputs, and checks the values that the host can read.
Problem check_structure(const lc_args& args);
Problem check(const lc_args& args);

}  // namespace lc
