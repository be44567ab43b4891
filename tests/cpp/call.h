// call.h - what the C++ tests share: tensors that own guarded memory, a whole call to run or to spoil, and the
// definition.
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
using Position = std::array<int64_t, 8>;  // one number for each axis, then zeros

constexpr lc_dtype kF64 = {LC_FLOAT, 64, 1}, kF32 = {LC_FLOAT, 32, 1}, kF16 = {LC_FLOAT, 16, 1},
                   kBf16 = {LC_BFLOAT, 16, 1};
constexpr lc_dtype kI32 = {LC_INT, 32, 1}, kI64 = {LC_INT, 64, 1};
constexpr double kInf = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();

inline bool operator==(lc_dtype a, lc_dtype b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }
inline bool operator!=(lc_dtype a, lc_dtype b) { return !(a == b); }
inline const char* name(lc_dtype t) {
  return t == kF64 ? "f64" : t == kF32 ? "f32" : t == kF16 ? "f16" : t == kBf16 ? "bf16" : t == kI32 ? "i32" : "i64";
}

// ---- one element, as a double ---------------------------------------------------------------------------------------

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

// 16-bit formats: finite values in range only, rounded to nearest even.
inline void store(void* p, lc_dtype t, double x) {
  if (t == kF64) return store_as<double>(p, x);
  if (t == kF32) return store_as<float>(p, x);
  if (t == kI32) return store_as<int32_t>(p, x);
  if (t == kI64) return store_as<int64_t>(p, x);
  const bool f16 = t == kF16;
  const int mantissa_bits = f16 ? 10 : 7, bias = f16 ? 15 : 127;
  int exponent = 1 - bias;
  if (x != 0) exponent = std::max(exponent, std::ilogb(x));
  // Counted in units of the last place, consecutive values of one exponent are consecutive bit patterns, across
  // exponents too.
  const double units = std::nearbyint(std::ldexp(std::fabs(x), mantissa_bits - exponent));
  const int bits = ((exponent + bias - 1) << mantissa_bits) + static_cast<int>(units);
  const uint16_t u = static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0));
  std::memcpy(p, &u, sizeof u);
}

// ---- tensors --------------------------------------------------------------------------------------------------------

inline void* at(const lc_tensor& t, const Position& position) {
  int64_t offset = 0;
  for (int i = 0; i < t.ndim; ++i)
    offset = t.strides ? offset + position[i] * t.strides[i] : offset * t.shape[i] + position[i];
  return static_cast<char*>(t.data) + t.byte_offset + offset * (t.dtype.bits / 8);
}

// f(position) for every element, in row-major order of the shape.
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

// An lc_tensor with memory of its own and guard bytes around it. Tests change the members of lc_tensor directly.
struct Tensor : lc_tensor {
  static constexpr size_t kGuard = 64;
  static constexpr unsigned char kUntouched = 0xA5;
  Bytes memory;
  int64_t sizes[8] = {}, steps[8] = {};

  Tensor() : lc_tensor{} {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  // Dense, or with the outer dimensions in another order in memory (order[0] slowest) and `gap` elements behind every
  // row.
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
    for (int i = rank - 2; i >= 0; --i) steps[order[i]] = count, count *= sizes[order[i]];
    memory.assign(2 * kGuard + count * (type.bits / 8), kUntouched);
    data = memory.data() + kGuard;
    byte_offset = 0;
  }

  template <class F>
  void fill(F&& f) {
    for_each_element(*this, [&](const Position& i) { store(at(*this, i), dtype, f()); });
  }
};

// ---- the definition ------------------------------------------------------------------------------------------------

struct Answer {
  std::vector<double> o, state;            // row-major in the shapes of o and final_state
  std::vector<double> o_size, state_size;  // the same sums over absolute values: what rounding errors are relative to
};

