// method_test.cpp - tests the CUDA rows of lc_method() on a GPU, through lc_run, against the
// definition. This is a program without GoogleTest, so that it runs under compute-sanitizer.
//
//   method_test [--small] [METHOD...]   --small: one short call of each kind; default: all methods
//
// Outputs and workspace are filled with NaN before each call and have guard bytes around them. Each
// call is made twice, on different streams, and the answers must agree bit for bit. The exit status
// is 1 if an answer was wrong, 2 if the device broke, 77 if there is no device. g++ builds the same
// program for the emulator.
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <set>

#include "../cpp/call.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "../../cpp/simt/simt.h"
#endif

namespace {

using namespace test;

// ---- the device ---------------------------------------------------------------------------------

#ifdef __CUDACC__

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("the device broke: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) { require(cudaMalloc(&p_, std::max<size_t>(bytes, 1)), "cudaMalloc"); }
  ~Memory() { cudaFree(p_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  unsigned char* data() const { return p_; }
  void upload(const Bytes& from) { require(cudaMemcpy(p_, from.data(), bytes_, cudaMemcpyHostToDevice), "copy"); }
  void download(Bytes& to) const { require(cudaMemcpy(to.data(), p_, bytes_, cudaMemcpyDeviceToHost), "copy"); }

 private:
  unsigned char* p_ = nullptr;
  size_t bytes_;
};

bool there_is_a_device() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices;
}
void* stream(int n) {
  static cudaStream_t streams[2] = {};
  if (!streams[n]) require(cudaStreamCreateWithFlags(&streams[n], cudaStreamNonBlocking), "cudaStreamCreate");
  return streams[n];
}
void wait(int n) { require(cudaStreamSynchronize(static_cast<cudaStream_t>(stream(n))), "a kernel"); }
std::string complaint() { return ""; }

#else

class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes + kAlign), p_(bytes_.data()) {
    p_ += (kAlign - reinterpret_cast<uintptr_t>(p_) % kAlign) % kAlign;
    simt::allow(p_, bytes, true);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  unsigned char* data() const { return p_; }
  void upload(const Bytes& from) { std::copy(from.begin(), from.end(), p_); }
  void download(Bytes& to) const { std::copy_n(p_, to.size(), to.begin()); }

