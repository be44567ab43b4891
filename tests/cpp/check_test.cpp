// check_test.cpp - every rule for arguments. A call that breaks a rule is refused by the argument's
// name, and nothing is written; a call that keeps all rules is computed.
// One file, as check.cpp is one.
#include <gtest/gtest.h>

#include <functional>

#include "call.h"

namespace {

using namespace test;
using Spoil = std::function<void(Call&)>;

enum class SeenBy { both, run_only };  // lc_workspace reads no values and does without o

// Expects that the call of `spec`, after `spoil`, fails with `status`, and that its message begins
// with the argument's name and contains all `parts`.
void refused(const Spec& spec, const Spoil& spoil, lc_status status, const std::string& argument,
             const std::vector<std::string>& parts, SeenBy seen_by = SeenBy::both, int line = __builtin_LINE()) {
  SCOPED_TRACE("line " + std::to_string(line) + ": " + describe(spec));
  Call call(spec);
  ASSERT_EQ(LC_OK, call.make_workspace()) << lc_last_error();
  const size_t enough = call.args.workspace_bytes;
  spoil(call);
  const auto before = call.memory();
  const auto check_message = [&](const char* function) {
    const std::string message = lc_last_error();
    EXPECT_EQ(0u, message.find(argument + ": ")) << function << " says: " << message;
    for (const std::string& part : parts)
      EXPECT_NE(std::string::npos, message.find(part))
          << "'" << part << "' is missing; " << function << " says: " << message;
  };
  EXPECT_EQ(status, lc_run(&call.args));
  check_message("lc_run");
  if (seen_by == SeenBy::both) {
    size_t bytes = enough;
    char text[4096] = "untouched";
    EXPECT_EQ(status, lc_workspace(&call.args, &bytes));
    check_message("lc_workspace");
    EXPECT_EQ(enough, bytes);
    EXPECT_EQ(status, lc_explain(&call.args, text, sizeof text));
    check_message("lc_explain");
    lc_cost cost = {};
    cost.flop = -1;
    EXPECT_EQ(status, lc_predict(&call.args, &cost, sizeof cost));
    check_message("lc_predict");
    EXPECT_EQ(-1, cost.flop);
    EXPECT_STREQ("untouched", text);
  }
  EXPECT_TRUE(before == call.memory()) << "something was written";
}

void invalid(const Spec& spec, const Spoil& spoil, const std::string& argument, const std::vector<std::string>& parts,
             SeenBy seen_by = SeenBy::both, int line = __builtin_LINE()) {
  refused(spec, spoil, LC_INVALID, argument, parts, seen_by, line);
}

// Expects that the call of `spec`, after `change`, is served and equals the definition.
void accepted(const Spec& spec, const Spoil& change = nullptr, int line = __builtin_LINE()) {
  SCOPED_TRACE("line " + std::to_string(line) + ": " + describe(spec));
  Call call(spec);
  if (change) change(call);
  if (call.args.op == LC_BACKWARD) {
    ASSERT_EQ(LC_OK, call.run()) << lc_last_error();
    const Gradients want = reference_gradients(call.args), size = reference_gradients(call.args, true);
    for (const lc_tensor* t : call.written())
      EXPECT_LE(relative_error(values(*t), want.of(call.args, t), size.of(call.args, t)), gradient_tolerance(t->dtype));
    return;
  }
  const Answer answer = reference(call.args);
  ASSERT_EQ(LC_OK, call.run()) << lc_last_error();
  const double o_error = relative_error(values(*call.args.o), answer.o, answer.o);
  EXPECT_LE(o_error, output_tolerance(spec.dtype));
  if (call.args.final_state) {
    const double error = relative_error(values(*call.args.final_state), answer.state, answer.state);
    EXPECT_LE(error, state_tolerance(spec.dtype));
  }
}

Spec with_states() {
  Spec spec;
  spec.initial = spec.final = true;
  return spec;
}

Spec packed() {
  Spec spec = with_states();
  spec.B = 1;
  spec.N = 9;
  spec.cu = {0, 4, 4, 9};
  return spec;
}

Spec decode() {
  Spec spec;
  spec.op = LC_DECODE;
  spec.B = 3;
  spec.N = 1;
  spec.slots = 5;
  spec.indices = {4, -1, 0};
  return spec;
}

Spec backward(Spec spec = with_states()) {
  spec.op = LC_BACKWARD;
  return spec;
}

std::vector<Spec> all_kinds() {
  std::vector<Spec> kinds = {with_states(), packed(), decode(), backward(), backward(packed())};
  for (int i = 0; i < 5; ++i) kinds.push_back(kinds[i]), kinds.back().bnhd = true;
  for (Spec& spec : kinds) spec.decay = Decay::token;
  return kinds;
}

struct Named {
  const char* name;
  Tensor Call::* tensor;
};
constexpr Named kTokenTensors[] = {{"q", &Call::q}, {"k", &Call::k}, {"v", &Call::v}, {"o", &Call::o}};
constexpr Named kAllTensors[] = {{"q", &Call::q},
                                 {"k", &Call::k},
                                 {"v", &Call::v},
                                 {"o", &Call::o},
                                 {"log_decay", &Call::log_decay},
                                 {"initial_state", &Call::initial_state},
                                 {"final_state", &Call::final_state},
                                 {"cu_seqlens", &Call::cu_seqlens},
                                 {"state_indices", &Call::state_indices},
                                 {"d_o", &Call::d_o},
                                 {"d_final_state", &Call::d_final_state},
                                 {"d_q", &Call::d_q},
                                 {"d_k", &Call::d_k},
                                 {"d_v", &Call::d_v},
                                 {"d_log_decay", &Call::d_log_decay},
                                 {"d_initial_state", &Call::d_initial_state}};
// Tensors with an axis that may be broadcast or reversed, but must not overlap.
constexpr Named kGradients[] = {{"d_q", &Call::d_q},
                                {"d_k", &Call::d_k},
                                {"d_v", &Call::d_v},
                                {"d_log_decay", &Call::d_log_decay},
                                {"d_initial_state", &Call::d_initial_state}};

// Every tensor argument of the call of `spec`.
std::vector<Named> tensors(const Spec& spec) {
  Call call(spec);
  std::vector<Named> present;
  for (const Named& t : kAllTensors)
    if (!(call.*t.tensor).memory.empty()) present.push_back(t);
  return present;
}

TEST(Accepts, EveryKindOfCall) {
  accepted(Spec{});
  for (Spec spec : all_kinds()) {
    accepted(spec);
    spec.strided = true;
    accepted(spec);
  }
}

TEST(Accepts, NoTokens) {
  Spec spec = with_states();
  spec.N = 0;
  accepted(spec);
  accepted(spec, [](Call& c) { c.q.data = c.k.data = c.v.data = c.o.data = nullptr; });
  accepted(spec, [](Call& c) { c.q.strides[0] = c.o.strides[1] = int64_t{1} << 62; });  // strides of nothing
  spec.initial = false;
  accepted(spec);
  spec = packed();
  spec.N = 0;
  spec.cu = {0, 0, 0};
  accepted(spec);
}

// Faults in the description of one tensor, for every tensor of every kind of call.
TEST(Refuses, BrokenTensors) {
  for (const Spec& spec : all_kinds()) {
    for (const Named& t : tensors(spec)) {
      const auto broken = [&](const std::vector<std::string>& parts, const std::function<void(Tensor&)>& spoil,
                              lc_status status = LC_INVALID, SeenBy seen_by = SeenBy::both) {
        SCOPED_TRACE(t.name);
        refused(spec, [&](Call& c) { spoil(c.*t.tensor); }, status, t.name, parts, seen_by);
      };
      broken({}, [](Tensor& x) { x.shape = nullptr; });
      broken({"NULL"}, [](Tensor& x) { x.data = nullptr; }, LC_INVALID, SeenBy::run_only);
      broken({}, [](Tensor& x) { x.ndim = 5; });
      for (int ndim : {-1, 1000, std::numeric_limits<int>::max(), std::numeric_limits<int>::min()})
        broken({std::to_string(ndim)}, [&](Tensor& x) { x.ndim = ndim; });
      for (int64_t size : {int64_t{-1}, std::numeric_limits<int64_t>::min()})
        for (int axis = 0; axis < (Call(spec).*t.tensor).ndim; ++axis)
          broken({std::to_string(size)}, [&](Tensor& x) { x.shape[axis] = size; });
      broken({"lanes"}, [](Tensor& x) { x.dtype.lanes = 2; }, LC_DTYPE);
      broken({"float8"}, [](Tensor& x) { x.dtype = {LC_FLOAT, 8, 1}; }, LC_DTYPE);
      broken({"77"}, [](Tensor& x) { x.dtype.code = 77; }, LC_DTYPE);
      broken({"77"}, [](Tensor& x) { x.device.type = 77; });
      if (t.tensor != &Call::q) broken({"CUDA"}, [](Tensor& x) { x.device.type = LC_CUDA; });
      broken({"multiple of"}, [](Tensor& x) { x.byte_offset += 1; }, LC_INVALID, SeenBy::run_only);
    }
  }
}

TEST(Refuses, MissingTensors) {
  for (const Spec& spec : all_kinds()) {
    invalid(spec, [](Call& c) { c.args.q = nullptr; }, "q", {});
    invalid(spec, [](Call& c) { c.args.k = nullptr; }, "k", {});
    invalid(spec, [](Call& c) { c.args.v = nullptr; }, "v", {});
    if (spec.op != LC_BACKWARD) invalid(spec, [](Call& c) { c.args.o = nullptr; }, "o", {}, SeenBy::run_only);
    if (spec.op == LC_DECODE) invalid(spec, [](Call& c) { c.args.final_state = nullptr; }, "final_state", {});
  }
}

TEST(Refuses, Shapes) {
  for (const Spec& spec : all_kinds()) {
    const int head_axis = spec.bnhd ? 2 : 1;
    for (const Named& t : tensors(spec)) {
      SCOPED_TRACE(t.name);
      const Call right(spec);
      const Tensor& tensor = right.*t.tensor;
      for (int axis = 0; axis < tensor.ndim; ++axis) {
        if (t.tensor == &Call::q) continue;                                             // B, N and K are what q says
        if (t.tensor == &Call::v && axis == 3) continue;                                // V is what v says
        if (t.tensor == &Call::cu_seqlens) continue;                                    // S is what it says
        if (t.tensor == &Call::final_state && !axis && spec.op == LC_DECODE) continue;  // a pool may be of any size
        if ((t.tensor == &Call::k || t.tensor == &Call::v) && axis == head_axis)
          continue;  // below: heads that do not divide
        for (int64_t wrong : {tensor.shape[axis] - 1, tensor.shape[axis] + 1, std::numeric_limits<int64_t>::max()})
          invalid(spec, [&](Call& c) { (c.*t.tensor).shape[axis] = wrong; }, t.name,
                  {std::to_string(tensor.shape[axis]), std::to_string(wrong)});
      }
      for (int fewer = 0; fewer < tensor.ndim; ++fewer) {
        if (t.tensor == &Call::log_decay) continue;
        invalid(spec, [&](Call& c) { (c.*t.tensor).ndim = fewer; }, t.name, {});
      }
    }
  }
}

TEST(Refuses, LogDecayShapes) {
  for (Decay decay : {Decay::head, Decay::batch, Decay::token}) {
    Spec spec;
    spec.decay = decay;
    const int rank = static_cast<int>(decay) - 1;
    for (int axis = 0; axis < rank; ++axis) {
      invalid(spec, [&](Call& c) { c.log_decay.shape[axis] = 1; }, "log_decay", {"1"});
      invalid(spec, [&](Call& c) { c.log_decay.shape[axis] += 1; }, "log_decay", {std::to_string(axis < 2 ? 3 : 6)});
    }
  }
  Spec spec;
  spec.decay = Decay::token;
  invalid(spec, [](Call& c) { std::swap(c.log_decay.shape[1], c.log_decay.shape[2]); }, "log_decay",
          {"[2, 5, 2]", "[2, 2, 5]"});
  spec.bnhd = true;
  invalid(spec, [](Call& c) { std::swap(c.log_decay.shape[1], c.log_decay.shape[2]); }, "log_decay",
          {"[2, 2, 5]", "[2, 5, 2]"});
  invalid(spec, [](Call& c) { c.log_decay.ndim = 4; }, "log_decay", {});
}

TEST(Refuses, HeadCountsThatDoNotDivide) {
  const auto heads = [](int64_t Hq, int64_t Hk, int64_t Hv) {
    Spec spec = with_states();
    spec.heads(Hq, Hk, Hv);
    return spec;
  };
  struct {
    int64_t Hq, Hk, Hv;
    const char* argument;
    std::vector<std::string> parts;
  } const wrong[] = {
      {4, 3, 1, "k", {"3", "4"}},  {4, 1, 3, "v", {"3", "4"}},  {3, 4, 2, "q", {"3", "4"}}, {3, 2, 4, "q", {"3", "4"}},
      {12, 4, 6, "k", {"4", "6"}}, {12, 6, 4, "v", {"4", "6"}}, {6, 2, 3, "k", {"2", "3"}},
  };
  for (const auto& w : wrong) {
    for (bool bnhd : {false, true}) {
      SCOPED_TRACE("heads " + std::to_string(w.Hq) + " " + std::to_string(w.Hk) + " " + std::to_string(w.Hv));
      Spec spec = heads(w.Hq, w.Hk, w.Hv);
      spec.bnhd = bnhd;
      Call call(spec);
      const auto before = call.memory();
      EXPECT_EQ(LC_INVALID, lc_run(&call.args));
      const std::string message = lc_last_error();
      EXPECT_EQ(0u, message.find(std::string(w.argument) + ": ")) << message;
      for (const std::string& part : w.parts) EXPECT_NE(std::string::npos, message.find(part)) << message;
      EXPECT_TRUE(before == call.memory());
    }
  }
  const int64_t right[][3] = {{4, 2, 1}, {4, 1, 2}, {1, 4, 2}, {2, 4, 4}, {2, 2, 4}, {1, 1, 4},
                              {6, 3, 1}, {6, 3, 3}, {6, 1, 1}, {1, 4, 1}, {2, 4, 1}, {12, 6, 3}};
  for (const auto& r : right)
    for (Decay decay : {Decay::head, Decay::token}) {
      Spec spec = heads(r[0], r[1], r[2]);
      spec.decay = decay;
      accepted(spec);
    }
}

TEST(Refuses, Dtypes) {
  const lc_dtype all[] = {kF64, kF32, kF16, kBf16, kI32, kI64};
  for (lc_dtype inputs : {kF64, kF32, kF16, kBf16}) {
    for (Spec spec : all_kinds()) {
      spec.dtype = inputs;
      accepted(spec);
      const bool is_decode = spec.op == LC_DECODE;
      const lc_dtype wide = inputs == kF64 ? kF64 : kF32;
      for (const Named& t : tensors(spec)) {
        SCOPED_TRACE(t.name);
        const std::string n = t.name;
        for (lc_dtype wrong : all) {
          if (wrong == (Call(spec).*t.tensor).dtype) continue;
          if (n == "log_decay" && (wrong == kF32 || wrong == wide)) continue;  // may be either with float64 inputs
          if (n == "final_state" && is_decode && inputs != kF64 && (wrong == kF16 || wrong == kBf16)) continue;
          if ((n == "cu_seqlens" || n == "state_indices") && wrong == kI64) continue;
          const bool says_what = n == "q" && !(wrong == kI32 || wrong == kI64);
          const std::string given = wrong == kBf16  ? "bfloat16"
                                    : wrong == kI32 ? "int32"
                                    : wrong == kI64 ? "int64"
                                                    : "float" + std::to_string(wrong.bits);
          // q sets the dtype of the others: with another one, the others are wrong.
          refused(spec, [&](Call& c) { (c.*t.tensor).dtype = wrong; }, LC_DTYPE, says_what ? "k" : n, {given});
        }
      }
    }
  }
}

TEST(Accepts, Float32DecayOfFloat64Inputs) {
  Spec spec;
  spec.dtype = kF64;
  accepted(spec, [](Call& c) {
    c.log_decay.make(kF32, {2});
    c.log_decay.fill([] { return -0.25; });
  });
}

TEST(Refuses, LastDimensionsThatAreNotContiguous) {
  for (const Spec& spec : all_kinds()) {
    for (const Named& t : tensors(spec)) {
      if ((Call(spec).*t.tensor).ndim != 4) continue;
      for (int64_t stride : {0, 2, -1})
        invalid(spec, [&](Call& c) { (c.*t.tensor).strides[3] = stride; }, t.name, {"contiguous"});
    }
  }
}

TEST(Accepts, BroadcastAndReversedInputs) {
  Spec spec = with_states();
  spec.decay = Decay::token;
  for (Tensor Call::* tensor : {&Call::q, &Call::k, &Call::v, &Call::initial_state, &Call::log_decay}) {
    for (int axis = 0; axis < 3; ++axis) {
      accepted(spec, [&](Call& c) { (c.*tensor).strides[axis] = 0; });
      accepted(spec, [&](Call& c) {
        Tensor& t = c.*tensor;
        t.byte_offset += (t.shape[axis] - 1) * t.strides[axis] * (t.dtype.bits / 8);
        t.strides[axis] *= -1;
      });
    }
  }
  for (Tensor Call::* tensor : {&Call::o, &Call::final_state})
    for (int axis = 0; axis < 3; ++axis)
      accepted(spec, [&](Call& c) {
        Tensor& t = c.*tensor;
        t.byte_offset += (t.shape[axis] - 1) * t.strides[axis] * (t.dtype.bits / 8);
        t.strides[axis] *= -1;
      });
}

TEST(Refuses, OutputsThatOverlapThemselves) {
  for (const Spec& spec : {with_states(), decode()}) {
    for (int axis = 0; axis < 3; ++axis) {
      if (Call(spec).o.shape[axis] > 1)
        invalid(spec, [&](Call& c) { c.o.strides[axis] = 0; }, "o", {"overlap"}, SeenBy::run_only);
      invalid(spec, [&](Call& c) { c.final_state.strides[axis] = 0; }, "final_state", {"overlap"}, SeenBy::run_only);
    }
    invalid(
        spec, [&](Call& c) { c.final_state.strides[2] = spec.V - 1; }, "final_state", {"overlap"}, SeenBy::run_only);
    invalid(spec, [&](Call& c) { c.o.strides[1] = spec.N * spec.V - 1; }, "o", {"overlap"}, SeenBy::run_only);
  }
}

TEST(Refuses, OutputsOverInputs) {
  // A buffer that holds any of the tensors at any of the offsets.
  std::vector<double> buffer(4096);
  const auto move = [&](Tensor& t, size_t bytes) {
    std::memcpy(reinterpret_cast<char*>(buffer.data()) + bytes, static_cast<char*>(t.data) + t.byte_offset,
                t.memory.size() - 2 * Tensor::kGuard);
    t.data = reinterpret_cast<char*>(buffer.data()) + bytes;
    t.byte_offset = 0;
  };
  for (Spec spec : {with_states(), packed(), decode()}) {
    spec.decay = Decay::token;
    for (const Named& t : tensors(spec)) {
      for (Tensor Call::* output : {&Call::o, &Call::final_state}) {
        if (t.tensor == output) continue;
        const bool both_written = t.tensor == &Call::o || t.tensor == &Call::final_state;
        for (size_t shift : {0, 64}) {
          if (t.tensor == &Call::initial_state && output == &Call::final_state && !shift) continue;  // in place
          SCOPED_TRACE(t.name);
          Call call(spec);
          ASSERT_EQ(LC_OK, call.make_workspace()) << lc_last_error();
          // The input begins `shift` bytes after the output.
          move(call.*output, 0);
          const size_t longest = (call.*output).memory.size() - 2 * Tensor::kGuard;
          move(call.*t.tensor, std::min(shift, longest - 8));
          if (t.tensor == &Call::cu_seqlens) Call::fill(call.cu_seqlens, spec.cu);
          if (t.tensor == &Call::state_indices) Call::fill(call.state_indices, spec.indices);
          if (t.tensor == &Call::log_decay) call.log_decay.fill([] { return -1.0; });
          const auto before = buffer;
          EXPECT_EQ(LC_INVALID, lc_run(&call.args));
          const std::string message = lc_last_error(), name = output == &Call::o ? "o" : "final_state";
          const bool named =
              message.find(name + ": ") == 0 || (both_written && message.find(std::string(t.name) + ": ") == 0);
          EXPECT_TRUE(named) << message;
          EXPECT_NE(std::string::npos, message.find("overlap")) << message;
          EXPECT_NE(std::string::npos, message.find(t.name)) << message;
          EXPECT_EQ(0, std::memcmp(before.data(), buffer.data(), buffer.size() * sizeof(double)));
        }
      }
    }
  }
}

// One lc_tensor is two arguments of a call.
TEST(Refuses, OneTensorAsInputAndOutput) {
  Spec spec = with_states();
  spec.dtype = kF32;
  spec.N = spec.K = spec.V;  // all of one shape
  const lc_tensor* lc_args::* const inputs[] = {&lc_args::q, &lc_args::k, &lc_args::v, &lc_args::initial_state,
                                                &lc_args::final_state};
  for (const lc_tensor* lc_args::* input : inputs)
    invalid(spec, [&](Call& c) { c.args.o = c.args.*input; }, "o", {"overlap"}, SeenBy::run_only);
  for (const lc_tensor* lc_args::* input : {&lc_args::q, &lc_args::k, &lc_args::v})
    invalid(spec, [&](Call& c) { c.args.final_state = c.args.*input; }, "final_state", {"overlap"}, SeenBy::run_only);
}

TEST(Accepts, InPlaceStates) {
  Spec spec;
  spec.in_place = true;
  for (bool strided : {false, true}) {
    spec.strided = strided;
    accepted(spec);
  }
  spec = packed();
  spec.in_place = true;
  accepted(spec);
  // Two tensors have the same memory.
  accepted(with_states(), [](Call& c) {
    c.final_state.data = c.initial_state.data;
    c.final_state.byte_offset = c.initial_state.byte_offset;
  });
}

TEST(Refuses, StatesShiftedAgainstEachOther) {
  const Spec spec = with_states();
  for (int64_t bytes : {4, 48, -48})
    invalid(
        spec, [&](Call& c) { c.final_state.data = static_cast<char*>(c.initial_state.data) + bytes; }, "final_state",
        {"initial_state"}, SeenBy::run_only);
  // The tensors have the same first element, but heads and sequences change places.
  invalid(
      spec,
      [](Call& c) {
        c.final_state.data = c.initial_state.data;
        std::swap(c.final_state.strides[0], c.final_state.strides[1]);
      },
      "final_state", {"initial_state"}, SeenBy::run_only);
}

// q, k, v and o as columns of one row per token: their memory interleaves but no element is shared.
TEST(Accepts, ViewsOfOneFusedBuffer) {
  for (bool bnhd : {false, true}) {
    Spec spec;
    spec.K = spec.V = 4;
    spec.bnhd = bnhd;
    constexpr int64_t H = 2, D = 4, row = 4 * H * D;
    std::vector<float> fused(spec.B * spec.N * row);
    for (size_t i = 0; i < fused.size(); ++i) fused[i] = std::sin(static_cast<float>(i));
    const auto columns = [&](Call& c, int64_t sequence_stride, int64_t o_shift) {
      int64_t column = 0;
      for (Tensor* t : {&c.q, &c.k, &c.v, &c.o}) {
        t->data = fused.data() + column + (t == &c.o ? o_shift : 0);
        t->strides[0] = sequence_stride;
        t->strides[bnhd ? 1 : 2] = row;
        t->strides[bnhd ? 2 : 1] = D;
        column += H * D;
      }
    };
    accepted(spec, [&](Call& c) { columns(c, spec.N * row, 0); });
    // o begins half a head early: half of its first head belongs to v.
    const std::vector<float> before = fused;
    invalid(spec, [&](Call& c) { columns(c, spec.N * row, -D / 2); }, "o", {"overlap", "v"}, SeenBy::run_only);
    EXPECT_EQ(before, fused);
    spec.B = 1;  // whose stride means nothing
    accepted(spec, [&](Call& c) { columns(c, std::numeric_limits<int64_t>::max(), 0); });
  }
}

TEST(Refuses, SizesThatOverflow) {
  constexpr int64_t huge = int64_t{1} << 62;
  Spec spec;
  spec.decay = Decay::none;
  // All tensors have N = 2^62 tokens, more than an address space holds.
  for (bool dense : {false, true})
    invalid(spec,
            [&](Call& c) {
              for (Tensor* t : {&c.q, &c.k, &c.v, &c.o}) {
                t->shape[2] = huge;
                if (dense) t->strides = nullptr;
              }
            },
            "q", {});
  // With these strides the extent has more than 127 bits.
  invalid(spec,
          [&](Call& c) {
            for (Tensor* t : {&c.q, &c.k, &c.v, &c.o}) {
              t->shape[2] = huge / 4;
              t->strides[2] = std::numeric_limits<int64_t>::max();
            }
          },
          "q", {});
  for (const Named& t : kTokenTensors)
    for (int64_t stride : {huge, -huge, std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()})
      invalid(spec, [&](Call& c) { (c.*t.tensor).strides[0] = stride; }, t.name, {});
}

TEST(Refuses, PositiveOrNanLogDecay) {
  for (lc_dtype inputs : {kF32, kF64}) {
    for (Decay decay : {Decay::scalar, Decay::head, Decay::batch, Decay::token}) {
      for (bool bnhd : {false, true}) {
        for (bool strided : {false, true}) {
          Spec spec;
          spec.B = 3;
          spec.N = 7;
          spec.dtype = inputs;
          spec.decay = decay;
          spec.bnhd = bnhd;
          spec.strided = strided;
          std::vector<Position> positions;
          Call call(spec);
          for_each_element(call.log_decay, [&](const Position& i) { positions.push_back(i); });
          for (const Position& position : positions)
            for (double bad : {1e-30, 0.5, kInf, kNan})
              invalid(
                  spec, [&](Call& c) { store(at(c.log_decay, position), c.log_decay.dtype, bad); }, "log_decay", {},
                  SeenBy::run_only);
          for (double good : {-kInf, -0.0, -1e30})
            accepted(spec, [&](Call& c) { store(at(c.log_decay, positions.back()), c.log_decay.dtype, good); });
        }
      }
    }
  }
}

TEST(Refuses, CuSeqlens) {
  for (lc_dtype type : {kI32, kI64}) {
    Spec spec = packed();
    spec.cu_dtype = type;
    accepted(spec);
    const auto values = [&](const Index& cu, const std::vector<std::string>& parts) {
      invalid(spec, [&](Call& c) { Call::fill(c.cu_seqlens, cu); }, "cu_seqlens", parts, SeenBy::run_only);
    };
    values({1, 4, 4, 9}, {"1"});
    values({0, 4, 4, 8}, {"8", "9"});
    values({0, 4, 4, 10}, {"10", "9"});
    values({0, 5, 4, 9}, {"4"});
    values({0, -1, 4, 9}, {"-1"});
    values({0, 10, 9, 9}, {});
    values({0, 4, 20, 9}, {});
    if (type == kI64) {
      values({0, 4, 4, int64_t{9} + (int64_t{1} << 32)}, {});
      values({0, int64_t{1} << 32, 4, 9}, {});
    }
    invalid(spec, [](Call& c) { c.cu_seqlens.ndim = 2; }, "cu_seqlens", {});
    invalid(spec, [](Call& c) { c.cu_seqlens.ndim = 0; }, "cu_seqlens", {});
    invalid(spec, [](Call& c) { c.cu_seqlens.shape[0] = 0; }, "cu_seqlens", {});
  }
  // Packed sequences require B = 1.
  Spec spec = with_states();
  Tensor cu;
  cu.make(kI32, {3});
  Call::fill(cu, {0, 2, 5});
  Call call(spec);
  call.args.cu_seqlens = &cu;
  EXPECT_EQ(LC_INVALID, lc_run(&call.args));
  EXPECT_NE(nullptr, std::strstr(lc_last_error(), "cu_seqlens")) << lc_last_error();
}

TEST(Refuses, WhatDecodeDoesNotTake) {
  const Spec spec = decode();
  accepted(spec);
  Spec plain = spec;  // slot b for sequence b
  plain.indices = {};
  accepted(plain);
  plain.slots = 2;
  Call few(plain);
  EXPECT_EQ(LC_INVALID, lc_run(&few.args));
  EXPECT_EQ(0, std::strncmp(lc_last_error(), "final_state: ", 13)) << lc_last_error();

  Call other(packed());
  invalid(spec, [&](Call& c) { c.args.initial_state = &c.final_state; }, "initial_state", {});
  invalid(spec, [&](Call& c) { c.args.cu_seqlens = &other.cu_seqlens; }, "cu_seqlens", {});
  Call indexed(spec);
  invalid(with_states(), [&](Call& c) { c.args.state_indices = &indexed.state_indices; }, "state_indices", {});

  const auto values = [&](const Index& indices, const std::vector<std::string>& parts) {
    invalid(spec, [&](Call& c) { Call::fill(c.state_indices, indices); }, "state_indices", parts, SeenBy::run_only);
  };
  values({0, 3, 0}, {"0"});
  values({2, 2, -1}, {"2"});
  values({0, 5, 1}, {"5"});
  values({-2, 0, 1}, {"-2"});
  values({0, 1, std::numeric_limits<int32_t>::max()}, {std::to_string(std::numeric_limits<int32_t>::max())});
  values({0, 1, std::numeric_limits<int32_t>::min()}, {std::to_string(std::numeric_limits<int32_t>::min())});

  Spec skipped = spec;
  skipped.indices = {-1, -1, -1};
  accepted(skipped);
  for (lc_dtype pool : {kF16, kBf16}) {
    Spec narrow = spec;
    narrow.pool = pool;
    Call rounded(narrow);
    const Answer answer = reference(rounded.args);
    ASSERT_EQ(LC_OK, rounded.run()) << lc_last_error();
    EXPECT_LE(relative_error(test::values(rounded.final_state), answer.state, answer.state), state_tolerance(pool));
    EXPECT_LE(relative_error(test::values(rounded.o), answer.o, answer.o), output_tolerance(kF32));
  }
}

TEST(Refuses, Scalars) {
  for (const Spec& spec : all_kinds()) {
    for (double scale : {kNan, kInf, -kInf}) invalid(spec, [&](Call& c) { c.args.scale = scale; }, "scale", {});
    invalid(spec, [](Call& c) { c.args.method = "quickest"; }, "method",
            {"quickest", "chunk", "recurrent", "parallel"});
    invalid(spec, [](Call& c) { c.args.method = ""; }, "method", {"chunk", "recurrent", "parallel"});
    for (int op : {-1, 3, 1000}) invalid(spec, [&](Call& c) { c.args.op = op; }, "op", {std::to_string(op)});
    for (uint32_t flag : {4u, 1u << 31}) invalid(spec, [&](Call& c) { c.args.flags |= flag; }, "flags", {});
    invalid(spec, [](Call& c) { c.args.reserved = 5; }, "reserved", {"5"});
    invalid(spec, [](Call& c) { c.args.stream = &c; }, "stream", {});
  }
  Spec spec;
  for (double scale : {0.0, -3.0, 1e-300}) {
    spec.scale = scale;
    accepted(spec);
  }
}

TEST(Refuses, WhatBackwardDoesNotTake) {
  const Spec spec = backward();
  Call other(with_states());
  invalid(spec, [&](Call& c) { c.args.o = &other.o; }, "o", {"LC_FORWARD"});
  invalid(spec, [&](Call& c) { c.args.final_state = &other.final_state; }, "final_state", {"LC_FORWARD"});
  Call indexed(decode());
  invalid(spec, [&](Call& c) { c.args.state_indices = &indexed.state_indices; }, "state_indices", {"LC_DECODE"});
  invalid(spec, [](Call& c) { c.args.d_o = c.args.d_final_state = nullptr; }, "d_o", {"d_final_state"});
  invalid(spec,
          [](Call& c) { c.args.d_q = c.args.d_k = c.args.d_v = c.args.d_log_decay = c.args.d_initial_state = nullptr; },
          "d_q", {"at least one", "d_initial_state"});
  invalid(spec, [](Call& c) { c.args.log_decay = nullptr; }, "d_log_decay", {"log_decay is absent"});

  // The other operations have no gradients.
  Call gradients(spec);
  for (const lc_tensor* lc_args::* member : {&lc_args::d_o, &lc_args::d_final_state, &lc_args::d_q, &lc_args::d_k,
                                             &lc_args::d_v, &lc_args::d_log_decay, &lc_args::d_initial_state})
    for (const Spec& wrong : {with_states(), decode()}) {
      Call call(wrong);
      call.args.*member = gradients.args.*member;
      EXPECT_EQ(LC_INVALID, lc_run(&call.args));
      EXPECT_EQ(0, std::strncmp(lc_last_error(), "d_", 2)) << lc_last_error();
      EXPECT_NE(nullptr, std::strstr(lc_last_error(), "LC_BACKWARD")) << lc_last_error();
    }
}

TEST(Refuses, DLogDecayUnlikeLogDecay) {
  for (Decay decay : {Decay::scalar, Decay::head, Decay::batch, Decay::token}) {
    Spec spec = backward();
    spec.decay = decay;
    accepted(spec);
    for (Decay other : {Decay::scalar, Decay::head, Decay::batch, Decay::token}) {
      if (other == decay) continue;
      Spec wrong = spec;
      wrong.decay = other;
      Call donor(wrong);
      invalid(spec, [&](Call& c) { c.args.d_log_decay = &donor.d_log_decay; }, "d_log_decay", {"expected shape"});
    }
  }
  // The dtype of d_log_decay is the dtype of log_decay.
  Spec spec = backward();
  spec.dtype = kF64;
  refused(spec, [](Call& c) { c.log_decay.make(kF32, {2}), c.log_decay.fill([] { return -0.25; }); }, LC_DTYPE,
          "d_log_decay", {"float32", "float64"});
  accepted(spec, [](Call& c) {
    for (Tensor* t : {&c.log_decay, &c.d_log_decay}) t->make(kF32, {2});
    c.log_decay.fill([] { return -0.25; });
  });
}

TEST(Refuses, GradientsOverOneAnother) {
  Spec spec = backward();
  spec.dtype = kF32;
  spec.N = spec.K = spec.V;  // all of one shape
  const lc_tensor* lc_args::* const inputs[] = {
      &lc_args::q, &lc_args::k, &lc_args::v, &lc_args::d_o, &lc_args::d_final_state, &lc_args::initial_state};
  const struct {
    const char* name;
    const lc_tensor* lc_args::* member;
  } outputs[] = {{"d_q", &lc_args::d_q},
                 {"d_k", &lc_args::d_k},
                 {"d_v", &lc_args::d_v},
                 {"d_initial_state", &lc_args::d_initial_state}};
  for (const auto& output : outputs) {
    for (const lc_tensor* lc_args::* input : inputs)
      invalid(
          spec, [&](Call& c) { c.args.*output.member = c.args.*input; }, output.name, {"overlap"}, SeenBy::run_only);
    for (const auto& other : outputs) {
      if (&other <= &output) continue;
      invalid(
          spec, [&](Call& c) { c.args.*output.member = c.args.*other.member; }, output.name, {"overlap", other.name},
          SeenBy::run_only);
    }
  }
  spec.decay = Decay::batch;
  invalid(
      spec, [](Call& c) { c.args.d_log_decay = c.args.log_decay; }, "d_log_decay", {"overlap", "log_decay"},
      SeenBy::run_only);
  for (const Named& t : kGradients)
    for (int axis = 0; axis < std::min(3, (Call(spec).*t.tensor).ndim); ++axis)
      invalid(spec, [&](Call& c) { (c.*t.tensor).strides[axis] = 0; }, t.name, {"overlap"}, SeenBy::run_only);
}

TEST(Accepts, ReversedGradients) {
  for (Decay decay : {Decay::batch, Decay::token}) {
    Spec spec = backward();
    spec.decay = decay;
    for (const Named& named : kGradients)
      for (int axis = 0; axis < std::min(3, (Call(spec).*named.tensor).ndim); ++axis)
        accepted(spec, [&](Call& c) {
          Tensor& t = c.*named.tensor;
          t.byte_offset += (t.shape[axis] - 1) * t.strides[axis] * (t.dtype.bits / 8);
          t.strides[axis] *= -1;
        });
  }
}

TEST(Refuses, WhatNoMethodServes) {
  for (const char* method : {"recurrent", "parallel", "block", "recursive", "scan", "fleet", "fft"})
    refused(backward(), [&](Call& c) { c.args.method = method; }, LC_UNSUPPORTED, "method",
            {method, "gradients", "chunk: serves it"});
  refused(decode(), [](Call& c) { c.args.method = "chunk"; }, LC_UNSUPPORTED, "method", {"chunk", "recurrent"});
  refused(decode(), [](Call& c) { c.args.method = "parallel"; }, LC_UNSUPPORTED, "method", {"parallel", "recurrent"});
}

TEST(Refuses, Workspaces) {
  Spec spec = with_states();
  spec.N = 300, spec.K = spec.V = 64;
  int with_scratch = 0;
  for (int i = 0; const lc_method_info* m = lc_method(i); ++i) {
    Call call(spec);
    call.args.method = m->name;
    ASSERT_EQ(LC_OK, call.make_workspace()) << lc_last_error();
    if (!call.args.workspace_bytes) continue;
    ++with_scratch;
    const auto memory = [&](const Spoil& spoil, const std::vector<std::string>& parts) {
      refused(
          spec, [&](Call& c) { c.args.method = m->name, c.make_workspace(), spoil(c); }, LC_MEMORY, "workspace", parts,
          SeenBy::run_only);
    };
    const std::string needed = std::to_string(call.args.workspace_bytes);
    memory([](Call& c) { c.args.workspace_bytes = 0; }, {needed, "0"});
    memory([](Call& c) { c.args.workspace_bytes -= 1; }, {needed, std::to_string(call.args.workspace_bytes - 1)});
    memory([](Call& c) { c.args.workspace = nullptr; }, {});
    memory([](Call& c) { c.args.workspace = static_cast<char*>(c.args.workspace) + 8; }, {"64"});
  }
  EXPECT_GT(with_scratch, 0);
}

}  // namespace
