// fuzz_test.cpp - random calls, most of them valid calls with a few random changes. No call may
// crash. Each one returns a listed status. A refusal names an argument and writes nothing. An
// accepted call agrees with the definition. One file: the random calls and their checks are one
// program.
//
// LEETCORE_FUZZ_SECONDS (2) and LEETCORE_FUZZ_SEED (1) set the length and the seed.
//
// A library cannot know how much memory is at a pointer. If a call would reach outside of the
// memory of its tensors, all its data pointers are replaced by an address that must not be touched,
// and only the call's structure is checked.
#include <gtest/gtest.h>

#include <chrono>
#include <iostream>
#include <map>

#include "call.h"

namespace {

using namespace test;

double number_from(const char* variable, double otherwise) {
  const char* text = std::getenv(variable);
  return text && *text ? std::atof(text) : otherwise;
}

class Fuzz {
 public:
  explicit Fuzz(unsigned seed) : random_(seed) {}

  void step();

  std::map<lc_status, int64_t> status_counts;  // results of lc_run
  int64_t compared = 0;                        // calls that were compared with the definition

 private:
  int64_t below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  bool chance(int one_in) { return below(one_in) == 0; }
  template <class T>
  T among(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<int64_t>(choices.size()))];
  }

  int64_t odd_number() {
    constexpr int64_t max = std::numeric_limits<int64_t>::max(), min = std::numeric_limits<int64_t>::min();
    switch (below(5)) {
      case 0:
        return among<int64_t>({0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24});
      case 1:
        return -among<int64_t>({1, 2, 4, 8, 16, 24});
      case 2:
        return among<int64_t>({max, min, max - 1, min + 1, max / 2, max / 3, int64_t{1} << 32, int64_t{1} << 62});
      case 3:
        return int64_t{1} << below(63);
      default:
        return static_cast<int64_t>(random_()) >> below(64);
    }
  }

  Spec random_spec();
  void change(Call& call);
  void change(Tensor& t);
  void change_values(Call& call);

  std::mt19937_64 random_;
};

Spec Fuzz::random_spec() {
  Spec s;
  s.op = among({LC_FORWARD, LC_BACKWARD, LC_DECODE});
  s.B = below(4);
  const int64_t Hs = 1 + below(4), divisor = among<int64_t>({1, Hs});
  s.Hk = Hs;
  s.Hv = divisor;
  if (chance(2)) std::swap(s.Hk, s.Hv);
  s.Hq = among<int64_t>({1, Hs, 2 * Hs});
  s.N = below(7);
  s.K = 1 + below(6);
  s.V = 1 + below(6);
  s.dtype = among({kF64, kF32, kF16, kBf16});
  s.decay = among({Decay::none, Decay::scalar, Decay::head, Decay::batch, Decay::token});
  s.scale = among({1.0, -0.5, 0.0, 0.25});
  s.bnhd = chance(2);
  s.strided = chance(2);
  s.dt = s.decay != Decay::token && chance(3);
  s.softplus = chance(2);
  s.dt_min = among({0.0, 0.0, 0.1});
  s.dt_max = among({0.0, 0.5});
  s.transposed = chance(4);
  if (s.op != LC_BACKWARD) {
    s.skip = static_cast<int>(below(3));
    s.gate = chance(3);
  }
  if (s.op == LC_DECODE) {
    s.slots = s.B + below(3);
    if (!s.slots) s.slots = 1;
    if (s.dtype != kF64) s.pool = among({kF32, kF16, kBf16});
    if (s.B && chance(2)) {
      for (int64_t b = 0; b < s.slots; ++b) s.indices.push_back(b);
      std::shuffle(s.indices.begin(), s.indices.end(), random_);
      s.indices.resize(s.B);
      s.index_dtype = among({kI32, kI64});
      if (chance(2)) s.indices[below(s.B)] = -1;
    }
  } else {
    s.initial = chance(2);
    s.final = chance(2);
    s.in_place = s.op == LC_FORWARD && chance(4);
    if (s.op == LC_BACKWARD) {
      s.d_o = !s.final || chance(2);
      s.wants = static_cast<unsigned>(1 + below(s.dt ? 63 : 31));
      if (s.decay == Decay::none) s.wants = s.wants & ~8u ? s.wants & ~8u : 1;
    }
    if (chance(3)) {
      s.B = 1;
      s.cu = {0};
      for (int64_t sequences = below(4); sequences > 0; --sequences) s.cu.push_back(below(s.N + 1));
      s.cu.push_back(s.N);
      std::sort(s.cu.begin(), s.cu.end());
      s.cu_dtype = among({kI32, kI64});
    }
  }
  return s;
}