// S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t, token by token in double, for any valid lc_args.
// Reads the states that a call may overwrite, so it comes first.
inline Answer reference(const lc_args& a) {
  const bool bnhd = a.flags & LC_LAYOUT_BNHD;
  const int head_axis = bnhd ? 2 : 1, token_axis = bnhd ? 1 : 2;
  const auto read = [](const lc_tensor& t, const Position& i) { return load(at(t, i), t.dtype); };
  const auto token = [&](const lc_tensor& t, int64_t b, int64_t h, int64_t n) {
    std::vector<double> x(t.shape[3]);
    for (int64_t d = 0; d < t.shape[3]; ++d) x[d] = read(t, bnhd ? Position{b, n, h, d} : Position{b, h, n, d});
    return x;
  };
  const int64_t B = a.q->shape[0], N = a.q->shape[token_axis], K = a.q->shape[3], V = a.v->shape[3];
  const int64_t Hq = a.q->shape[head_axis], Hk = a.k->shape[head_axis], Hv = a.v->shape[head_axis];
  const int64_t Hs = std::max(Hk, Hv), H = std::max(Hq, Hs);
  const auto decay = [&](int64_t b, int64_t h, int64_t n) {
    if (!a.log_decay) return 1.0;
    switch (a.log_decay->ndim) {
      case 0:
        return std::exp(read(*a.log_decay, {}));
      case 1:
        return std::exp(read(*a.log_decay, {h}));
      case 2:
        return std::exp(read(*a.log_decay, {b, h}));
      default:
        return std::exp(read(*a.log_decay, bnhd ? Position{b, n, h} : Position{b, h, n}));
    }
  };

  const bool decode = a.op == LC_DECODE;
  const int64_t sequences = a.cu_seqlens ? a.cu_seqlens->shape[0] - 1 : B;
  const int64_t states = decode ? a.final_state->shape[0] : sequences;
  Answer answer;
  answer.o.assign(B * H * N * V, 0);
  answer.o_size = answer.o;
  answer.state.assign(states * Hs * K * V, 0);
  const lc_tensor* start = decode ? a.final_state : a.initial_state;
  if (start) answer.state = values(*start);
  answer.state_size = answer.state;
  for (double& x : answer.state_size) x = std::fabs(x);

  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t row = a.cu_seqlens ? 0 : s;
    const int64_t first = a.cu_seqlens ? static_cast<int64_t>(read(*a.cu_seqlens, {s})) : 0;
    const int64_t end = a.cu_seqlens ? static_cast<int64_t>(read(*a.cu_seqlens, {s + 1})) : N;
    const int64_t slot = a.state_indices ? static_cast<int64_t>(read(*a.state_indices, {s})) : s;
    if (slot < 0 || slot >= states) continue;
    for (int64_t hs = 0; hs < Hs; ++hs) {
      double* S = answer.state.data() + (slot * Hs + hs) * K * V;
      double* S_size = answer.state_size.data() + (slot * Hs + hs) * K * V;
      for (int64_t n = first; n < end; ++n) {
        const double w = decay(row, hs, n);
        const std::vector<double> k = token(*a.k, row, hs * Hk / Hs, n), v = token(*a.v, row, hs * Hv / Hs, n);
        for (int64_t i = 0; i < K; ++i) {
          for (int64_t j = 0; j < V; ++j) {
            S[i * V + j] = w * S[i * V + j] + k[i] * v[j];
            S_size[i * V + j] = w * S_size[i * V + j] + std::fabs(k[i] * v[j]);
          }
        }
        for (int64_t h = hs * (H / Hs); h < (hs + 1) * (H / Hs); ++h) {
          const std::vector<double> q = token(*a.q, row, h * Hq / H, n);
          const int64_t at_o = (bnhd ? (row * N + n) * H + h : (row * H + h) * N + n) * V;
          for (int64_t i = 0; i < K; ++i) {
            for (int64_t j = 0; j < V; ++j) {
              answer.o[at_o + j] += a.scale * q[i] * S[i * V + j];
              answer.o_size[at_o + j] += std::fabs(a.scale * q[i]) * S_size[i * V + j];
            }
          }
        }
      }
    }
  }
  return answer;
}

// ||x - want|| / ||size||; infinite when x is not finite.
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