 private:
  static constexpr size_t kAlign = 256;
  Bytes bytes_;
  unsigned char* p_;
};

bool there_is_a_device() { return true; }
void* stream(int) { return nullptr; }
void wait(int) { simt::forget(); }
std::string complaint() {  // the first report of the emulator since the last call
  const std::string text = simt::report().errors() ? simt::report().messages[0] : "";
  simt::report() = {};
  return text;
}

#endif

// ---- a call on the device -----------------------------------------------------------------------

// lc_run with all tensors and the workspace in device memory. Returns false if the call wrote to
// the guard bytes of the workspace.
bool run_there(Call& call, int n, lc_status* status) {
  constexpr size_t kGuard = 256;
  *status = lc_workspace(&call.args, &call.args.workspace_bytes);
  if (*status != LC_OK) return true;
  const size_t bytes = call.args.workspace_bytes;
  Bytes scratch(bytes + 2 * kGuard, Tensor::kUntouched);
  std::fill_n(scratch.begin() + kGuard, bytes, 0xFF);
  Memory workspace(scratch.size());
  workspace.upload(scratch);
  call.args.workspace = workspace.data() + kGuard;
  call.args.stream = stream(n);

  struct Moved {
    Tensor* tensor;
    void* home;
    std::unique_ptr<Memory> there;
  };
  std::vector<Moved> moved;
  for (Tensor* t : call.tensors()) {
    if (t->memory.empty() || t->device.type != LC_CUDA) continue;  // a number stays on the host
    moved.push_back({t, t->data, std::make_unique<Memory>(t->memory.size())});
    moved.back().there->upload(t->memory);
    t->data = moved.back().there->data() + (static_cast<unsigned char*>(t->data) - t->memory.data());
  }
  *status = lc_run(&call.args);
  wait(n);
  for (Moved& m : moved) {
    m.there->download(m.tensor->memory);
    m.tensor->data = m.home;
  }
  workspace.download(scratch);
  for (size_t i = 0; i < kGuard; ++i)
    if (scratch[i] != Tensor::kUntouched || scratch[kGuard + bytes + i] != Tensor::kUntouched) return false;
  return true;
}

// The line of a method in a text with one line per row. It is the last match, since CPU rows come
// first.
std::string reason(const std::string& text, const std::string& method) {
  const size_t line = text.rfind("\n  " + method + ": ");
  if (line == std::string::npos) return text;
  return text.substr(line + 3, text.find('\n', line + 1) - line - 3);
}

struct Count {
  int served = 0, failed = 0;
  std::set<std::string> refusals;
};

// The results of a call by the definition.
struct Definition {
  Answer answer;
  Gradients gradients;
  explicit Definition(Call&& call) {
    if (call.spec.op == LC_BACKWARD)
      gradients = reference_gradients(call.args);
    else
      answer = reference(call.args);
  }
  std::vector<Output> outputs(Call& call) const {
    if (call.spec.op == LC_BACKWARD) return gradient_outputs(call, gradients);
    const lc_dtype dtype = call.spec.dtype;
    std::vector<Output> all;
    all.push_back({"o", &call.o, &answer.o, &answer.o, output_tolerance(dtype)});
    if (const lc_tensor* state = call.args.final_state)
      all.push_back({"final_state", call.spec.in_place ? &call.initial_state : &call.final_state, &answer.state,
                     &answer.state, std::max(state_tolerance(dtype), state_tolerance(state->dtype))});
    return all;
  }
};

// What is wrong with a method's answers to a call, or "". *served: whether the method serves the
// call.
std::string examine(const Spec& spec, const char* method, const Definition& definition, bool* served,
                    std::string* refusal) {
  std::vector<Bytes> first;
  *served = false;
  for (int n = 0; n < 2; ++n) {
    Call call(spec);
    call.args.method = method;
    for (const Output& output : definition.outputs(call))
      if (output.tensor != &call.initial_state && spec.op != LC_DECODE) output.tensor->poison();
    if (spec.op == LC_DECODE) call.o.poison();
    const std::vector<Bytes> before = call.memory();
    lc_status status;
    const bool inside = run_there(call, n, &status);
    if (status == LC_UNSUPPORTED && !n) {
      *refusal = reason(lc_last_error(), method);
      return before == call.memory() ? "" : "wrote although it refused";
    }
    if (const std::string text = complaint(); !text.empty()) return text;
    if (status != LC_OK) return lc_last_error();
    *served = true;
    if (!inside || !call.stayed_inside(before)) return "wrote outside of its outputs and workspace";
    const std::vector<Bytes> memory = call.memory();
    if (n) {
      if (first != memory) return "gave another answer the second time";
      continue;
    }
    first = memory;
    for (const Output& output : definition.outputs(call)) {
      if (output.tensor->memory.empty()) continue;
      const double error = relative_error(values(*output.tensor), *output.want, *output.size);
      if (error <= output.tolerance) continue;
      char text[80];
      std::snprintf(text, sizeof text, "%s: error %.2e, allowed %.0e", output.name, error, output.tolerance);
      return text;
    }
  }
  return "";
}

// ---- which calls --------------------------------------------------------------------------------

constexpr lc_dtype kInputs[] = {kF64, kF32, kF16, kBf16};

// One call of each kind: ragged chunks and dims; strides; packed with an empty sequence; in place
// with grouped heads; a pool; gradients with one decay per head, and with one per token; Mamba-2
// forward, in a pool, and its gradients.
std::vector<Spec> small_calls(lc_dtype dtype) {
  Spec base;
  base.dtype = dtype;
  base.B = 1;
  base.N = 70;
  base.K = 24;
  base.V = 40;
  std::vector<Spec> all(7, base);
  all[0].initial = all[0].final = true;
  all[1].strided = all[1].bnhd = true;
  all[1].decay = Decay::token;
  all[1].final = true;
  all[2].cu = {0, 0, 5, 70};
  all[2].initial = all[2].final = true;
  all[3].Hq = 4;
  all[3].in_place = true;
  all[4].op = LC_DECODE;
  all[4].B = 3;
  all[4].N = 2;
  all[4].slots = 4;
  all[4].indices = {3, -1, 0};
  for (int i : {5, 6}) {
    all[i].op = LC_BACKWARD;
    all[i].initial = all[i].final = true;
  }
  all[6].decay = Decay::token;
  all[6].Hq = 4;
  all[6].N = 300;
  all.push_back(mamba2(dtype, 70, 24, 40, Parts::all));
  all.push_back(mamba2(dtype, 2, 24, 40, Parts::all));
  all.back().op = LC_DECODE;
  all.push_back(mamba2(dtype, 140, 24, 16, Parts::limits));
  all.back().op = LC_BACKWARD;
  return all;
}

std::vector<Spec> all_calls(lc_dtype dtype) {
  std::vector<Spec> all = small_calls(dtype);
  Spec base;
  base.dtype = dtype;
  base.initial = base.final = true;
  for (int64_t N : {0, 1, 63, 64, 65, 130, 500})
    for (const auto& [K, V] :
         {std::pair{1, 1}, {16, 24}, {33, 17}, {64, 64}, {80, 96}, {128, 128}, {7, 256}, {256, 64}}) {
      all.push_back(base);
      all.back().N = N;
      all.back().K = K;
      all.back().V = V;
    }
  for (Decay decay : {Decay::none, Decay::scalar, Decay::head, Decay::batch, Decay::token})
    for (double gamma : {0., 1e-4, 0.5, 1 - 1e-6, 1., kMixed}) {
      if (decay == Decay::none && gamma != 1) continue;
      all.push_back(base);
      all.back().N = 200;
      all.back().K = 32;
      all.back().V = 48;
      all.back().decay = decay;
      all.back().gamma = gamma;
    }
  constexpr int64_t heads[][3] = {{4, 2, 2}, {4, 1, 1}, {2, 2, 4}, {1, 1, 4}, {4, 1, 2}, {2, 4, 1}};
  for (const auto& h : heads)
    for (bool bnhd : {false, true}) {
      all.push_back(base);
      all.back().Hq = h[0];
      all.back().Hk = h[1];
      all.back().Hv = h[2];
      all.back().bnhd = all.back().strided = bnhd;
      all.back().N = 150;
      all.back().K = 40;
      all.back().V = 64;
      all.back().decay = Decay::token;
    }
  for (const Index& bounds : {Index{0, 0, 1, 64, 300, 300}, Index{0, 63, 128, 129}, Index{0, 0}, Index{0}}) {
    all.push_back(base);
    all.back().B = 1;
    all.back().N = bounds.back();
    all.back().cu = bounds;
    all.back().cu_dtype = kI64;
    all.back().K = 64;
    all.back().V = 32;
  }
  for (int64_t N : {1500, 4100})  // one head, such that methods cut the sequence into segments
    for (double gamma : {0.9, 1 - 1e-6}) {
      all.push_back(base);
      all.back().B = all.back().Hq = all.back().Hk = all.back().Hv = 1;
      all.back().N = N;
      all.back().gamma = gamma;
      all.back().K = all.back().V = 64;
    }
  for (Parts parts : kParts)
    for (int64_t N : {1, 65, 500})
      for (const auto& [K, V] : {std::pair{128, 64}, {64, 64}, {128, 80}, {96, 64}, {256, 64}})
        if (K == 128 || N == 65) all.push_back(mamba2(dtype, N, K, V, parts));
  all.push_back(mamba2(dtype, 1500, 64, 32, Parts::limits));
  all.back().cu = {0, 0, 300, 310, 1500};
  // Gradients: the variants of the forward calls above, and checkpoints of states.
  const size_t forward = all.size();
  for (size_t i = 0; i < forward; ++i) {
    if (all[i].op != LC_FORWARD || all[i].in_place) continue;
    all.push_back(all[i]);
    all.back().skip = 0;
    all.back().gate = false;
    all.back().op = LC_BACKWARD;
    if (all.back().decay == Decay::none) all.back().wants &= ~8u;
  }
  for (lc_dtype pool : kInputs)
    for (int64_t N : {1, 5, 8, 64}) {
      if ((pool == kF64) != (dtype == kF64)) continue;
      Spec spec(dtype, N, 64, 80);
      spec.op = LC_DECODE;
      spec.pool = pool;
      spec.B = 3;
      spec.slots = 7;
      spec.indices = {6, 0, 3};
      spec.index_dtype = pool == dtype ? kI64 : kI32;
      spec.Hq = 4;
      spec.strided = N == 5;
      all.push_back(spec);
      all.push_back(mamba2(dtype, N, 128, 64, Parts::all));
      all.back().op = LC_DECODE;
      all.back().pool = pool;
      all.back().B = 3;
      all.back().slots = 7;
      all.back().indices = {6, 0, 3};
    }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  bool small = false;
  std::map<std::string, Count> counts;
  for (int i = 1; i < argc; ++i)
    if (!std::strcmp(argv[i], "--small"))
      small = true;
    else
      counts[argv[i]];
  if (!there_is_a_device()) return std::printf("there is no CUDA device\n"), 77;
  const bool all = counts.empty();
  std::set<std::string> known;
  for (int i = 0; const lc_method_info* method = lc_method(i); ++i)
    if (!std::strcmp(method->device, "cuda")) known.insert(method->name);
  if (all)
    for (const std::string& name : known) counts[name];
  for (const auto& [name, count] : counts)
    if (!known.count(name)) return std::printf("no method %s for cuda in this build\n", name.c_str()), 1;

  for (lc_dtype dtype : kInputs)
    for (Spec spec : small ? small_calls(dtype) : all_calls(dtype)) {
      spec.device = {LC_CUDA, 0};
      if (dtype == kF64 && spec.op == LC_BACKWARD) continue;
      const Definition definition{Call(spec)};
      for (auto& [name, count] : counts) {
        bool served;
        std::string refusal;
        const std::string wrong = examine(spec, name.c_str(), definition, &served, &refusal);
        count.served += served;
        count.failed += !wrong.empty();
        if (!refusal.empty()) count.refusals.insert(refusal);
        if (!wrong.empty()) std::printf("WRONG %s: %s: %s\n", name.c_str(), describe(spec).c_str(), wrong.c_str());
        std::fflush(stdout);
      }
    }

  int failed = counts.empty();
  for (const auto& [name, count] : counts) {
    std::printf("%-10s %4d calls served, %d wrong, %zu kinds of refusals\n", name.c_str(), count.served, count.failed,
                count.refusals.size());
    for (const std::string& refusal : count.refusals) std::printf("    %s\n", refusal.c_str());
    failed += count.failed + !count.served;
  }
  return failed ? 1 : 0;
}