void Fuzz::change(Tensor& t) {
  const int axis = static_cast<int>(below(5));
  switch (below(9)) {
    case 0:
      t.sizes[axis] = odd_number();
      break;
    case 1:
      t.sizes[axis] += among<int64_t>({-1, 1});
      break;
    case 2:
      t.steps[axis] = odd_number();
      break;
    case 3:
      t.strides = nullptr;
      break;
    case 4:
      t.dtype = {static_cast<uint8_t>(below(8)), among<uint8_t>({0, 1, 8, 16, 32, 64, 128, 255}),
                 among<uint16_t>({0, 1, 1, 1, 2})};
      break;
    case 5:
      t.device = {among<int32_t>({LC_CPU, LC_CUDA, 0, 3, 19, -1, 1 << 30}), among({0, 0, 1, -1, 1 << 30})};
      break;
    case 6:
      t.ndim = among({-1, 0, 1, 2, 3, 4, 5, 8, 1000, std::numeric_limits<int>::max(), std::numeric_limits<int>::min()});
      break;
    case 7:
      if (chance(2))
        t.data = nullptr;
      else
        t.shape = nullptr;
      break;
    default:
      t.byte_offset += static_cast<uint64_t>(among<int64_t>({1, 2, 4, 8, 16, -4, -1}));
      break;
  }
}

void Fuzz::change(Call& call) {
  lc_args& a = call.args;
  const lc_tensor** const members[] = {&a.q,
                                       &a.k,
                                       &a.v,
                                       &a.log_decay,
                                       &a.initial_state,
                                       &a.state_indices,
                                       &a.cu_seqlens,
                                       &a.o,
                                       &a.final_state,
                                       &a.d_o,
                                       &a.d_final_state,
                                       &a.d_q,
                                       &a.d_k,
                                       &a.d_v,
                                       &a.d_log_decay,
                                       &a.d_initial_state,
                                       &a.dt,
                                       &a.dt_bias,
                                       &a.skip,
                                       &a.gate,
                                       &a.d_dt};
  const int64_t usual = 9;
  std::vector<Tensor*> tensors;
  for (Tensor* t : call.tensors())
    if (!t->memory.empty()) tensors.push_back(t);
  switch (below(14)) {
    case 0:
      *members[below(chance(3) ? int64_t(std::size(members)) : usual)] = nullptr;
      break;
    case 1:
      *members[below(chance(3) ? int64_t(std::size(members)) : usual)] =
          tensors[below(static_cast<int64_t>(tensors.size()))];
      break;
    case 2:
      a.op = static_cast<int32_t>(among<int64_t>({0, 1, 2, 3, -1, odd_number()}));
      break;
    case 3:
      a.flags = static_cast<uint32_t>(among<int64_t>({0, 1, 2, 3, 4, odd_number()}));
      break;
    case 4:
      a.method = among<const char*>(
          {"chunk", "recurrent", "parallel", "fleet", "fft", "auto", "", "nonsense", "CHUNK", "%s%n"});
      break;
    case 5:
      a.scale = among({0.0, -1.0, kNan, kInf, -kInf, 2.0});
      break;
    case 6:
      a.struct_size = static_cast<uint32_t>(8 * below(sizeof a / 8 + 1));  // no pointer cut in half
      break;
    case 7:
      if (chance(2))
        a.reserved = static_cast<uint32_t>(below(3));
      else
        a.stream = chance(2) ? &call : nullptr;
      break;
    case 8: {  // one tensor gets the memory of another
      Tensor &x = *tensors[below(static_cast<int64_t>(tensors.size()))],
             &y = *tensors[below(static_cast<int64_t>(tensors.size()))];
      x.data = y.data;
      x.byte_offset = y.byte_offset + static_cast<uint64_t>(among<int64_t>({0, 0, 4, 8, 64}));
      break;
    }
    default:
      change(*tensors[below(static_cast<int64_t>(tensors.size()))]);
  }
}

