// conv_test.cpp - the causal convolution through the C ABI: values, gradients, steps, memory and
// refusals, for the instruction set that LEETCORE_ISA names.
#include <gtest/gtest.h>

#include <memory>

#include "call.h"
#include "isa.h"

namespace {

using namespace test;

enum class Form { tokens, channels, scattered };  // what is contiguous in x, y and their gradients
constexpr Form kForms[] = {Form::tokens, Form::channels, Form::scattered};
constexpr lc_dtype kInputs[] = {kF64, kF32, kF16, kBf16};

double tolerance(lc_dtype t) { return t == kF64 ? 1e-14 : t == kF32 ? 5e-7 : t == kF16 ? 4e-4 : 3e-3; }
double tolerance_of_gradients(lc_dtype t) { return t == kF64 ? 1e-13 : t == kF32 ? 2e-6 : t == kF16 ? 6e-4 : 5e-3; }

struct Spec {
  lc_op op = LC_FORWARD;
  lc_dtype dtype = kF32, parameters = kF32, states = kF32;
  int64_t B = 2, D = 19, N = 70, W = 4, L = 3;
  Form form = Form::tokens;
  bool silu = true, bias = true, initial = true, final = true, in_place = false;
  Index cu;           // packed: cu_seqlens
  int64_t slots = 0;  // LC_DECODE; 0: B
  Index indices;      // LC_DECODE: state_indices
  unsigned wants = 15;
};

// A valid call with its tensors, and the sums of the definition in double.
struct Call {
  Spec spec;
  lc_conv_args args = {};
  Tensor x, weight, bias, initial_state, state_indices, cu_seqlens, y, final_state;
  Tensor d_y, d_final_state, d_x, d_weight, d_bias, d_initial_state;
  Bytes scratch;

  explicit Call(const Spec& s) : spec(s) {
    std::mt19937 random(1);
    std::normal_distribution<double> normal;
    const auto number = [&] { return normal(random); };
    const int64_t sequences = s.cu.empty() ? s.B : int64_t(s.cu.size()) - 1;
    const auto shaped = [&](Tensor& t) {
      if (s.form == Form::tokens) return t.make(s.dtype, {s.B, s.D, s.N});
      if (s.form == Form::scattered) {
        t.make(s.dtype, {s.B, s.D, 3 * s.N}, {1, 0}, 2);
        t.sizes[2] = s.N;
        t.steps[2] = 3;
        return;
      }
      t.make(s.dtype, {s.B, s.N, s.D}, {}, 5);
      std::swap(t.sizes[1], t.sizes[2]);
      std::swap(t.steps[1], t.steps[2]);
    };
    shaped(x);
    weight.make(s.parameters, {s.D, s.W}, {}, 1);
    if (s.bias) bias.make(s.parameters, {s.D});
    const bool decode = s.op == LC_DECODE, backward = s.op == LC_BACKWARD;
    if (!decode && s.initial) initial_state.make(s.states, {sequences, s.D, s.L}, {1, 0}, 1);
    if (decode) final_state.make(s.states, {s.slots ? s.slots : s.B, s.D, s.L}, {1, 0}, 1);
    if (!decode && s.final && !s.in_place)
      (backward ? d_final_state : final_state).make(s.states, {sequences, s.D, s.L}, {1, 0}, 2);
    if (backward) {
      shaped(d_y);
      if (s.wants & 1) shaped(d_x);
      if (s.wants & 2) d_weight.make(s.parameters, {s.D, s.W});
      if (s.wants & 4) d_bias.make(s.parameters, {s.D});
      if (s.wants & 8) d_initial_state.make(s.states, {sequences, s.D, s.L});
    } else {
      shaped(y);
    }
    for (Tensor* t : {&x, &weight, &bias, &initial_state, &d_y, &d_final_state})
      if (!t->memory.empty()) t->fill(number);
    if (decode) final_state.fill(number);
    const auto integers = [](Tensor& t, lc_dtype type, const Index& list) {
      t.make(type, {int64_t(list.size())});
      auto next = list.begin();
      t.fill([&] { return double(*next++); });
    };
    if (!s.cu.empty()) integers(cu_seqlens, kI32, s.cu);
    if (!s.indices.empty()) integers(state_indices, kI64, s.indices);

    const auto given = [](const Tensor& t) { return t.memory.empty() ? nullptr : &t; };
    args.struct_size = sizeof args;
    args.op = s.op;
    args.flags = s.silu ? LC_CONV_SILU : 0;
    args.x = given(x);
    args.weight = given(weight);
    args.bias = given(bias);
    args.initial_state = given(initial_state);
    args.state_indices = given(state_indices);
    args.cu_seqlens = given(cu_seqlens);
    args.y = given(y);
    args.final_state = s.in_place ? given(initial_state) : given(final_state);
    args.d_y = given(d_y);
    args.d_final_state = given(d_final_state);
    args.d_x = given(d_x);
    args.d_weight = given(d_weight);
    args.d_bias = given(d_bias);
    args.d_initial_state = given(d_initial_state);
  }

