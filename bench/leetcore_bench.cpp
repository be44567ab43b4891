// leetcore_bench.cpp - every method of the table under Google Benchmark: forward passes over N, decode steps over B.
//
// Rates are of the same count of work for every method, so that they compare: flop/s of the chunkwise algorithm's exact
// causal count (chunks of 64; a decode step: the update of the state and the output), bytes/s of every operand once.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <leetcore/leetcore.hpp>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kHeads = 8, kMaxTokens = 16384, kMaxSequences = 256;
constexpr double kMaxMicroseconds = 1e6;  // predicted, of one call; a longer one is not registered

struct Sizes {
  int64_t B, H, N, K, V;
};

double flop(lc_op op, const Sizes& s) {
  constexpr double C = 64;
  const double inside = op == LC_FORWARD ? (C + 1) * double(s.K + s.V) : 0;
  return double(s.B * s.H * s.N) * (inside + 4 * double(s.K * s.V));
}

// Unit variance; over and over, as drawing all numbers would take longer than the calls.
template <class T>
const std::vector<T>& normals() {
  static const std::vector<T> table = [] {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<T> x(65537);  // a prime: rows differ
    for (T& value : x) {
      const float number = normal(random);
      if constexpr (std::is_same_v<T, float>) {
        value = number;
      } else {  // bfloat16, to nearest even
        uint32_t bits;
        std::memcpy(&bits, &number, sizeof bits);
        value.bits = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
      }
    }
    return x;
  }();
  return table;
}