void Fuzz::change_values(Call& call) {
  const auto one_of = [&](Tensor& t, double x) {
    std::vector<Position> positions;
    for_each_element(t, [&](const Position& i) { positions.push_back(i); });
    if (!positions.empty()) store(at(t, positions[below(static_cast<int64_t>(positions.size()))]), t.dtype, x);
  };
  switch (below(3)) {
    case 0:
      if (call.args.log_decay) one_of(call.log_decay, among({0.0, -kInf, -1e-3, 1e-3, kNan, kInf, -1e30}));
      break;
    case 1:
      if (call.args.cu_seqlens)
        one_of(call.cu_seqlens, static_cast<double>(among<int64_t>({-1, 0, 1, 3, call.spec.N, 1 << 30})));
      break;
    default:
      if (call.args.state_indices)
        one_of(call.state_indices, static_cast<double>(among<int64_t>({-2, -1, 0, 1, 5, 1 << 30})));
  }
}

// Whether every element that `t` describes is in the memory of one of the call's tensors, aligned
// or not.
bool in_bounds(Call& call, const lc_tensor& t) {
  if (t.ndim < 0 || t.ndim > 8 || (t.ndim && !t.shape)) return true;  // describes no element
  __int128 low = 0, high = t.dtype.bits / 8, dense = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] < 0) return true;
    if (t.shape[i] == 0) return true;
    const __int128 stride = t.strides ? __int128{t.strides[i]} : dense;
    const __int128 limit = __int128{1} << 40;
    if (stride > limit || stride < -limit || t.shape[i] > limit) {
      if (t.shape[i] > 1) return false;
    } else {
      const __int128 reach = stride * (t.shape[i] - 1) * (t.dtype.bits / 8);
      (reach < 0 ? low : high) += reach;
      dense *= t.shape[i];
      if (dense > limit) return false;
    }
  }
  if (!t.data) return true;
  const auto first = static_cast<__int128>(reinterpret_cast<uintptr_t>(t.data) + t.byte_offset);
  for (const Tensor* owner : call.tensors()) {
    const auto begin = static_cast<__int128>(reinterpret_cast<uintptr_t>(owner->memory.data()));
    if (first + low >= begin && first + high <= begin + static_cast<__int128>(owner->memory.size())) return true;
  }
  return false;
}

// The part of the arguments that struct_size lets the library see.
lc_args visible(const lc_args& a) {
  lc_args seen = {};
  std::memcpy(&seen, &a, std::min<size_t>(a.struct_size, sizeof a));
  return seen;
}

std::vector<const lc_tensor*> given(const lc_args& a) {
  std::vector<const lc_tensor*> all;
  for (const lc_tensor* t : {a.q,
                             a.k,
                             a.v,
                             a.log_decay,
                             a.initial_state,
                             a.state_indices,
                             a.cu_seqlens,
                             a.o,
                             a.final_state,
                             a.d_o,
                             a.d_final_state,
                             a.d_q,
                             a.d_k,
                             a.d_v,
                             a.d_log_decay,
                             a.d_initial_state,
                             a.dt,
                             a.dt_bias,
                             a.skip,
                             a.gate,
                             a.d_dt})
    if (t) all.push_back(t);
  return all;
}

// Whether a message has the form "name: ..." with a name of lc_args.
bool names_an_argument(const std::string& message) {
  static const char* const names[] = {"args",
                                      "struct_size",
                                      "op",
                                      "method",
                                      "LEETCORE_METHOD",
                                      "scale",
                                      "flags",
                                      "reserved",
                                      "q",
                                      "k",
                                      "v",
                                      "log_decay",
                                      "initial_state",
                                      "state_indices",
                                      "cu_seqlens",
                                      "o",
                                      "final_state",
                                      "d_o",
                                      "d_final_state",
                                      "d_q",
                                      "d_k",
                                      "d_v",
                                      "d_log_decay",
                                      "d_initial_state",
                                      "dt",
                                      "dt_bias",
                                      "dt_min",
                                      "skip",
                                      "gate",
                                      "d_dt",
                                      "workspace",
                                      "stream"};
  const std::string name = message.substr(0, message.find(": "));
  return message.size() > name.size() + 2 && std::find(std::begin(names), std::end(names), name) != std::end(names);
}

