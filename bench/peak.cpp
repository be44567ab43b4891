// Measures the float32 FMA peak, which no matrix product can exceed: prints the flop/s of all
// threads together. peak.py builds and runs it. Usage: peak THREADS
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64, kSums = 24;
#else
constexpr int kBytes = 32, kSums = 12;
#endif
typedef float Vec __attribute__((vector_size(kBytes)));

static float multiply_add(long rounds) {
  Vec sum[kSums], x = Vec{} + 0.999f, y = Vec{} + 0.001f;
#pragma GCC unroll 24
  for (int i = 0; i < kSums; i++) sum[i] = Vec{} + 0.01f * i;
  // Every loop over the sums is unrolled, as any other loop would put the sums on the stack.
  for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; i++) {
      sum[i] = sum[i] * x + y;
      asm volatile("" : "+v"(sum[i]));
    }
  }
  Vec total{};
#pragma GCC unroll 24
  for (int i = 0; i < kSums; i++) total += sum[i];
  return total[0];
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : 1;
  const long rounds = 4000000;
  double best = 0;
  std::vector<float> sink(threads);
  for (int repeat = 0; repeat < 10; repeat++) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> team;
    for (int t = 0; t < threads; t++) team.emplace_back([&sink, t] { sink[t] = multiply_add(rounds); });
    for (auto& member : team) member.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const double rate = 2.0 * rounds * kSums * (kBytes / sizeof(float)) * threads / seconds;
    if (rate > best) best = rate;
  }
  printf("%.6g\n", best);
  return sink[0] == 0.5f;
}