// One call with memory of its own, that nothing is written to, and so takes up none, before fill().
template <class T>
class Call {
 public:
  Call(lc_op op, const char* method, const Sizes& s) : sizes_(s) {
    args_.struct_size = sizeof args_;
    args_.op = op;
    args_.method = method;
    args_.scale = 1 / std::sqrt(double(s.K));
    args_.q = make<T>(q_, {s.B, s.H, s.N, s.K});
    args_.k = make<T>(k_, {s.B, s.H, s.N, s.K});
    args_.v = make<T>(v_, {s.B, s.H, s.N, s.V});
    args_.o = make<T>(o_, {s.B, s.H, s.N, s.V});
    args_.log_decay = make<float>(log_decay_, {s.H});
    if (op == LC_DECODE) args_.final_state = make<float>(state_, {s.B, s.H, s.K, s.V});
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  lc_status predict(lc_cost* cost) const { return lc_predict(&args_, cost, sizeof *cost); }

  lc_status fill() {
    for (Operand* x : {&q_, &k_, &v_}) {
      const std::vector<T>& table = normals<T>();
      T* to = static_cast<T*>(x->tensor.data);
      for (size_t left = x->bytes / sizeof(T), n; left; left -= n, to += n)
        std::copy_n(table.begin(), n = std::min(left, table.size()), to);
    }
    for (Operand* x : {&o_, &state_})
      if (x->bytes) std::memset(x->tensor.data, 0, x->bytes);
    for (int64_t h = 0; h < sizes_.H; ++h)  // ALiBi's slopes
      static_cast<float*>(log_decay_.tensor.data)[h] = -std::exp2(-8 * float(h + 1) / float(sizes_.H));
    const lc_status status = lc_workspace(&args_, &args_.workspace_bytes);
    if (status == LC_OK) args_.workspace = workspace_.reserve(args_.workspace_bytes);
    return status;
  }

  lc_status run() { return lc_run(&args_); }

 private:
  struct Operand {
    lc_tensor tensor = {};
    int64_t shape[4] = {};
    size_t bytes = 0;
    leetcore::Workspace memory;  // aligned to 64
  };

  template <class E>
  static const lc_tensor* make(Operand& x, std::initializer_list<int64_t> shape) {
    x.bytes = sizeof(E);
    for (int64_t n : shape) x.shape[x.tensor.ndim++] = n, x.bytes *= size_t(n);
    x.tensor.data = x.memory.reserve(x.bytes);
    x.tensor.device = {LC_CPU, 0};
    x.tensor.dtype = leetcore::dtype_of<E>::value;
    x.tensor.shape = x.shape;
    return &x.tensor;
  }

  Sizes sizes_;
  lc_args args_ = {};
  Operand q_, k_, v_, o_, log_decay_, state_;
  leetcore::Workspace workspace_;
};

template <class T>
void measure(benchmark::State& state, lc_op op, const char* method) {
  const Sizes sizes = {state.range(0), state.range(1), state.range(2), state.range(3), state.range(4)};
  Call<T> call(op, method, sizes);
  lc_cost cost = {};
  if (call.predict(&cost) != LC_OK || call.fill() != LC_OK || call.run() != LC_OK) {  // the first one is not timed
    state.SkipWithError(lc_last_error());
    return;
  }
  for (auto _ : state) {
    const lc_status status = call.run();
    benchmark::DoNotOptimize(status);
  }
  using benchmark::Counter;
  state.counters["flop/s"] = Counter(flop(op, sizes), Counter::kIsIterationInvariantRate);
  state.counters["bytes/s"] = Counter(cost.least_bytes, Counter::kIsIterationInvariantRate);
  if (op == LC_FORWARD) state.SetComplexityN(sizes.N);
}

// A family: the sizes of `all` that the method serves in reasonable time.
template <class T>
void add(lc_op op, const char* method, const char* dtype, const std::vector<Sizes>& all) {
  std::vector<Sizes> served;
  for (const Sizes& s : all) {
    lc_cost cost = {};
    if (Call<T>(op, method, s).predict(&cost) != LC_OK || cost.microseconds > kMaxMicroseconds) break;
    served.push_back(s);
  }
  if (served.empty()) return;
  const std::string name = std::string(op == LC_DECODE ? "decode/" : "forward/") + method + "/" + dtype;
  auto* family = benchmark::RegisterBenchmark(name.c_str(),
                                              [op, method](benchmark::State& state) { measure<T>(state, op, method); });
  family->ArgNames({"B", "H", "N", "K", "V"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const Sizes& s : served) family->Args({s.B, s.H, s.N, s.K, s.V});
  if (op == LC_FORWARD) family->Complexity(benchmark::oAuto);
}

void add_all(const char* method) {
  for (const int64_t D : {64, 128}) {
    std::vector<Sizes> tokens, sequences;
    for (int64_t N = 64; N <= kMaxTokens; N *= 2) tokens.push_back({1, kHeads, N, D, D});
    for (int64_t B = 1; B <= kMaxSequences; B *= 4) sequences.push_back({B, kHeads, 1, D, D});
    add<float>(LC_FORWARD, method, "float32", tokens);
    add<leetcore::bfloat16>(LC_FORWARD, method, "bfloat16", tokens);
    add<float>(LC_DECODE, method, "float32", sequences);
    add<leetcore::bfloat16>(LC_DECODE, method, "bfloat16", sequences);
  }
}

// The lines key=value of lc_build_info, and the device.
void add_context() {
  const std::string info = lc_build_info();
  for (size_t start = 0, end; start < info.size(); start = end + 1) {
    end = std::min(info.find('\n', start), info.size());
    const size_t equals = info.find('=', start);
    if (equals < end)
      benchmark::AddCustomContext("leetcore_" + info.substr(start, equals - start),
                                  info.substr(equals + 1, end - equals - 1));
  }
  benchmark::AddCustomContext("leetcore_device", "cpu");
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  if (!lc_method(0)) {  // such as a wrong LEETCORE_ISA
    std::fprintf(stderr, "%s\n", lc_last_error());
    return 1;
  }
  for (const lc_method_info& method : leetcore::methods())
    if (!std::strcmp(method.device, "cpu")) add_all(method.name);
  add_context();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