// The accuracy the project promises for inputs, or a state, of this dtype.
inline double output_tolerance(lc_dtype t) { return t == kF64 ? 1e-12 : t == kF32 ? 5e-6 : t == kF16 ? 1e-3 : 4e-3; }
inline double state_tolerance(lc_dtype t) { return t == kF64 ? 1e-12 : t == kF32 ? 5e-6 : t == kF16 ? 5e-4 : 3e-3; }

// ---- a call ---------------------------------------------------------------------------------------------------------

enum class Decay { none, scalar, head, batch, token };  // rank of log_decay: absent, 0, 1, 2, 3
constexpr double kMixed = -1;                           // gamma: another one for every element of log_decay

struct Spec {
  lc_op op = LC_FORWARD;
  lc_device device = {LC_CPU, 0};  // of every tensor but a scalar
  int64_t B = 2, Hq = 2, Hk = 2, Hv = 2, N = 5, K = 3, V = 4;
  lc_dtype dtype = kF32;
  Decay decay = Decay::head;
  double gamma = kMixed;
  double scale = 0.5;
  bool bnhd = false;
  bool strided = false;  // axes in another order in memory, gaps between the rows, an offset of one element
  bool initial = false, final = false;
  bool in_place = false;  // final_state is initial_state
  Index cu;               // packed: cu_seqlens
  lc_dtype cu_dtype = kI32;
  int64_t slots = 0;          // LC_DECODE: of the pool; 0: B
  Index indices;              // LC_DECODE: state_indices
  lc_dtype pool = {0, 0, 0};  // LC_DECODE: dtype of the pool; default: that of states
};

inline std::ostream& operator<<(std::ostream& out, const Spec& s) {
  out << (s.op == LC_DECODE ? "decode" : "forward") << " " << name(s.dtype) << " B=" << s.B << " H=" << s.Hq << "/"
      << s.Hk << "/" << s.Hv << " N=" << s.N << " K=" << s.K << " V=" << s.V << " decay rank " << int(s.decay) - 1
      << " gamma=" << s.gamma << (s.bnhd ? " bnhd" : "") << (s.strided ? " strided" : "")
      << (s.initial ? " initial" : "") << (s.final ? " final" : "") << (s.in_place ? " in place" : "");
  if (!s.cu.empty()) out << " packed in " << s.cu.size() - 1;
  return out;
}

// The valid call that a Spec describes, with random contents: unit variance, or, `even`, of magnitudes near 1.
struct Call {
  Spec spec;
  lc_args args = {};
  Tensor q, k, v, log_decay, initial_state, state_indices, cu_seqlens, o, final_state;
  Bytes scratch;

  explicit Call(const Spec& s, unsigned seed = 1, bool even = false) : spec(s) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform(0.5, 1.5);
    const auto number = [&] { return !even ? normal(random) : random() % 2 ? uniform(random) : -uniform(random); };
    const int64_t Hs = std::max(s.Hk, s.Hv), H = std::max(s.Hq, Hs);
    const lc_dtype wide = s.dtype == kF64 ? kF64 : kF32;
    const auto token_tensor = [&](Tensor& t, lc_dtype type, Index size) {  // size in the order b, h, n, d
      if (s.bnhd) std::swap(size[1], size[2]);
      if (s.strided && size.size() == 4)
        t.make(type, size, {2, 0, 1}, 3), shift(t);
      else
        t.make(type, size);
    };
    const auto state_tensor = [&](Tensor& t, lc_dtype type, int64_t states) {
      if (s.strided)
        t.make(type, {states, Hs, s.K, s.V}, {1, 0, 2}, 2), shift(t);
      else
        t.make(type, {states, Hs, s.K, s.V});
      t.fill(number);
    };

