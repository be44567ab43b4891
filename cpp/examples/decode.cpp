// decode.cpp - serving with the C++ interface: the prompt in one call, then token by token from the
// state after the prompt. Prints one line, and exits with 1 if the answers differ from a plain
// loop.
#include <cmath>
#include <cstdio>
#include <leetcore/leetcore.hpp>
#include <random>
#include <vector>

int main() try {
  constexpr int64_t B = 2, H = 3, K = 16, V = 32, prompt = 90, generated = 10, N = prompt + generated;
  constexpr double scale = 0.25;
  const std::vector<float> log_decay = {-0.01f, -0.2f, -3.f};  // one per head

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> q(B * H * N * K), k(q.size()), v(B * H * N * V), o(v.size()), state(B * H * K * V);
  for (auto* x : {&q, &k, &v})
    for (float& y : *x) y = normal(random);

  // `count` tokens from token `first` on, in arrays that hold all N tokens.
  const auto tokens = [](std::vector<float>& x, int64_t first, int64_t count, int64_t width) {
    return leetcore::Tensor(x.data() + first * width, {B, H, count, width}, {H * N * width, N * width, width, 1});
  };
  const leetcore::Tensor decay(log_decay.data(), {H}), pool(state.data(), {B, H, K, V});
  leetcore::Workspace workspace;
  leetcore::Options options;
  options.scale = scale;
  options.workspace = &workspace;

  options.final_state = pool;  // prefill
  leetcore::linear_attention(tokens(q, 0, prompt, K), tokens(k, 0, prompt, K), tokens(v, 0, prompt, V), decay,
                             tokens(o, 0, prompt, V), options);
  options.final_state = {};
  for (int64_t t = prompt; t < N; ++t)  // decode
    leetcore::decode_step(tokens(q, t, 1, K), tokens(k, t, 1, K), tokens(v, t, 1, V), decay, pool, tokens(o, t, 1, V),
                          options);

  double worst = 0;
  for (int64_t bh = 0; bh < B * H; ++bh) {
    std::vector<double> S(K * V);
    for (int64_t t = 0; t < N; ++t) {
      const float *qt = &q[(bh * N + t) * K], *kt = &k[(bh * N + t) * K], *vt = &v[(bh * N + t) * V];
      for (int64_t j = 0; j < V; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < K; ++i) {
          S[i * V + j] = std::exp(log_decay[bh % H]) * S[i * V + j] + double(kt[i]) * vt[j];
          sum += qt[i] * S[i * V + j];
        }
        worst = std::fmax(worst, std::fabs(scale * sum - o[(bh * N + t) * V + j]));
      }
    }
    for (int64_t i = 0; i < K * V; ++i) worst = std::fmax(worst, std::fabs(S[i] - state[bh * K * V + i]));
  }
  std::printf("decode: leetcore %s, largest difference from a plain loop %.1e\n", leetcore::version().c_str(), worst);
  return worst < 1e-4 ? 0 : 1;
} catch (const leetcore::Error& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