  std::vector<Tensor*> tensors() {
    return {&x,           &weight, &bias,          &initial_state, &state_indices, &cu_seqlens, &y,
            &final_state, &d_y,    &d_final_state, &d_x,           &d_weight,      &d_bias,     &d_initial_state};
  }
  std::vector<const lc_tensor*> written() const {
    std::vector<const lc_tensor*> all;
    for (const lc_tensor* t : {args.y, args.final_state, args.d_x, args.d_weight, args.d_bias, args.d_initial_state})
      if (t) all.push_back(t);
    return all;
  }
  std::vector<Bytes> memory() {
    std::vector<Bytes> all;
    for (Tensor* t : tensors()) all.push_back(t->memory);
    return all;
  }

  // Runs with a guarded workspace of exactly the size that the library asks for, full of NaN.
  lc_status run() {
    const lc_status status = lc_conv_workspace(&args, &args.workspace_bytes);
    if (status != LC_OK) return status;
    scratch.assign(args.workspace_bytes + 64 + 2 * Tensor::kGuard, Tensor::kUntouched);
    const auto start = reinterpret_cast<uintptr_t>(scratch.data()) + Tensor::kGuard;
    args.workspace = scratch.data() + Tensor::kGuard + (64 - start % 64) % 64;
    std::memset(args.workspace, 0xFF, args.workspace_bytes);
    return lc_conv_run(&args);
  }

  // Whether every byte outside of the workspace and of the elements of outputs is as before.
  bool stayed_inside(const std::vector<Bytes>& before) {
    const auto* begin = static_cast<unsigned char*>(args.workspace);
    for (const unsigned char& byte : scratch)
      if ((&byte < begin || &byte >= begin + args.workspace_bytes) && byte != Tensor::kUntouched) return false;
    const std::vector<Tensor*> all = tensors();
    std::vector<Bytes> now = memory();
    for (const lc_tensor* output : written())
      for (size_t i = 0; i < all.size(); ++i) {
        if (all[i] != output) continue;
        for_each_element(*output, [&](const Position& at_) {
          const size_t where = size_t(static_cast<unsigned char*>(at(*output, at_)) - all[i]->memory.data());
          std::copy_n(before[i].begin() + int64_t(where), output->dtype.bits / 8, now[i].begin() + int64_t(where));
        });
      }
    return now == before;
  }
};

// The definition, element by element in double, before the call changes states in place.
struct Definition {
  std::vector<double> y, state, d_x, d_weight, d_bias, d_initial_state;

