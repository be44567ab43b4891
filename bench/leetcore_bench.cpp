// leetcore_bench.cpp - every method of the table under Google Benchmark: forward passes over N,
// decode steps over B.
//
// Where it is built with CUDA (by CMake, as CUDA C++) and there is a GPU, it also has the methods
// of the GPU. Their time is taken by events, with data outside the GPU's cache.
//
// Rates use the same count of work for every method, so that they compare. flop/s counts the causal
// chunkwise algorithm with chunks of 64 tokens; for a decode step, the update of the state and the
// output. bytes/s counts every operand once.
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

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace {

constexpr int64_t kHeads = 8, kMaxTokens = 16384, kMaxSequences = 256;
constexpr double kMaxMicroseconds = 1e6;  // sizes with a longer predicted call are not registered

struct Sizes {
  int64_t B, H, N, K, V;
};

double flop(lc_op op, const Sizes& s) {
  constexpr double C = 64;
  const double inside = op == LC_FORWARD ? (C + 1) * double(s.K + s.V) : 0;
  return double(s.B * s.H * s.N) * (inside + 4 * double(s.K * s.V));
}

// Numbers of unit variance. Callers repeat them, as drawing all numbers would take longer than the
// calls.
template <class T>
const std::vector<T>& normals() {
  static const std::vector<T> table = [] {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<T> x(65537);  // a prime number, so that rows differ
    for (T& value : x) {
      const float number = normal(random);
      if constexpr (std::is_same_v<T, float>) {
        value = number;
      } else {  // bfloat16, rounded to nearest even
        uint32_t bits;
        std::memcpy(&bits, &number, sizeof bits);
        value.bits = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
      }
    }
    return x;
  }();
  return table;
}

// ---- the GPU ------------------------------------------------------------------------------------

#ifdef __CUDACC__

constexpr size_t kColdBytes = size_t{256} << 20;  // more than caches hold

bool there_is_a_gpu() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices;
}
std::string gpu_name() {
  cudaDeviceProp properties;
  return cudaGetDeviceProperties(&properties, 0) == cudaSuccess ? properties.name : "unknown";
}
void* gpu_allocate(size_t bytes) {
  void* p = nullptr;
  return cudaMalloc(&p, std::max<size_t>(bytes, 1)) == cudaSuccess ? p : nullptr;
}
void gpu_free(void* p) { cudaFree(p); }
bool gpu_write(void* to, const void* from, size_t bytes) {
  return cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice) == cudaSuccess;
}

// Fills the cache with lines that need not be written back while a call is timed.
__global__ void read_all(const float4* from, size_t count, float* sum) {
  float own = 0;
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
    own += from[i].x;
  if (own != 0) *sum = own;  // own is 0, but the compiler does not know
}

// Seconds of GPU time of the work that `call` puts on the default stream; its data are outside the
// cache. Negative where the call failed.
template <class F>
double gpu_seconds(F&& call) {
  static cudaEvent_t start = nullptr, stop = nullptr;
  static float4* cold = nullptr;
  if (!start && (cudaEventCreate(&start) != cudaSuccess || cudaEventCreate(&stop) != cudaSuccess ||
                 cudaMalloc(&cold, kColdBytes) != cudaSuccess || cudaMemset(cold, 0, kColdBytes) != cudaSuccess))
    return -1;
  read_all<<<1024, 256>>>(cold, kColdBytes / sizeof(float4), reinterpret_cast<float*>(cold));
  cudaEventRecord(start);
  const bool ran = call() == LC_OK;
  cudaEventRecord(stop);
  float ms = 0;
  if (!ran || cudaEventSynchronize(stop) != cudaSuccess || cudaEventElapsedTime(&ms, start, stop) != cudaSuccess)
    return -1;
  return 1e-3 * ms;
}

#else

bool there_is_a_gpu() { return false; }
std::string gpu_name() { return ""; }
void* gpu_allocate(size_t) { return nullptr; }
void gpu_free(void*) {}
bool gpu_write(void*, const void*, size_t) { return false; }
template <class F>
double gpu_seconds(F&&) {
  return -1;
}

#endif

// ---- one call -----------------------------------------------------------------------------------

