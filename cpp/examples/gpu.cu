// gpu.cu - serving on a GPU with the C++ interface: the prompt in one call, then token by token
// with one CUDA graph. The caller owns all memory and the stream. Prints one line, and exits with 1
// if the answers differ from a plain loop, or with 77 without a GPU.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <leetcore/leetcore.hpp>
#include <random>
#include <stdexcept>
#include <vector>

static void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Allocates `count` floats on the device, and copies them from the host if `from` is given.
static float* on_device(std::size_t count, const float* from = nullptr) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, count * sizeof(float)));
  if (from) require(cudaMemcpy(memory, from, count * sizeof(float), cudaMemcpyHostToDevice));
  return static_cast<float*>(memory);
}

static int run() {
  constexpr int64_t B = 2, H = 3, K = 64, V = 32, prompt = 190, N = 200;
  const std::vector<float> log_decay = {-0.01f, -0.2f, -3.f};  // one per head
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> q(B * H * N * K), k(q.size()), v(B * H * N * V), o(v.size()), state(B * H * K * V);
  for (auto* x : {&q, &k, &v})
    for (float& y : *x) y = normal(random);

  float *dq = on_device(q.size(), q.data()), *dk = on_device(k.size(), k.data()), *dv = on_device(v.size(), v.data());
  float *d_o = on_device(o.size()), *d_state = on_device(state.size()), *d_decay = on_device(H, log_decay.data());
  float *q1 = on_device(B * H * K), *k1 = on_device(B * H * K), *v1 = on_device(B * H * V), *o1 = on_device(B * H * V);
  constexpr lc_device gpu = {LC_CUDA, 0};
  const auto prefix = [&](float* x, int64_t width) {
    return leetcore::Tensor(x, {B, H, prompt, width}, {H * N * width, N * width, width, 1}, gpu);
  };
  const auto token = [&](float* x, int64_t width) { return leetcore::Tensor(x, {B, H, 1, width}, {}, gpu); };
  const leetcore::Tensor decay(d_decay, {H}, {}, gpu), pool(d_state, {B, H, K, V}, {}, gpu);

  cudaStream_t stream;
  require(cudaStreamCreate(&stream));
  leetcore::Options options;
  options.stream = stream;
  const auto step_bytes =
      leetcore::decode_step_workspace(token(q1, K), token(k1, K), token(v1, V), decay, pool, options);
  options.final_state = pool;
  const auto bytes = leetcore::linear_attention_workspace(prefix(dq, K), prefix(dk, K), prefix(dv, V), decay, options);
  const std::size_t most = std::max(bytes, step_bytes);
  leetcore::Workspace workspace(on_device(most / sizeof(float) + 1), most);
  options.workspace = &workspace;

  leetcore::linear_attention(prefix(dq, K), prefix(dk, K), prefix(dv, V), decay, prefix(d_o, V), options);

  options.final_state = {};
  cudaGraph_t graph;
  cudaGraphExec_t step;
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  leetcore::decode_step(token(q1, K), token(k1, K), token(v1, V), decay, pool, token(o1, V), options);
  require(cudaStreamEndCapture(stream, &graph));
  require(cudaGraphInstantiate(&step, graph, 0));
  const auto copy = [&](float* to, int64_t to_width, const float* from, int64_t from_width, int64_t width) {
    require(cudaMemcpy2DAsync(to, to_width * sizeof(float), from, from_width * sizeof(float), width * sizeof(float),
                              B * H, cudaMemcpyDeviceToDevice, stream));
  };
  for (int64_t t = prompt; t < N; ++t) {
    copy(q1, K, dq + t * K, N * K, K);
    copy(k1, K, dk + t * K, N * K, K);
    copy(v1, V, dv + t * V, N * V, V);
    require(cudaGraphLaunch(step, stream));
    copy(d_o + t * V, N * V, o1, V, V);
  }
  require(cudaMemcpyAsync(o.data(), d_o, o.size() * sizeof(float), cudaMemcpyDeviceToHost, stream));
  require(cudaMemcpyAsync(state.data(), d_state, state.size() * sizeof(float), cudaMemcpyDeviceToHost, stream));
  require(cudaStreamSynchronize(stream));

  double worst = 0;
  for (int64_t bh = 0; bh < B * H; ++bh) {
    std::vector<double> S(K * V);
    for (int64_t t = 0; t < N; ++t)
      for (int64_t j = 0; j < V; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < K; ++i) {
          double& s = S[i * V + j];
          s = std::exp(double(log_decay[bh % H])) * s + double(k[(bh * N + t) * K + i]) * v[(bh * N + t) * V + j];
          sum += q[(bh * N + t) * K + i] * s;
        }
        worst = std::fmax(worst, std::fabs(sum - o[(bh * N + t) * V + j]));
      }
    for (int64_t i = 0; i < K * V; ++i) worst = std::fmax(worst, std::fabs(S[i] - state[bh * K * V + i]));
  }
  std::printf("gpu: leetcore %s, largest difference from a plain loop %.1e\n", leetcore::version().c_str(), worst);
  return worst < 1e-3 ? 0 : 1;
}

int main() try {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || !devices) {
    std::puts("gpu: there is none");
    return 77;
  }
  return run();
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