  explicit Definition(const Call& c) {
    const Spec& s = c.spec;
    const lc_conv_args& a = c.args;
    const auto read = [](const lc_tensor* t, const Position& i) { return t ? load(at(*t, i), t->dtype) : 0.0; };
    const int64_t sequences = s.cu.empty() ? s.B : int64_t(s.cu.size()) - 1;
    const lc_tensor* before = s.op == LC_DECODE ? a.final_state : a.initial_state;
    y.assign(size_t(s.B * s.D * s.N), 0);
    d_x = y;
    d_weight.assign(size_t(s.D * s.W), 0);
    d_bias.assign(size_t(s.D), 0);
    state = before && s.op == LC_DECODE ? values(*before) : std::vector<double>(size_t(sequences * s.D * s.L));
    d_initial_state.assign(size_t(sequences * s.D * s.L), 0);
    for (int64_t q = 0; q < sequences; ++q) {
      const int64_t row = s.cu.empty() ? q : 0, first = s.cu.empty() ? 0 : s.cu[size_t(q)];
      const int64_t n = s.cu.empty() ? s.N : s.cu[size_t(q) + 1] - first;
      const int64_t slot = s.indices.empty() ? q : s.indices[size_t(q)];
      if (slot < 0) continue;
      for (int64_t d = 0; d < s.D; ++d) {
        std::vector<double> in(size_t(s.L + n)), d_in(size_t(s.L + n));  // the state, then x
        for (int64_t l = 0; l < s.L; ++l) in[size_t(l)] = read(before, {slot, d, l});
        for (int64_t t = 0; t < n; ++t) in[size_t(s.L + t)] = read(a.x, {row, d, first + t});
        for (int64_t t = 0; t < n; ++t) {
          double u = read(a.bias, {d});
          for (int64_t i = 0; i < s.W; ++i) u += read(a.weight, {d, i}) * in[size_t(s.L + t - s.W + 1 + i)];
          const double sigmoid = 1 / (1 + std::exp(-u));
          y[size_t((row * s.D + d) * s.N + first + t)] = s.silu ? u * sigmoid : u;
          const double d_u = read(a.d_y, {row, d, first + t}) * (s.silu ? sigmoid * (1 + u * (1 - sigmoid)) : 1);
          d_bias[size_t(d)] += d_u;
          for (int64_t i = 0; i < s.W; ++i) {
            const size_t input = size_t(s.L + t - s.W + 1 + i);
            d_weight[size_t(d * s.W + i)] += d_u * in[input];
            d_in[input] += d_u * read(a.weight, {d, i});
          }
        }
        for (int64_t l = 0; l < s.L; ++l) {
          state[size_t((slot * s.D + d) * s.L + l)] = in[size_t(n + l)];
          d_in[size_t(n + l)] += read(a.d_final_state, {q, d, l});
        }
        for (int64_t l = 0; l < s.L; ++l) d_initial_state[size_t((q * s.D + d) * s.L + l)] = d_in[size_t(l)];
        for (int64_t t = 0; t < n; ++t) d_x[size_t((row * s.D + d) * s.N + first + t)] = d_in[size_t(s.L + t)];
      }
    }
  }
};

class Convolution : public WithIsa {
 protected:
  void check(const Spec& spec) {
    std::ostringstream words;
    words << "op " << spec.op << " " << name(spec.dtype) << " B=" << spec.B << " D=" << spec.D << " N=" << spec.N
          << " W=" << spec.W << " L=" << spec.L << " form " << int(spec.form) << " silu " << spec.silu;
    SCOPED_TRACE(words.str());
    std::vector<Bytes> first;
    std::unique_ptr<Definition> want;
    for (int threads : {1, 2, 5}) {
      SCOPED_TRACE(threads);
      lc_set_num_threads(threads);
      Call call(spec);
      if (threads == 1) want = std::make_unique<Definition>(call);
      for (const lc_tensor* t : call.written())
        if (spec.op != LC_DECODE || t != call.args.final_state)
          if (!spec.in_place || t != call.args.initial_state)
            const_cast<Tensor*>(static_cast<const Tensor*>(t))->poison();
      const auto before = call.memory();
      ASSERT_EQ(LC_OK, call.run()) << lc_last_error();
      EXPECT_TRUE(call.stayed_inside(before)) << "wrote outside of its outputs and workspace";
      if (threads > 1) {
        EXPECT_TRUE(first == call.memory()) << "the results depend on the number of threads";
        continue;
      }
      first = call.memory();
      const struct {
        const char* name;
        const lc_tensor* tensor;
        const std::vector<double>& want;
      } outputs[] = {{"y", call.args.y, want->y},
                     {"final_state", call.args.final_state, want->state},
                     {"d_x", call.args.d_x, want->d_x},
                     {"d_weight", call.args.d_weight, want->d_weight},
                     {"d_bias", call.args.d_bias, want->d_bias},
                     {"d_initial_state", call.args.d_initial_state, want->d_initial_state}};
      for (const auto& o : outputs) {
        if (!o.tensor) continue;
        const double most = spec.op == LC_BACKWARD ? tolerance_of_gradients(spec.dtype) : tolerance(spec.dtype);
        EXPECT_LE(relative_error(values(*o.tensor), o.want, o.want), most) << o.name;
      }
    }
  }
};

TEST_F(Convolution, Forward) {
  for (lc_dtype dtype : kInputs)
    for (Form form : kForms)
      for (int64_t N : {0, 1, 3, 63, 65, 200})
        for (bool silu : {false, true}) {
          Spec spec;
          spec.dtype = spec.parameters = spec.states = dtype;
          spec.form = form;
          spec.N = N;
          spec.silu = spec.bias = silu;
          spec.initial = N % 2;
          check(spec);
        }
}

TEST_F(Convolution, TapsAndStates) {
  for (int64_t W = 2; W <= 8; ++W)
    for (int64_t L : {W - 1, W, int64_t{80}})
      for (int64_t N : {int64_t{1}, W - 1, int64_t{40}})
        for (bool in_place : {false, true}) {
          Spec spec;
          spec.W = W;
          spec.L = L;
          spec.N = N;
          spec.in_place = in_place;
          spec.form = in_place ? Form::channels : Form::tokens;
          check(spec);
        }
}

TEST_F(Convolution, DtypesOfParametersAndStates) {
  for (lc_dtype dtype : {kF16, kBf16})
    for (lc_op op : {LC_FORWARD, LC_DECODE, LC_BACKWARD})
      for (bool exact : {false, true}) {
        Spec spec;
        spec.op = op;
        spec.dtype = dtype;
        spec.parameters = exact ? kF32 : dtype;
        spec.states = exact ? dtype : kF32;
        spec.N = 5;
        check(spec);
      }
}

TEST_F(Convolution, ManyChannelsAndTokens) {
  for (Form form : kForms)
    for (lc_op op : {LC_FORWARD, LC_BACKWARD}) {
      Spec spec;
      spec.op = op;
      spec.form = form;
      spec.D = 530;
      spec.N = 300;
      check(spec);
      spec.B = 1;
      spec.D = 3;
      spec.N = 4500;
      check(spec);
    }
}

// Outputs that are larger than the caches are written past them. The rows of both layouts begin at
// addresses that are no multiples of a vector.
TEST_F(Convolution, OutputsLargerThanTheCaches) {
  for (Form form : {Form::tokens, Form::channels})
    for (lc_dtype dtype : {kF32, kBf16}) {
      if (form == Form::tokens && dtype == kBf16) continue;
      Spec spec;
      spec.dtype = dtype;
      spec.form = form;
      spec.B = 1;
      spec.D = dtype == kF32 ? 1099 : 2203;
      spec.N = 2001;
      check(spec);
    }
}

TEST_F(Convolution, PackedSequences) {
  for (Form form : kForms)
    for (lc_op op : {LC_FORWARD, LC_BACKWARD})
      for (const Index& cu : {Index{0, 130}, Index{0, 0, 1, 64, 130, 130}, Index{0, 2, 3, 3}, Index{0, 0}, Index{0}}) {
        Spec spec;
        spec.op = op;
        spec.form = form;
        spec.B = 1;
        spec.cu = cu;
        spec.N = cu.back();
        spec.L = 5;
        check(spec);
      }
}

TEST_F(Convolution, Steps) {
  for (lc_dtype dtype : kInputs)
    for (Form form : kForms)
      for (int64_t N : {1, 2, 64})
        for (const Index& indices : {Index{}, Index{6, -1, 3}}) {
          Spec spec;
          spec.op = LC_DECODE;
          spec.dtype = spec.parameters = spec.states = dtype;
          spec.form = form;
          spec.B = 3;
          spec.N = N;
          spec.L = 4;
          spec.slots = 7;
          spec.indices = indices;
          check(spec);
        }
}

TEST_F(Convolution, Gradients) {
  for (lc_dtype dtype : kInputs)
    for (Form form : kForms)
      for (int64_t N : {1, 3, 64, 130})
        for (unsigned wants : {15u, 1u, 6u, 8u}) {
          Spec spec;
          spec.op = LC_BACKWARD;
          spec.dtype = spec.parameters = spec.states = dtype;
          spec.form = form;
          spec.N = N;
          spec.W = 5;
          spec.L = N == 3 ? 70 : 6;
          spec.silu = N != 64;
          spec.wants = wants;
          check(spec);
        }
}

// ---- refusals -----------------------------------------------------------------------------------

// Runs a spoiled call, and expects the status, the beginning of the sentence, and that nothing was
// written.
template <class F>
void refused(lc_status status, const std::string& text, const Spec& spec, F&& spoil) {
  SCOPED_TRACE(text);
  Call call(spec);
  spoil(call);
  const auto before = call.memory();
  EXPECT_EQ(status, call.run());
  EXPECT_EQ(text, std::string(lc_last_error()).substr(0, text.size()));
  EXPECT_TRUE(before == call.memory());
}

TEST_F(Convolution, Refusals) {
  Spec forward, backward, decode, many, packed;
  backward.op = LC_BACKWARD;
  decode.op = many.op = LC_DECODE;
  decode.N = 1;
  packed.B = 1;
  packed.cu = {0, 30, 70};
  const auto by = [](const char* text, const Spec& spec, auto spoil) { refused(LC_INVALID, text, spec, spoil); };
  by("op: expected LC_FORWARD, LC_BACKWARD or LC_DECODE, got 3", forward, [](Call& c) { c.args.op = 3; });
  by("flags: expected LC_CONV_SILU or 0, got 2", forward, [](Call& c) { c.args.flags = 2; });
  by("reserved: expected 0, got 1", forward, [](Call& c) { c.args.reserved = 1; });
  by("num_threads: expected 0 or more, got -1", forward, [](Call& c) { c.args.num_threads = -1; });
  by("x: required, but absent", forward, [](Call& c) { c.args.x = nullptr; });
  by("weight: required, but absent", forward, [](Call& c) { c.args.weight = nullptr; });
  by("y: required, but absent", forward, [](Call& c) { c.args.y = nullptr; });
  by("final_state: required, but absent", decode, [](Call& c) { c.args.final_state = nullptr; });
  by("weight: expected at most 8 taps, got 9", forward, [](Call& c) { c.weight.make(kF32, {19, 9}); });
  by("weight: expected shape [19, W], got [19, 1]; W is at least 2", forward, [](Call& c) { c.weight.sizes[1] = 1; });
  by("initial_state: expected shape [2, 19, L], got [2, 19, 2]; L is at least 3", forward,
     [](Call& c) { c.initial_state.sizes[2] = 2; });
  by("final_state: expected shape [2, 19, 3], got [2, 19, 4]", forward, [](Call& c) { c.final_state.sizes[2] = 4; });
  by("x: expected at most 64 tokens per step, got 70", many, [](Call&) {});
  by("initial_state: only LC_FORWARD or LC_BACKWARD", decode,
     [](Call& c) { c.args.initial_state = c.args.final_state; });
  by("state_indices: only LC_DECODE takes it", packed, [](Call& c) { c.args.state_indices = &c.cu_seqlens; });
  by("cu_seqlens: expected values that do not decrease, got 20 at [2]", packed,
     [](Call& c) { store(at(c.cu_seqlens, {2}), kI32, 20); });
  by("d_y: only LC_BACKWARD takes it", forward, [](Call& c) { c.args.d_y = c.args.x; });
  by("d_initial_state: only LC_BACKWARD takes it", forward,
     [](Call& c) { c.args.d_initial_state = c.args.initial_state; });
  by("y: only LC_FORWARD or LC_DECODE takes it", backward, [](Call& c) { c.args.y = c.args.x; });
  by("final_state: only LC_FORWARD or LC_DECODE takes it", backward,
     [](Call& c) { c.args.final_state = c.args.initial_state; });
  by("d_y: required where d_final_state is absent", backward,
     [](Call& c) { c.args.d_y = c.args.d_final_state = nullptr; });
  by("d_x: expected at least one gradient", backward,
     [](Call& c) { c.args.d_x = c.args.d_weight = c.args.d_bias = c.args.d_initial_state = nullptr; });
  by("y: expected memory of its own, as it is written; got an overlap with x", forward,
     [](Call& c) { c.args.y = c.args.x; });
  by("y: expected elements that do not overlap", forward, [](Call& c) { c.y.steps[1] = 0; });
  by("stream: expected NULL for tensors on the CPU", forward, [](Call& c) { c.args.stream = &c; });
  by("x: expected on the CPU or a CUDA device", forward, [](Call& c) { c.x.device.type = 3; });
  by("weight: expected on the CPU like x, got CUDA device 1", forward, [](Call& c) { c.weight.device = {LC_CUDA, 1}; });
  const auto dtype = [](const char* text, const Spec& spec, auto spoil) { refused(LC_DTYPE, text, spec, spoil); };
  dtype("weight: expected dtype float32 with float32 inputs, got float64", forward,
        [](Call& c) { c.weight.dtype = kF64; });
  dtype("y: expected dtype float32 like x, got float16", forward, [](Call& c) { c.y.dtype = kF16; });
  dtype("d_weight: expected dtype float32 like weight, got bfloat16", backward,
        [](Call& c) { c.d_weight.dtype = kBf16; });
}

TEST_F(Convolution, OneBadPointerAndOneSmallWorkspace) {
  EXPECT_EQ(LC_INVALID, lc_conv_run(nullptr));
  EXPECT_STREQ("args: expected a pointer to the arguments, got NULL", lc_last_error());
  Call call{Spec()};
  EXPECT_EQ(LC_INVALID, lc_conv_workspace(&call.args, nullptr));
  const auto before = call.memory();
  EXPECT_EQ(LC_MEMORY, lc_conv_run(&call.args));
  EXPECT_EQ(0, std::string(lc_last_error()).find("workspace: the convolution needs "));
  EXPECT_TRUE(before == call.memory());
}

// A caller with kernels of its own for a GPU can validate its calls.
TEST_F(Convolution, TensorsOnAGpuAreValidatedAndNotServed) {
  Call call{Spec()};
  for (Tensor* t : call.tensors()) t->device = {LC_CUDA, 1};
  size_t bytes = 1;
  EXPECT_EQ(LC_OK, lc_conv_workspace(&call.args, &bytes)) << lc_last_error();
  EXPECT_EQ(0u, bytes);
  EXPECT_EQ(LC_UNSUPPORTED, lc_conv_run(&call.args));
  EXPECT_EQ(0, std::string(lc_last_error()).find("x: expected on the CPU, as the convolution has no CUDA kernel"));
  call.weight.sizes[0] = 18;
  EXPECT_EQ(LC_INVALID, lc_conv_workspace(&call.args, &bytes));
}

TEST_F(Convolution, AnInterruptionEndsACall) {
  Spec spec;
  spec.op = LC_BACKWARD;
  spec.form = Form::scattered;
  spec.B = 1;
  spec.D = 4;
  spec.N = 1500000;
  spec.initial = spec.final = false;
  Call call(spec);
  call.args.interrupt = [](void*) { return 1; };
  lc_set_num_threads(1);  // the call then takes longer than the time before the first question
  ASSERT_EQ(LC_INTERRUPTED, call.run()) << lc_last_error();
}

}  // namespace