// Memory of a device, with the alignment of a workspace.
class Memory {
 public:
  Memory() = default;
  ~Memory() { gpu_free(gpu_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* reserve(bool gpu, size_t bytes) { return gpu ? gpu_ = gpu_allocate(bytes) : cpu_.reserve(bytes); }

 private:
  leetcore::Workspace cpu_;
  void* gpu_ = nullptr;
};

// One call. Before fill() its tensors have addresses, but no memory.
template <class T>
class Call {
 public:
  Call(bool gpu, lc_op op, const char* method, const Sizes& s) : gpu_(gpu), sizes_(s) {
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

  // Allocates and fills the tensors; false where memory is short.
  bool fill() {
    for (Operand* x : {&q_, &k_, &v_}) {
      const std::vector<T>& table = normals<T>();
      std::vector<T> values(x->bytes / sizeof(T));
      for (size_t i = 0; i < values.size(); i += table.size())
        std::copy_n(table.begin(), std::min(values.size() - i, table.size()), values.begin() + i);
      if (!write(*x, values.data())) return false;
    }
    for (Operand* x : {&o_, &state_})
      if (!write(*x, std::vector<char>(x->bytes).data())) return false;
    std::vector<float> slopes(size_t(sizes_.H));  // slopes of ALiBi
    for (size_t h = 0; h < slopes.size(); ++h) slopes[h] = -std::exp2(-8 * float(h + 1) / float(sizes_.H));
    if (!write(log_decay_, slopes.data())) return false;
    if (lc_workspace(&args_, &args_.workspace_bytes) != LC_OK) return false;
    args_.workspace = workspace_.reserve(gpu_, args_.workspace_bytes);
    return args_.workspace || !args_.workspace_bytes;
  }

  lc_status run() { return lc_run(&args_); }

 private:
  struct Operand {
    lc_tensor tensor = {};
    int64_t shape[4] = {};
    size_t bytes = 0;
    Memory memory;
  };

  // The address is never read, and far from other tensors: outputs must not overlap.
  template <class E>
  const lc_tensor* make(Operand& x, std::initializer_list<int64_t> shape) {
    x.bytes = sizeof(E);
    for (int64_t n : shape) {
      x.shape[x.tensor.ndim++] = n;
      x.bytes *= size_t(n);
    }
    x.tensor.data = reinterpret_cast<void*>(++addresses_ << 58);
    x.tensor.device = {gpu_ ? LC_CUDA : LC_CPU, 0};
    x.tensor.dtype = leetcore::dtype_of<E>::value;
    x.tensor.shape = x.shape;
    return &x.tensor;
  }

  bool write(Operand& x, const void* from) {
    if (!x.bytes) return true;
    x.tensor.data = x.memory.reserve(gpu_, x.bytes);
    if (!x.tensor.data) return false;
    if (gpu_) return gpu_write(x.tensor.data, from, x.bytes);
    std::memcpy(x.tensor.data, from, x.bytes);
    return true;
  }

  bool gpu_;
  Sizes sizes_;
  lc_args args_ = {};
  uintptr_t addresses_ = 0;
  Operand q_, k_, v_, o_, log_decay_, state_;
  Memory workspace_;
};

// ---- the benchmarks -----------------------------------------------------------------------------

template <class T>
void measure(benchmark::State& state, bool gpu, lc_op op, const char* method) {
  const Sizes sizes = {state.range(0), state.range(1), state.range(2), state.range(3), state.range(4)};
  Call<T> call(gpu, op, method, sizes);
  lc_cost cost = {};
  if (!call.fill()) return state.SkipWithError("not enough memory");
  if (call.predict(&cost) != LC_OK || call.run() != LC_OK)  // the first call is not timed
    return state.SkipWithError(lc_last_error());
  for (auto _ : state) {
    if (gpu) {
      const double seconds = gpu_seconds([&] { return call.run(); });
      if (seconds < 0) return state.SkipWithError("the GPU failed");
      state.SetIterationTime(seconds);
    } else {
      const lc_status status = call.run();
      benchmark::DoNotOptimize(status);
    }
  }
  using benchmark::Counter;
  state.counters["flop/s"] = Counter(flop(op, sizes), Counter::kIsIterationInvariantRate);
  state.counters["bytes/s"] = Counter(cost.least_bytes, Counter::kIsIterationInvariantRate);
  if (op == LC_FORWARD) state.SetComplexityN(sizes.N);
}

// Registers a family of benchmarks: the sizes of `all` that the method serves in reasonable time.
template <class T>
void add(bool gpu, lc_op op, const char* method, const char* dtype, const std::vector<Sizes>& all) {
  std::vector<Sizes> served;
  for (const Sizes& s : all) {
    lc_cost cost = {};
    if (Call<T>(gpu, op, method, s).predict(&cost) != LC_OK || cost.microseconds > kMaxMicroseconds) break;
    served.push_back(s);
  }
  if (served.empty()) return;
  const std::string kind = op == LC_DECODE ? "decode/" : "forward/";
  const std::string name = (gpu ? "cuda/" : "") + kind + method + "/" + dtype;
  auto* family =
      benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { measure<T>(state, gpu, op, method); });
  family->ArgNames({"B", "H", "N", "K", "V"})->Unit(benchmark::kMicrosecond);
  if (gpu)
    family->UseManualTime()->MinTime(0.05);  // the reads between calls take longer than many calls
  else
    family->UseRealTime();
  for (const Sizes& s : served) family->Args({s.B, s.H, s.N, s.K, s.V});
  if (op == LC_FORWARD) family->Complexity(benchmark::oAuto);
}

void add_all(bool gpu, const char* method) {
  for (const int64_t D : {64, 128}) {
    std::vector<Sizes> tokens, sequences;
    for (int64_t N = 64; N <= kMaxTokens; N *= 2) tokens.push_back({1, kHeads, N, D, D});
    for (int64_t B = 1; B <= kMaxSequences; B *= 4) sequences.push_back({B, kHeads, 1, D, D});
    add<float>(gpu, LC_FORWARD, method, "float32", tokens);
    add<leetcore::bfloat16>(gpu, LC_FORWARD, method, "bfloat16", tokens);
    add<float>(gpu, LC_DECODE, method, "float32", sequences);
    add<leetcore::bfloat16>(gpu, LC_DECODE, method, "bfloat16", sequences);
  }
}

// Adds the lines key=value of lc_build_info, and the device.
void add_context() {
  const std::string info = lc_build_info();
  for (size_t start = 0, end; start < info.size(); start = end + 1) {
    end = std::min(info.find('\n', start), info.size());
    const size_t equals = info.find('=', start);
    if (equals < end)
      benchmark::AddCustomContext("leetcore_" + info.substr(start, equals - start),
                                  info.substr(equals + 1, end - equals - 1));
  }
  benchmark::AddCustomContext("leetcore_device", there_is_a_gpu() ? "cpu, " + gpu_name() : "cpu");
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  if (!lc_method(0)) {  // for example a wrong LEETCORE_ISA
    std::fprintf(stderr, "%s\n", lc_last_error());
    return 1;
  }
  const bool gpu = there_is_a_gpu();
  for (const lc_method_info& method : leetcore::methods()) {
    const bool on_gpu = !std::strcmp(method.device, "cuda");
    if (gpu || !on_gpu) add_all(on_gpu, method.name);
  }
  add_context();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