// All arguments of a call, for the report of a failure.
std::string describe_arguments(const lc_args& a) {
  std::ostringstream out;
  out << "op " << a.op << ", method " << (a.method ? a.method : "NULL") << ", scale " << a.scale << ", flags "
      << a.flags << ", struct_size " << a.struct_size;
  const std::pair<const char*, const lc_tensor*> members[] = {{"q", a.q},
                                                              {"k", a.k},
                                                              {"v", a.v},
                                                              {"log_decay", a.log_decay},
                                                              {"initial_state", a.initial_state},
                                                              {"state_indices", a.state_indices},
                                                              {"cu_seqlens", a.cu_seqlens},
                                                              {"o", a.o},
                                                              {"final_state", a.final_state}};
  for (const auto& [name, t] : members) {
    if (!t) continue;
    out << "\n  " << name << ": code " << int(t->dtype.code) << ", bits " << int(t->dtype.bits) << ", data " << t->data
        << " + " << static_cast<int64_t>(t->byte_offset) << ", shape";
    for (int i = 0; t->shape && i < t->ndim && i < 8; ++i) out << " " << t->shape[i];
    out << ", strides";
    for (int i = 0; t->strides && i < t->ndim && i < 8; ++i) out << " " << t->strides[i];
  }
  return out.str();
}

// The largest relative error of one number that is rounded to a type of states.
double rounding(lc_dtype t) { return t == kBf16 ? 0x1p-8 : t == kF16 ? 0x1p-11 : state_tolerance(t); }

// The numbers of one gradient, for the report of a failure.
std::string describe_gradient(const lc_args& a, const lc_tensor* t, const std::vector<double>& got,
                              const std::vector<double>& want) {
  std::ostringstream out;
  out << (t == a.d_q ? "d_q" : t == a.d_k ? "d_k" : t == a.d_v ? "d_v" : t == a.d_dt ? "d_dt" : "d_log_decay or state");
  for (size_t i = 0; i < got.size() && i < 16; ++i) out << "\n  " << got[i] << ", expected " << want[i];
  return out.str();
}

void check_status(lc_status status, const std::string& message) {
  switch (status) {
    case LC_OK:
      break;
    case LC_INVALID:
    case LC_DTYPE:
      EXPECT_TRUE(names_an_argument(message)) << message;
      break;
    case LC_MEMORY:
      EXPECT_EQ(0u, message.find("workspace: ")) << message;
      break;
    case LC_UNSUPPORTED:
    case LC_DEVICE:
      EXPECT_FALSE(message.empty()) << status;
      break;
    default:
      ADD_FAILURE() << status << " " << message;
  }
}

// Whether all numbers are of a size that neither overflows nor vanishes in products of any dtype.
// Other numbers occur if memory of one dtype is read as another.
bool tame(const lc_tensor& t) {
  const std::vector<double> x = values(t);
  return std::all_of(x.begin(), x.end(),
                     [](double y) { return y == 0 || (std::fabs(y) > 0x1p-8 && std::fabs(y) < 16); });
}