    token_tensor(q, s.dtype, {s.B, s.Hq, s.N, s.K});
    token_tensor(k, s.dtype, {s.B, s.Hk, s.N, s.K});
    token_tensor(v, s.dtype, {s.B, s.Hv, s.N, s.V});
    token_tensor(o, s.dtype, {s.B, H, s.N, s.V});
    for (Tensor* t : {&q, &k, &v}) t->fill(number);
    switch (s.decay) {
      case Decay::none:
        break;
      case Decay::scalar:
        log_decay.make(wide, {});
        break;
      case Decay::head:
        log_decay.make(wide, {Hs});
        break;
      case Decay::batch:
        log_decay.make(wide, {s.B, Hs});
        break;
      case Decay::token:
        token_tensor(log_decay, wide, {s.B, Hs, s.N});
        break;
    }
    if (s.decay != Decay::none)
      log_decay.fill([&] {
        constexpr double kGammas[] = {0, 1e-4, 0.5, 0.9, 0.99, 1 - 1e-6, 1};
        return std::log(s.gamma == kMixed ? kGammas[random() % 7] : s.gamma);
      });
    if (!s.cu.empty()) {
      cu_seqlens.make(s.cu_dtype, {static_cast<int64_t>(s.cu.size())});
      fill(cu_seqlens, s.cu);
    }
    const int64_t states = s.cu.empty() ? s.B : static_cast<int64_t>(s.cu.size()) - 1;
    if (s.op == LC_DECODE) {
      state_tensor(final_state, s.pool.bits ? s.pool : wide, s.slots ? s.slots : s.B);
      if (!s.indices.empty()) {
        state_indices.make(kI32, {static_cast<int64_t>(s.indices.size())});
        fill(state_indices, s.indices);
      }
    } else {
      if (s.initial || s.in_place) state_tensor(initial_state, wide, states);
      if (s.final) state_tensor(final_state, wide, states);
    }

    for (Tensor* t : tensors())
      if (t->ndim) t->device = s.device;

    args.struct_size = sizeof args;
    args.op = s.op;
    args.scale = s.scale;
    args.flags = s.bnhd ? LC_LAYOUT_BNHD : 0;
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
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  static void fill(Tensor& t, const Index& x) {
    auto next = x.begin();
    t.fill([&] { return static_cast<double>(*next++); });
  }

  std::vector<Tensor*> tensors() {
    return {&q, &k, &v, &log_decay, &initial_state, &state_indices, &cu_seqlens, &o, &final_state};
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

  // Asks for the workspace and makes it: exactly as large as asked for, full of NaN, guarded.
  lc_status make_workspace() {
    args.workspace = nullptr;
    const lc_status status = lc_workspace(&args, &args.workspace_bytes);
    if (status != LC_OK) return status;
    scratch.assign(args.workspace_bytes + 64 + 2 * Tensor::kGuard, Tensor::kUntouched);
    const auto start = reinterpret_cast<uintptr_t>(scratch.data()) + Tensor::kGuard;
    args.workspace = scratch.data() + Tensor::kGuard + (64 - start % 64) % 64;
    std::memset(args.workspace, 0xFF, args.workspace_bytes);
    return LC_OK;
  }
  lc_status run() {
    const lc_status status = make_workspace();
    return status == LC_OK ? lc_run(&args) : status;
  }

  // Whether the bytes around the workspace, and every byte of the tensors but the elements of o and final_state, are
  // those of `before`.
  bool stayed_inside(const std::vector<Bytes>& before) {
    const auto* begin = static_cast<unsigned char*>(args.workspace);
    for (const unsigned char& byte : scratch)
      if ((&byte < begin || &byte >= begin + args.workspace_bytes) && byte != Tensor::kUntouched) return false;
    std::vector<Bytes> now = memory();
    for (const lc_tensor* written : {args.o, args.final_state}) {
      if (!written || std::count(written->shape, written->shape + written->ndim, 0)) continue;
      const auto* first = static_cast<unsigned char*>(at(*written, {}));
      const std::vector<Tensor*> all = tensors();
      size_t i = 0;
      while (i < all.size() &&
             (first < all[i]->memory.data() || first >= all[i]->memory.data() + all[i]->memory.size()))
        ++i;
      for_each_element(*written, [&](const Position& position) {
        const size_t where = static_cast<unsigned char*>(at(*written, position)) - all[i]->memory.data();
        std::copy_n(before[i].begin() + where, written->dtype.bits / 8, now[i].begin() + where);
      });
    }
    return now == before;
  }

 private:
  // The first element one further on, as in a view of a larger array.
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

}  // namespace test
