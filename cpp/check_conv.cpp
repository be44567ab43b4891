// check_conv.cpp - makes a ConvProblem of lc_conv_args: the validation of the causal convolution.
#include <algorithm>
#include <cstring>
#include <utility>

#include "checker.h"
#include "conv.h"
#include "thread_count.h"

namespace lc {
namespace {

constexpr int64_t kMostStepTokens = 64;

struct Checker : TensorChecker {
  Checker() : TensorChecker(false, "x") {}
  ConvProblem p = {};
  int64_t rows = 0;  // batch entries of x
};

void scalars(const lc_conv_args& a) {
  if (a.op != LC_FORWARD && a.op != LC_BACKWARD && a.op != LC_DECODE)
    fail(LC_INVALID, "op: expected LC_FORWARD, LC_BACKWARD or LC_DECODE, got %d", a.op);
  if (a.flags & ~uint32_t(LC_CONV_SILU)) fail(LC_INVALID, "flags: expected LC_CONV_SILU or 0, got %u", a.flags);
  if (a.reserved) fail(LC_INVALID, "reserved: expected 0, got %u", a.reserved);
  if (a.num_threads < 0) fail(LC_INVALID, "num_threads: expected 0 or more, got %d", a.num_threads);
}

// The sizes of the call, from the shapes of x, weight and bias.
void dims(Checker& c, const lc_conv_args& a) {
  ConvProblem& p = c.p;
  const lc_tensor &x = c.required("x", a.x), &weight = c.required("weight", a.weight);
  c.shape("x", x, {{"B", -1}, {"D", -1, 1}, {"N", -1}});
  p.op = lc_op(a.op);
  p.silu = a.flags & LC_CONV_SILU;
  p.device = c.device = x.device;
  p.B = c.rows = x.shape[0];
  p.D = x.shape[1];
  p.N = x.shape[2];
  c.shape("weight", weight, {{"D", p.D}, {"W", -1, 2}});
  p.W = weight.shape[1];
  if (p.W > kMostTaps)
    fail(LC_INVALID, "weight: expected at most %d taps, got %lld", int(kMostTaps), static_cast<long long>(p.W));
  if (a.bias) c.shape("bias", *a.bias, {{"D", p.D}});
  if (p.op == LC_DECODE && p.N > kMostStepTokens)
    fail(LC_INVALID, "x: expected at most %d tokens per step, got %lld; take causal_conv1d for the others",
         int(kMostStepTokens), static_cast<long long>(p.N));
  if (p.B > INT64_MAX / 2 / p.D || p.B * p.D > INT64_MAX / 2 / std::max<int64_t>(1, p.N))
    fail(LC_INVALID, "x: expected B * D * N below 2^62, got shape %s", shape_text(x).c_str());
}

// The dtype of a parameter or of a state: that of x, or float32 with 16-bit inputs.
Type like_x(const Checker& c, const char* name, const lc_tensor& t) {
  const Type type = c.p.type;
  if (type == Type::f64) return type_among(name, t, {type}, " with float64 inputs");
  if (type == Type::f32) return type_among(name, t, {type}, " with float32 inputs");
  return type_among(name, t, {type, Type::f32});
}

void inputs(Checker& c, const lc_conv_args& a) {
  ConvProblem& p = c.p;
  p.type = type_among("x", *a.x, {Type::f64, Type::f32, Type::f16, Type::bf16});
  if (p.device.type != LC_CPU && p.device.type != LC_CUDA)
    fail(LC_INVALID, "x: expected on the CPU or a CUDA device, got %s", device_text(p.device).c_str());
  if (a.stream && p.device.type == LC_CPU)
    fail(LC_INVALID, "stream: expected NULL for tensors on the CPU, got %p", a.stream);
  p.weight_type = like_x(c, "weight", *a.weight);
  p.bias_type = a.bias ? like_x(c, "bias", *a.bias) : p.weight_type;
  c.memory("x", *a.x, false);
  c.memory("weight", *a.weight, false);
  p.x = c.view(*a.x, false);
  p.weight = c.view(*a.weight, false);
  if (!a.bias) return;
  c.memory("bias", *a.bias, false);
  p.bias = c.view(*a.bias, false);
}

void packed(Checker& c, const lc_conv_args& a) {
  ConvProblem& p = c.p;
  const lc_tensor* t = a.cu_seqlens;
  if (!t) return;
  if (p.op == LC_DECODE) c.absent("cu_seqlens", t, "LC_FORWARD or LC_BACKWARD");
  c.shape("cu_seqlens", *t, {{"S + 1", -1, 1}});
  p.cu_bits = integer_bits("cu_seqlens", *t);
  c.memory("cu_seqlens", *t);
  if (p.B != 1)
    fail(LC_INVALID, "cu_seqlens: expected B = 1 with packed sequences, got B = %lld", static_cast<long long>(p.B));
  p.cu_seqlens = c.view(*t, false).data;
  p.B = t->shape[0] - 1;
}

// A state of the call. The first one determines L and the dtype of all states.
View state(Checker& c, const char* name, const lc_tensor* t, const Dim& sequences) {
  ConvProblem& p = c.p;
  if (!t) return {};
  const bool first = !p.L;
  c.shape(name, *t, {sequences, {"D", p.D}, {"L", first ? -1 : p.L, p.W - 1}});
  p.L = t->shape[2];
  p.state_type = first ? like_x(c, name, *t) : type_among(name, *t, {p.state_type}, " like the other states");
  c.memory(name, *t, false);
  return c.view(*t, false);
}

// The pool of states of LC_DECODE, and the slots of the sequences.
void pool(Checker& c, const lc_conv_args& a) {
  ConvProblem& p = c.p;
  c.absent("initial_state", a.initial_state, "LC_FORWARD or LC_BACKWARD (LC_DECODE updates final_state in place)");
  p.final_state = state(c, "final_state", &c.required("final_state", a.final_state), {"slots"});
  p.slots = a.final_state->shape[0];
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

void states(Checker& c, const lc_conv_args& a) {
  ConvProblem& p = c.p;
  const Dim sequences{a.cu_seqlens ? "S" : "B", p.B};
  c.absent("state_indices", a.state_indices, "LC_DECODE");
  p.initial_state = state(c, "initial_state", a.initial_state, sequences);
  if (p.op == LC_BACKWARD) c.absent("final_state", a.final_state, "LC_FORWARD or LC_DECODE");
  p.final_state = state(c, "final_state", a.final_state, sequences);
  if (p.op != LC_BACKWARD) return;
  p.d_final_state = state(c, "d_final_state", a.d_final_state, sequences);
  p.d_initial_state = state(c, "d_initial_state", a.d_initial_state, sequences);
}

void gradients(Checker& c, const lc_conv_args& a) {
  ConvProblem& p = c.p;
  const Dims like_x{{"B", c.rows}, {"D", p.D}, {"N", p.N}}, like_weight{{"D", p.D}, {"W", p.W}}, like_bias{{"D", p.D}};
  const struct {
    const char* name;
    const lc_tensor* tensor;
    const Dims& dims;
    Type type;
    const char* reason;
    View* view;
  } all[] = {
      {"d_y", a.d_y, like_x, p.type, " like x", &p.d_y},
      {"d_x", a.d_x, like_x, p.type, " like x", &p.d_x},
      {"d_weight", a.d_weight, like_weight, p.weight_type, " like weight", &p.d_weight},
      {"d_bias", a.d_bias, like_bias, p.bias_type, a.bias ? " like bias" : " like weight", &p.d_bias},
  };
  for (const auto& d : all) {
    if (p.op != LC_BACKWARD) c.absent(d.name, d.tensor, "LC_BACKWARD");
    if (!d.tensor) continue;
    c.shape(d.name, *d.tensor, d.dims);
    type_among(d.name, *d.tensor, {d.type}, d.reason);
    c.memory(d.name, *d.tensor, false);
    *d.view = c.view(*d.tensor, false);
  }
  if (p.op != LC_BACKWARD) {
    c.absent("d_final_state", a.d_final_state, "LC_BACKWARD");
    return c.absent("d_initial_state", a.d_initial_state, "LC_BACKWARD");
  }
  c.absent("y", a.y, "LC_FORWARD or LC_DECODE");
  if (!a.d_y && !a.d_final_state) fail(LC_INVALID, "d_y: required where d_final_state is absent, but absent");
  if (!a.d_x && !a.d_weight && !a.d_bias && !a.d_initial_state)
    fail(LC_INVALID, "d_x: expected at least one gradient to write (d_x, d_weight, d_bias, d_initial_state), got none");
}

// Written tensors overlap neither themselves nor other arguments; final_state may be initial_state.
void outputs_apart(const Checker& c, const lc_conv_args& a) {
  const std::pair<const char*, const lc_tensor*> written[] = {
      {"y", a.y},           {"final_state", a.final_state},        {"d_x", a.d_x}, {"d_weight", a.d_weight},
      {"d_bias", a.d_bias}, {"d_initial_state", a.d_initial_state}};
  for (const auto& [name, t] : written) {
    if (!t || empty(*t)) continue;
    c.distinct(name, *t);
    c.apart(name, std::strcmp(name, "final_state") ? "" : "initial_state");
  }
}

}  // namespace

ConvProblem check_conv_structure(const lc_conv_args& a) {
  scalars(a);
  Checker c;
  ConvProblem& p = c.p;
  dims(c, a);
  inputs(c, a);
  packed(c, a);
  p.op == LC_DECODE ? pool(c, a) : states(c, a);
  gradients(c, a);
  if (a.y) {
    c.shape("y", *a.y, {{"B", c.rows}, {"D", p.D}, {"N", p.N}});
    type_among("y", *a.y, {p.type}, " like x");
    c.memory("y", *a.y, false);
    p.y = c.view(*a.y, false);
  }
  outputs_apart(c, a);
  p.workspace = a.workspace;
  p.workspace_bytes = a.workspace_bytes;
  p.threads = p.device.type == LC_CPU ? thread_count(a.num_threads).count : 1;
  return p;
}

ConvProblem check_conv(const lc_conv_args& args) {
  const ConvProblem p = check_conv_structure(args);
  if (p.device.type == LC_CUDA)
    fail(LC_UNSUPPORTED,
         "x: expected on the CPU, as the convolution has no CUDA kernel, got %s; take leetcore.torch.causal_conv1d "
         "there",
         device_text(p.device).c_str());
  if (p.op != LC_BACKWARD && !args.y) fail(LC_INVALID, "y: required, but absent");
  if (p.cu_bits) check_cu_seqlens_values(p);
  if (p.index_bits) check_state_indices_values(p);
  return p;
}

}  // namespace lc