void Fuzz::step() {
  Call call(random_spec(), static_cast<unsigned>(random_()), true);
  SCOPED_TRACE(describe(call.spec));
  ASSERT_EQ(LC_OK, call.make_workspace()) << "a valid call was refused: " << lc_last_error();
  if (chance(4)) change_values(call);  // before the tensors change
  for (int64_t changes = among<int64_t>({0, 1, 1, 1, 2, 3}); changes > 0; --changes) change(call);

  const lc_args seen = visible(call.args);
  SCOPED_TRACE(describe_arguments(seen));
  bool ours = true;
  for (const lc_tensor* t : given(seen)) ours = ours && in_bounds(call, *t);
  if (!ours)
    for (Tensor* t : call.tensors())
      if (t->data) {
        t->data = reinterpret_cast<void*>(uintptr_t{4096});
        t->byte_offset = 0;
      }

  const auto before = call.memory();
  size_t bytes = 0;
  char text[256];
  std::memset(text, 'x', sizeof text);
  const size_t size = static_cast<size_t>(below(200));
  const lc_status structure = lc_workspace(&call.args, &bytes);
  const std::string why = structure == LC_OK ? "" : lc_last_error();
  lc_cost cost;
  EXPECT_EQ(structure, lc_predict(&call.args, &cost, sizeof cost));
  const lc_status explained = lc_explain(&call.args, text, size);
  EXPECT_TRUE(explained == structure || (explained == LC_INVALID && !size)) << explained << " " << structure;
  EXPECT_EQ('x', text[size]);
  EXPECT_TRUE(before == call.memory()) << "a query wrote something";
  check_status(structure, why);
  const bool refuses_structure = structure == LC_DTYPE || (structure == LC_INVALID && why.compare(0, 8, "method: "));
  if (!ours && !refuses_structure) return;  // lc_run would have to read values

  if (structure == LC_OK && chance(2)) call.make_workspace();  // otherwise: that of the unchanged call
  const lc_status status = lc_run(&call.args);
  const std::string message = status == LC_OK ? "" : lc_last_error();
  ++status_counts[status];
  check_status(status, message);
  if (refuses_structure) {
    EXPECT_EQ(structure, status) << "lc_workspace: " << why << "; lc_run: " << message;
  }
  if (status != LC_OK) {
    EXPECT_TRUE(before == call.memory()) << "written after a refusal: " << message;
    return;
  }

  call.args = visible(call.args);
  EXPECT_TRUE(call.stayed_inside(before)) << "wrote outside of its outputs and workspace";
  const std::vector<const lc_tensor*> written = call.written();
  std::vector<std::vector<double>> results;
  for (const lc_tensor* t : written) results.push_back(values(*t));
  call.restore(before);
  const lc_tensor* start = call.args.op == LC_DECODE ? call.args.final_state : call.args.initial_state;
  for (const lc_tensor* t : {call.args.q, call.args.k, call.args.v, start, call.args.d_o, call.args.d_final_state,
                             call.args.dt, call.args.dt_bias, call.args.skip, call.args.gate})
    if (t && !tame(*t)) return;
  ++compared;
  if (call.args.op == LC_BACKWARD) {
    const Gradients want = reference_gradients(call.args), bound = reference_gradients(call.args, true);
    for (size_t i = 0; i < written.size(); ++i) {
      const std::vector<double>& terms = bound.of(call.args, written[i]);
      // Rounding errors of d_log_decay are relative to all pairs of tokens in a chunk, whose decay
      // may not matter to the result.
      const bool vanishes = written[i] == call.args.d_log_decay && norm(terms) == 0;
      const double error =
          vanishes ? norm(results[i]) : relative_error(results[i], want.of(call.args, written[i]), terms);
      EXPECT_LE(error, gradient_tolerance(written[i]->dtype))
          << describe_gradient(call.args, written[i], results[i], want.of(call.args, written[i]));
    }
    return;
  }
  const std::vector<double>&o = results[0], &state = results.back();
  const Answer answer = reference(call.args);
  const lc_dtype inputs = call.args.q->dtype;
  EXPECT_LE(relative_error(o, answer.o, answer.o_size), output_tolerance(inputs));
  if (call.args.final_state) {
    EXPECT_LE(relative_error(state, answer.state, answer.state_size),
              std::max(state_tolerance(inputs), rounding(call.args.final_state->dtype)));
  }
}

TEST(Fuzz, RandomCalls) {
  const double seconds = number_from("LEETCORE_FUZZ_SECONDS", 2);
  const auto seed = static_cast<unsigned>(number_from("LEETCORE_FUZZ_SEED", 1));
  const auto start = std::chrono::steady_clock::now();
  Fuzz fuzz(seed);
  int64_t steps = 0;
  while (!HasFailure() && std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    SCOPED_TRACE("seed " + std::to_string(seed) + ", step " + std::to_string(steps));
    fuzz.step();
    ++steps;
  }
  std::cout << steps << " calls:";
  for (const auto& [status, count] : fuzz.status_counts) std::cout << " " << count << " of status " << status;
  std::cout << ", " << fuzz.compared << " compared with the definition\n";
  // A fuzzer must see both accepted and refused calls.
  EXPECT_GT(fuzz.compared, steps / 10);
  EXPECT_GT(fuzz.status_counts[LC_INVALID], steps / 10);
}

}  // namespace
