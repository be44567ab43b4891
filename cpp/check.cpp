// check.cpp - makes a Problem of lc_args. All validation is here, with all sentences that refuse an
// argument. Such a sentence names the argument first, then the rule, then the given value.
//
// One file: all refusals are in one place.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <tuple>
#include <utility>
#include <vector>

#include "checker.h"
#include "cost.h"
#include "problem.h"
#include "thread_count.h"

namespace lc {

void fail(lc_status status, const char* format, ...) {
  char text[1024];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  throw Error(status, text);
}

namespace {

constexpr int64_t kMostHeadDim = 8192, kMostDecodeTokens = 64;

// The tensors of a call, and the Problem that is made of them.
struct Checker : TensorChecker {
  explicit Checker(const lc_args& args) : TensorChecker(args.flags & LC_LAYOUT_BNHD, "q") {}
  Problem p = {};
};

// ---- values that the host can read --------------------------------------------------------------

template <class T>
void check_log_decay_values(const lc_tensor& t) {
  int64_t size[3] = {1, 1, 1}, step[3] = {};
  for (int i = 0; i < t.ndim; ++i) size[3 - t.ndim + i] = t.shape[i], step[3 - t.ndim + i] = stride_of(t, i);
  const T* base = reinterpret_cast<const T*>(static_cast<const char*>(t.data) + t.byte_offset);
  for (int64_t i = 0; i < size[0]; ++i)
    for (int64_t j = 0; j < size[1]; ++j) {
      const T* row = base + i * step[0] + j * step[1];
      bool good = true;
      for (int64_t l = 0; l < size[2]; ++l) good &= row[l * step[2]] <= 0;
      for (int64_t l = 0; !good && l < size[2]; ++l) {
        if (row[l * step[2]] <= 0) continue;
        const int64_t index[3] = {i, j, l};
        std::string where;
        for (int d = 3 - t.ndim; d < 3; ++d) where += (where.empty() ? " at [" : ", ") + std::to_string(index[d]);
        fail(LC_INVALID, "log_decay: expected values <= 0, got %g%s%s", double(row[l * step[2]]), where.c_str(),
             t.ndim ? "]" : "");
      }
    }
}

// ---- the whole call -----------------------------------------------------------------------------

void scalars(const lc_args& a) {
  if (a.op != LC_FORWARD && a.op != LC_BACKWARD && a.op != LC_DECODE)
    fail(LC_INVALID, "op: expected LC_FORWARD, LC_BACKWARD or LC_DECODE, got %d", a.op);
  if (a.flags & ~uint32_t(LC_LAYOUT_BNHD | LC_ALLOW_TF32 | LC_DT_SOFTPLUS))
    fail(LC_INVALID, "flags: expected a sum of LC_LAYOUT_BNHD, LC_ALLOW_TF32 and LC_DT_SOFTPLUS, got %u", a.flags);
  if (a.reserved) fail(LC_INVALID, "reserved: expected 0, got %u", a.reserved);
  if (a.num_threads < 0) fail(LC_INVALID, "num_threads: expected 0 or more, got %d", a.num_threads);
  if (!std::isfinite(a.scale)) fail(LC_INVALID, "scale: expected a finite number, got %g", a.scale);
}

void divides(const char* name, int64_t heads, int64_t all, const char* whose) {
  if (all % heads)
    fail(LC_INVALID, "%s: expected a number of heads that divides %lld, the most of %s, got %lld", name,
         static_cast<long long>(all), whose, static_cast<long long>(heads));
}

// The sizes of the call, from the shapes of q, k and v.
void dims(Checker& c, const lc_args& a) {
  Problem& p = c.p;
  const lc_tensor &q = c.required("q", a.q), &k = c.required("k", a.k), &v = c.required("v", a.v);
  c.shape("q", q, {{"B", -1}, {"Hq", -1, 1}, {"N", -1}, {"K", -1, 1}}, true);
  p.op = lc_op(a.op);
  p.device = c.device = q.device;
  p.scale = a.scale;
  p.tf32 = a.flags & LC_ALLOW_TF32;
  p.B = q.shape[0];
  p.N = q.shape[c.bnhd ? 1 : 2];
  p.K = q.shape[3];
  p.Hq = c.heads(q);
  c.shape("k", k, {{"B", p.B}, {"Hk", -1, 1}, {"N", p.N}, {"K", p.K}}, true);
  c.shape("v", v, {{"B", p.B}, {"Hv", -1, 1}, {"N", p.N}, {"V", -1, 1}}, true);
  p.Hk = c.heads(k);
  p.Hv = c.heads(v);
  p.V = v.shape[3];
  p.H = std::max({p.Hq, p.Hk, p.Hv});
  p.Hs = std::max(p.Hk, p.Hv);
  divides("q", p.Hq, p.H, "q, k and v");
  divides("k", p.Hk, p.Hs, "k and v");
  divides("v", p.Hv, p.Hs, "k and v");
  if (p.H % p.Hs) divides(p.Hk > p.Hv ? "k" : "v", p.Hs, p.H, "q, k and v");
  for (const auto& [name, dim] : {std::pair{"q", p.K}, std::pair{"v", p.V}})
    if (dim > kMostHeadDim)
      fail(LC_INVALID, "%s: expected a head dim of at most %d, got %lld", name, int(kMostHeadDim),
           static_cast<long long>(dim));
  if (p.op == LC_DECODE && p.N > kMostDecodeTokens)
    fail(LC_INVALID, "q: expected at most %d tokens to decode, got %lld; prefill the others", int(kMostDecodeTokens),
         static_cast<long long>(p.N));
  if (p.B > INT64_MAX / 2 / p.H || p.B * p.H > INT64_MAX / 2 / std::max<int64_t>(1, p.N))
    fail(LC_INVALID, "q: expected B * H * N below 2^62, got shape %s with %lld heads", shape_text(q).c_str(),
         static_cast<long long>(p.H));
}

// The dtype, the device and the memory of q, k and v.
void inputs(Checker& c, const lc_args& a) {
  Problem& p = c.p;
  p.type = type_among("q", *a.q, {Type::f64, Type::f32, Type::f16, Type::bf16});
  const Type exact = p.type == Type::f64 ? Type::f64 : Type::f32;
  p.state_type = exact;
  if (p.device.type != LC_CPU && p.device.type != LC_CUDA)
    fail(LC_INVALID, "q: expected on the CPU or a CUDA device, got %s", device_text(p.device).c_str());
#ifndef LC_WITH_CUDA
  if (p.device.type == LC_CUDA)
    fail(LC_DEVICE, "q: is on %s, and this build of leetcore has no CUDA methods; move it to the CPU",
         device_text(p.device).c_str());
#endif
  if (a.stream && p.device.type == LC_CPU)
    fail(LC_INVALID, "stream: expected NULL for tensors on the CPU, got %p", a.stream);
  for (const auto& [name, t, view] :
       {std::tuple{"q", a.q, &p.q}, std::tuple{"k", a.k, &p.k}, std::tuple{"v", a.v, &p.v}}) {
    type_among(name, *t, {p.type}, " like q");
    c.memory(name, *t);
    *view = c.view(*t, true);
  }
}

void decay(Checker& c, const lc_args& a) {
  Problem& p = c.p;
  const lc_tensor* t = a.log_decay;
  if (!t) return;
  const Dim b{"B", p.B}, hs{"Hs", p.Hs};
  const Dims forms[] = {{}, {hs}, {b, hs}, {b, hs, {"N", p.N}}};
  if (a.dt && (t->ndim < 0 || t->ndim > 2))
    fail(LC_INVALID, "log_decay: expected a scalar, [Hs] or [B, Hs], as dt is given, got %d dimensions", t->ndim);
  if (t->ndim < 0 || t->ndim > 3)
    fail(LC_INVALID, "log_decay: expected a scalar, [Hs], [B, Hs] or [B, Hs, N], got %d dimensions", t->ndim);
  c.shape("log_decay", *t, forms[t->ndim], t->ndim == 3);
  if (p.type == Type::f64)
    p.decay_type = type_among("log_decay", *t, {Type::f32, Type::f64});
  else
    p.decay_type = type_among("log_decay", *t, {Type::f32});
  p.decay = t->ndim == 3 || a.dt ? Decay::per_token : Decay::constant;
  p.log_decay = c.decay_view("log_decay", *t);
}

// The type of a tensor that may have the dtype of q or float32.
Type parameter_type(const char* name, const lc_tensor& t, const Problem& p) {
  return p.type == Type::f32 ? type_among(name, t, {Type::f32}) : type_among(name, t, {p.type, Type::f32});
}

// The lengths of tokens: dt, its bias and its limits.
void token_lengths(Checker& c, const lc_args& a) {
  Problem& p = c.p;
  if (!a.dt) {
    if (a.dt_bias) fail(LC_INVALID, "dt_bias: expected NULL, as dt is absent");
    if (a.flags & LC_DT_SOFTPLUS) fail(LC_INVALID, "flags: expected no LC_DT_SOFTPLUS, as dt is absent");
    return;
  }
  c.shape("dt", *a.dt, {{"B", p.B}, {"Hs", p.Hs}, {"N", p.N}}, true);
  p.dt_type = parameter_type("dt", *a.dt, p);
  c.memory("dt", *a.dt, false);
  if (empty(*a.dt)) {  // no token has a length
    if (p.decay == Decay::per_token) p.decay = Decay::constant;
  } else {
    p.dt = c.view(*a.dt, true);
  }
  if (const lc_tensor* t = a.dt_bias) {
    c.shape("dt_bias", *t, {{"Hs", p.Hs}});
    p.dt_bias_type = parameter_type("dt_bias", *t, p);
    c.memory("dt_bias", *t, false);
    p.dt_bias = c.view(*t, false);
    p.dt_bias.stride[1] = p.dt_bias.stride[0];
    p.dt_bias.stride[0] = 0;
  }
  p.softplus = a.flags & LC_DT_SOFTPLUS;
  p.dt_min = a.dt_min;
  p.dt_max = a.dt_max == 0 ? HUGE_VAL : a.dt_max;
  if (!(p.dt_min >= 0 && p.dt_min <= p.dt_max))
    fail(LC_INVALID, "dt_min: expected 0 <= dt_min <= dt_max, got %g and %g", a.dt_min, a.dt_max);
}

// What the output takes besides the state: skip and gate.
void output_terms(Checker& c, const lc_args& a, const Dims& output) {
  Problem& p = c.p;
  for (const auto& [name, t] : {std::pair{"skip", a.skip}, std::pair{"gate", a.gate}})
    if (p.op == LC_BACKWARD) c.absent(name, t, "LC_FORWARD or LC_DECODE");
  if (const lc_tensor* t = a.skip) {
    if (t->ndim != 1 && t->ndim != 2) fail(LC_INVALID, "skip: expected [H] or [H, V], got %d dimensions", t->ndim);
    Dims dims{{"H", p.H}, {"V", p.V}};
    dims.rank = t->ndim;
    c.shape("skip", *t, dims);
    p.skip_type = parameter_type("skip", *t, p);
    c.memory("skip", *t, false);
    const View w = c.view(*t, false);
    p.skip.data = w.data;
    p.skip.stride[1] = w.stride[0];
    p.skip.stride[3] = w.stride[1];
  }
  if (a.gate) p.gate = c.tensor("gate", *a.gate, output, p.type, " like q", true);
}

// Returns the number of sequences.
int64_t packed(Checker& c, const lc_args& a) {
  Problem& p = c.p;
  const lc_tensor* t = a.cu_seqlens;
  if (!t) return p.B;
  if (p.op == LC_DECODE) c.absent("cu_seqlens", t, "LC_FORWARD or LC_BACKWARD");
  c.shape("cu_seqlens", *t, {{"S + 1", -1, 1}});
  p.cu_bits = integer_bits("cu_seqlens", *t);
  c.memory("cu_seqlens", *t);
  if (p.B != 1)
    fail(LC_INVALID, "cu_seqlens: expected B = 1 with packed sequences, got B = %lld", static_cast<long long>(p.B));
  p.cu_seqlens = c.view(*t, false).data;
  return t->shape[0] - 1;
}

// The reason in the refusal of a state with a wrong dtype.
const char* state_reason(const Problem& p) { return p.type == Type::f64 ? " with float64 inputs" : ""; }

// The pool of states of LC_DECODE, and the slots of the sequences.
void pool(Checker& c, const lc_args& a) {
  Problem& p = c.p;
  c.absent("initial_state", a.initial_state, "LC_FORWARD or LC_BACKWARD (LC_DECODE updates final_state in place)");
  const lc_tensor& t = c.required("final_state", a.final_state);
  const Dims dims{{"slots", -1}, {"Hs", p.Hs}, {"K", p.K}, {"V", p.V}};
  if (p.type == Type::f64)
    p.final_state = c.state("final_state", t, dims, p.state_type, {Type::f64}, state_reason(p));
  else
    p.final_state = c.state("final_state", t, dims, p.state_type, {Type::f32, Type::f16, Type::bf16}, "");
  p.slots = t.shape[0];
  if (const lc_tensor* i = a.state_indices) {
    c.shape("state_indices", *i, {{"B", p.B}});
    p.index_bits = integer_bits("state_indices", *i);
    c.memory("state_indices", *i);
    p.state_indices = c.view(*i, false).data;
  } else if (p.slots < p.B) {
    fail(LC_INVALID, "final_state: expected at least %lld slots, one a sequence, got %lld", static_cast<long long>(p.B),
         static_cast<long long>(p.slots));
  }
}

void states(Checker& c, const lc_args& a, const Dims& state) {
  Problem& p = c.p;
  const auto view = [&](const char* name, const lc_tensor& t) {
    return c.state(name, t, state, p.state_type, {p.state_type}, state_reason(p));
  };
  c.absent("state_indices", a.state_indices, "LC_DECODE");
  if (a.initial_state) p.initial_state = view("initial_state", *a.initial_state);
  if (p.op == LC_BACKWARD) c.absent("final_state", a.final_state, "LC_FORWARD or LC_DECODE");
  if (a.final_state) p.final_state = view("final_state", *a.final_state);
}

void decay_gradient(Checker& c, const lc_args& a) {
  Problem& p = c.p;
  const lc_tensor* t = a.d_log_decay;
  if (!t) return;
  if (!a.log_decay) fail(LC_INVALID, "d_log_decay: expected NULL, as log_decay is absent");
  Dims like{};
  for (like.rank = 0; like.rank < a.log_decay->ndim; ++like.rank)
    like.at[like.rank] = {"", a.log_decay->shape[like.rank]};
  c.shape("d_log_decay", *t, like);
  type_among("d_log_decay", *t, {p.decay_type}, " like log_decay");
  const View w = c.decay_view("d_log_decay", *t);
  if (!empty(*t)) p.d_log_decay = w;  // with no sequences there is nothing to write
}

void gradients(Checker& c, const lc_args& a, const Dims& output, const Dims& state) {
  Problem& p = c.p;
  const Dim b{"B", p.B}, n{"N", p.N}, k{"K", p.K};
  const Dims q_like{b, {"Hq", p.Hq}, n, k}, k_like{b, {"Hk", p.Hk}, n, k}, v_like{b, {"Hv", p.Hv}, n, {"V", p.V}};
  const struct {
    const char* name;
    const lc_tensor* tensor;
    const Dims& dims;
    bool is_state;
    View* view;
  } all[] = {
      {"d_o", a.d_o, output, false, &p.d_o}, {"d_final_state", a.d_final_state, state, true, &p.d_final_state},
      {"d_q", a.d_q, q_like, false, &p.d_q}, {"d_k", a.d_k, k_like, false, &p.d_k},
      {"d_v", a.d_v, v_like, false, &p.d_v}, {"d_initial_state", a.d_initial_state, state, true, &p.d_initial_state},
  };
  for (const auto& d : all) {
    if (p.op != LC_BACKWARD) c.absent(d.name, d.tensor, "LC_BACKWARD");
    if (!d.tensor) continue;
    *d.view = d.is_state ? c.state(d.name, *d.tensor, d.dims, p.state_type, {p.state_type}, state_reason(p))
                         : c.tensor(d.name, *d.tensor, d.dims, p.type, " like q", true);
  }
  if (p.op != LC_BACKWARD) {
    c.absent("d_log_decay", a.d_log_decay, "LC_BACKWARD");
    return c.absent("d_dt", a.d_dt, "LC_BACKWARD");
  }
  decay_gradient(c, a);
  if (a.d_dt) {
    if (!a.dt) fail(LC_INVALID, "d_dt: expected NULL, as dt is absent");
    c.shape("d_dt", *a.d_dt, {b, {"Hs", p.Hs}, n}, true);
    type_among("d_dt", *a.d_dt, {p.dt_type}, " like dt");
    c.memory("d_dt", *a.d_dt, false);
    if (!empty(*a.d_dt)) p.d_dt = c.view(*a.d_dt, true);
  }
  c.absent("o", a.o, "LC_FORWARD or LC_DECODE");
  if (!a.d_o && !a.d_final_state) fail(LC_INVALID, "d_o: required where d_final_state is absent, but absent");
  if (!a.d_q && !a.d_k && !a.d_v && !a.d_log_decay && !a.d_initial_state && !a.d_dt)
    fail(LC_INVALID,
         "d_q: expected at least one gradient to write (d_q, d_k, d_v, d_log_decay, d_initial_state, d_dt), got none");
}

// Written tensors overlap neither themselves nor other arguments; final_state may be initial_state.
void outputs_apart(const Checker& c, const lc_args& a) {
  const std::pair<const char*, const lc_tensor*> written[] = {{"o", a.o},
                                                              {"final_state", a.final_state},
                                                              {"d_q", a.d_q},
                                                              {"d_k", a.d_k},
                                                              {"d_v", a.d_v},
                                                              {"d_log_decay", a.d_log_decay},
                                                              {"d_initial_state", a.d_initial_state},
                                                              {"d_dt", a.d_dt}};
  for (const auto& [name, t] : written) {
    if (!t || empty(*t)) continue;
    c.distinct(name, *t);
    c.apart(name, std::strcmp(name, "final_state") ? "" : "initial_state");
  }
}

int threads_of(const Problem& p, const lc_args& a) {
  if (p.device.type != LC_CPU) return 1;
  // A decode call with little work runs on one thread, whatever the number of threads is.
  const double flop = 4 * double(p.B) * double(p.H) * double(p.N) * double(p.K) * double(p.V);
  if (p.op == LC_DECODE && 4 * least_bytes(p) + flop < kFlopPerWorker) return 1;
  return thread_count(a.num_threads).count;
}

Checker structure(const lc_args& a) {
  scalars(a);
  Checker c(a);
  Problem& p = c.p;
  dims(c, a);
  inputs(c, a);
  decay(c, a);
  token_lengths(c, a);
  const int64_t sequences = packed(c, a);
  const Dims state{{a.cu_seqlens ? "S" : "B", sequences}, {"Hs", p.Hs}, {"K", p.K}, {"V", p.V}};
  const Dims output{{"B", p.B}, {"H", p.H}, {"N", p.N}, {"V", p.V}};
  p.op == LC_DECODE ? pool(c, a) : states(c, a, state);
  output_terms(c, a, output);
  gradients(c, a, output, state);
  if (a.o) p.o = c.tensor("o", *a.o, output, p.type, " like q", true);
  outputs_apart(c, a);
  p.B = sequences;
  p.workspace = a.workspace;
  p.workspace_bytes = a.workspace_bytes;
  p.stream = a.stream;
  p.threads = threads_of(p, a);
  return c;
}

}  // namespace

Problem check_structure(const lc_args& args) { return structure(args).p; }

Problem check(const lc_args& args) {
  Checker c = structure(args);
  const Problem& p = c.p;
  if (p.op != LC_BACKWARD) c.required("o", args.o);
  if (const lc_tensor* t = args.log_decay; t && !empty(*t) && t->device.type == LC_CPU)
    p.decay_type == Type::f64 ? check_log_decay_values<double>(*t) : check_log_decay_values<float>(*t);
  if (p.log_decay && !args.log_decay->ndim) {
    const void* value = p.log_decay.data;
    c.p.uniform_log_decay =
        p.decay_type == Type::f64 ? *static_cast<const double*>(value) : *static_cast<const float*>(value);
    c.p.log_decay = {};
  }
  if (p.device.type == LC_CUDA) return p;  // reading values there would wait for the device
  if (p.cu_bits) check_cu_seqlens_values(p);
  if (p.index_bits) check_state_indices_values(p);
  return p;
}

}  // namespace lc
