// hpp_test.cpp - the C++ interface: arguments it passes on, exceptions it throws, scratch it
// reuses.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <leetcore/leetcore.hpp>
#include <thread>
#include <vector>

namespace {

using leetcore::Tensor;

// One head, two tokens, K = V = 1, gamma = 1/2: o = 48, 141 and S = 47 (api_test.c has the
// arithmetic).
struct Tiny {
  float q[2] = {2, 3}, k[2] = {4, 5}, v[2] = {6, 7}, o[2] = {-1, -1}, state[1] = {-1};
  const float log_decay = -0.6931472f;
  Tensor tq{q, {1, 1, 2, 1}}, tk{k, {1, 1, 2, 1}}, tv{v, {1, 1, 2, 1}}, to{o, {1, 1, 2, 1}};
  Tensor tg{&log_decay, {}}, ts{state, {1, 1, 1, 1}};
};

TEST(Hpp, LinearAttention) {
  Tiny x;
  leetcore::linear_attention(x.tq, x.tk, x.tv, x.tg, x.to);
  EXPECT_FLOAT_EQ(48, x.o[0]);
  EXPECT_FLOAT_EQ(141, x.o[1]);

  leetcore::Options options;
  options.scale = -1;
  options.final_state = x.ts;
  options.layout = leetcore::Layout::bnhd;
  options.method = "recurrent";
  const Tensor q(x.q, {1, 2, 1, 1}), k(x.k, {1, 2, 1, 1}), v(x.v, {1, 2, 1, 1}), o(x.o, {1, 2, 1, 1});
  leetcore::linear_attention(q, k, v, {}, o, options);
  EXPECT_FLOAT_EQ(-48, x.o[0]);
  EXPECT_FLOAT_EQ(-177, x.o[1]);
  EXPECT_FLOAT_EQ(59, x.state[0]);

  options.initial_state = x.ts;  // in place
  leetcore::linear_attention(q, k, v, {}, o, options);
  EXPECT_FLOAT_EQ(59 + 59, x.state[0]);
}

TEST(Hpp, DecodeStep) {
  Tiny x;
  x.state[0] = 2;
  leetcore::decode_step(x.tq, x.tk, x.tv, x.tg, x.ts, x.to);
  EXPECT_FLOAT_EQ(50, x.o[0]);
  EXPECT_FLOAT_EQ(142.5, x.o[1]);
  EXPECT_FLOAT_EQ(47.5, x.state[0]);

  const int64_t skip[] = {-1};
  leetcore::Options options;
  options.state_indices = Tensor(skip, {1});
  leetcore::decode_step(x.tq, x.tk, x.tv, x.tg, x.ts, x.to, options);
  EXPECT_EQ(0, x.o[0]);
  EXPECT_FLOAT_EQ(47.5, x.state[0]);
}

TEST(Hpp, TheOptionsOfAPromptServeItsDecoding) {
  Tiny x;
  const int32_t bounds[] = {0, 2};
  float first[] = {2};
  leetcore::Options options;
  options.method = "chunk";  // which does not decode
  options.initial_state = Tensor(first, {1, 1, 1, 1});
  options.final_state = x.ts;
  options.cu_seqlens = Tensor(bounds, {2});
  leetcore::linear_attention(x.tq, x.tk, x.tv, x.tg, x.to, options);
  EXPECT_FLOAT_EQ(47.5, x.state[0]);
  x.state[0] = 2;
  leetcore::decode_step(x.tq, x.tk, x.tv, x.tg, x.ts, x.to, options);
  EXPECT_FLOAT_EQ(50, x.o[0]);
  EXPECT_FLOAT_EQ(47.5, x.state[0]);
}

// One thread computes while another changes the number of threads, and with it the scratch that a
// call needs.
TEST(Hpp, SettingsMayChangeAtAnyTime) {
  constexpr int64_t H = 4, N = 300, D = 32;
  std::vector<float> x(H * N * D, 0.5f), y(H * N * D);
  const Tensor t(x.data(), {1, H, N, D}), o(y.data(), {1, H, N, D});
  std::atomic<bool> stop{false};
  std::thread changes([&] {
    for (int n = 0; !stop; ++n) lc_set_num_threads(1 + n % 3);
  });
  leetcore::Options options;
  options.method = "chunk";
  leetcore::Workspace workspace;
  EXPECT_NO_THROW({
    for (int i = 0; i < 2000; ++i) {
      leetcore::linear_attention(t, t, t, {}, o, options);
      options.workspace = i % 2 ? &workspace : nullptr;
    }
  });
  stop = true;
  changes.join();
  lc_set_num_threads(0);
  EXPECT_FLOAT_EQ(N * D * 0.125f, y.back());
}

TEST(Hpp, PackedSequencesAndStrides) {
  // Two sequences of one token each, in every other element of memory.
  float q[] = {2, 0, 3, 0}, k[] = {4, 0, 5, 0}, v[] = {6, 0, 7, 0}, o[] = {-1, -1, -1, -1};
  const auto strided = [](float* data) { return Tensor(data, {1, 1, 2, 1}, {4, 4, 2, 1}); };
  const int64_t cu_seqlens[] = {0, 1, 2};
  leetcore::Options options;
  options.cu_seqlens = Tensor(cu_seqlens, {3});
  leetcore::linear_attention(strided(q), strided(k), strided(v), {}, strided(o), options);
  EXPECT_FLOAT_EQ(48, o[0]);
  EXPECT_EQ(-1, o[1]);
  EXPECT_FLOAT_EQ(105, o[2]);
  EXPECT_EQ(-1, o[3]);
}

TEST(Hpp, SixteenBitTypes) {
  leetcore::bfloat16 one{0x3F80}, bo{0};
  const Tensor b(&one, {1, 1, 1, 1});
  leetcore::linear_attention(b, b, b, {}, Tensor(&bo, {1, 1, 1, 1}));
  EXPECT_EQ(0x3F80, bo.bits);
  leetcore::half h{0x3C00}, ho{0};
  const Tensor f(&h, {1, 1, 1, 1});
  leetcore::linear_attention(f, f, f, {}, Tensor(&ho, {1, 1, 1, 1}));
  EXPECT_EQ(0x3C00, ho.bits);
}

TEST(Hpp, Errors) {
  Tiny x;
  const auto error = [](auto&& call) {
    try {
      call();
    } catch (const leetcore::Error& e) {
      return std::to_string(e.status()) + " " + e.what();
    }
    return std::string("nothing thrown");
  };
  const auto starts = [&](const std::string& prefix, auto&& call) {
    const std::string text = error(call);
    EXPECT_EQ(0u, text.find(prefix)) << text;
  };
  starts("1 k: ", [&] { leetcore::linear_attention(x.tq, Tensor(x.k, {1, 1, 1, 1}), x.tv, x.tg, x.to); });
  starts("1 v: ", [&] { leetcore::linear_attention(x.tq, x.tk, {}, x.tg, x.to); });
  starts("1 o: ", [&] { leetcore::linear_attention(x.tq, x.tk, x.tv, x.tg, {}); });
  starts("1 q: ", [&] { leetcore::explain({}, x.tk, x.tv); });
  starts("1 final_state: ", [&] { leetcore::decode_step(x.tq, x.tk, x.tv, x.tg, {}, x.to); });
  leetcore::Options options;
  options.num_threads = -1;
  starts("1 num_threads: ", [&] { leetcore::decode_step(x.tq, x.tk, x.tv, x.tg, x.ts, x.to, options); });
  starts("1 shape: ", [&] { Tensor(x.q, {1, 1, 1, 1, 2}); });
  starts("1 strides: ", [&] { Tensor(x.q, {1, 1, 2, 1}, {1, 1}); });
  EXPECT_EQ(-1, x.o[0]);
  EXPECT_EQ(-1, x.state[0]);
  EXPECT_TRUE((std::is_base_of_v<std::runtime_error, leetcore::Error>));
}

// o = q k v for one token: each gradient is the product of the others.
TEST(Hpp, Backward) {
  float q = 2, k = 3, v = 5, d_o = 7, g = -1, initial = 0, d_q = 0, d_k = 0, d_v = 0, d_g = -1, d_initial = 0;
  const auto one = [](float& x) { return Tensor(&x, {1, 1, 1, 1}); };
  leetcore::Gradients gradients;
  gradients.d_o = one(d_o);
  gradients.d_q = one(d_q);
  gradients.d_k = one(d_k);
  gradients.d_v = one(d_v);
  gradients.d_log_decay = Tensor(&d_g, {1}), gradients.d_initial_state = one(d_initial);
  leetcore::Options options;
  options.initial_state = one(initial);
  leetcore::linear_attention_backward(one(q), one(k), one(v), Tensor(&g, {1}), gradients, options);
  EXPECT_FLOAT_EQ(7 * 3 * 5, d_q);
  EXPECT_FLOAT_EQ(7 * 2 * 5, d_k);
  EXPECT_FLOAT_EQ(7 * 2 * 3, d_v);
  EXPECT_FLOAT_EQ(0, d_g);  // nothing was there to decay
  EXPECT_FLOAT_EQ(std::exp(-1.f) * 2 * 7, d_initial);
  gradients.d_o = {};
  EXPECT_THROW(leetcore::linear_attention_backward(one(q), one(k), one(v), {}, gradients, options), leetcore::Error);
}

TEST(Hpp, Workspace) {
  leetcore::Workspace workspace;
  EXPECT_EQ(0u, workspace.size());
  void* first = workspace.reserve(1000);
  EXPECT_EQ(0u, reinterpret_cast<uintptr_t>(first) % 64);
  EXPECT_EQ(first, workspace.reserve(10));
  EXPECT_EQ(1000u, workspace.size());
  EXPECT_EQ(0u, reinterpret_cast<uintptr_t>(workspace.reserve(5000)) % 64);
  EXPECT_EQ(5000u, workspace.size());

  std::vector<float> x(300 * 32, 0.01f), o(x.size());
  const Tensor t(x.data(), {1, 1, 300, 32});
  leetcore::Options options;
  options.workspace = &workspace;
  for (const lc_method_info& method : leetcore::methods()) {
    if (std::string(method.device) != "cpu") continue;
    options.method = method.name;
    leetcore::linear_attention(t, t, t, {}, Tensor(o.data(), {1, 1, 300, 32}), options);
    EXPECT_NEAR(300 * 32e-6, o.back(), 1e-6) << method.name;
  }
}

TEST(Hpp, WorkspaceOfTheCaller) {
  std::vector<float> x(300 * 32, 0.01f), o(x.size());
  const Tensor t(x.data(), {1, 1, 300, 32}), to(o.data(), {1, 1, 300, 32});
  leetcore::Options options;
  options.method = "chunk";
  const std::size_t bytes = leetcore::linear_attention_workspace(t, t, t, {}, options);
  ASSERT_GT(bytes, 0u);
  EXPECT_EQ(bytes, leetcore::cost(t, t, t, {}, options).workspace);
  alignas(64) static unsigned char memory[1 << 22];
  ASSERT_LE(bytes, sizeof memory);
  leetcore::Workspace enough(memory, sizeof memory), little(memory, bytes - 1);
  EXPECT_EQ(memory, enough.reserve(1));
  EXPECT_EQ(sizeof memory, enough.size());
  options.workspace = &enough;
  leetcore::linear_attention(t, t, t, {}, to, options);
  EXPECT_NEAR(300 * 32e-6, o.back(), 1e-6);
  options.workspace = &little;
  try {
    leetcore::linear_attention(t, t, t, {}, to, options);
    ADD_FAILURE() << "nothing thrown";
  } catch (const leetcore::Error& e) {
    EXPECT_EQ(LC_MEMORY, e.status());
    EXPECT_EQ(0u, std::string(e.what()).find("workspace: method chunk needs"));
  }
  const Tensor step(x.data(), {1, 1, 1, 32}), state(o.data(), {1, 1, 32, 32});
  EXPECT_LE(leetcore::decode_step_workspace(step, step, step, {}, state), sizeof memory);
}

TEST(Hpp, WhatThereIs) {
  Tiny x;
  const lc_cost cost = leetcore::cost(x.tq, x.tk, x.tv, x.tg);
  EXPECT_GT(cost.flop, 0);
  EXPECT_NE(nullptr, cost.method);
  const std::string text = leetcore::explain(x.tq, x.tk, x.tv, x.tg);
  EXPECT_GE(leetcore::methods().size(), 3u);
  const std::vector<lc_candidate> candidates = leetcore::candidates(x.tq, x.tk, x.tv, x.tg);
  ASSERT_EQ(leetcore::methods().size(), candidates.size());
  EXPECT_STREQ(leetcore::methods()[0].name, candidates[0].method);
  for (const lc_method_info& method : leetcore::methods()) EXPECT_NE(std::string::npos, text.find(method.name)) << text;
  EXPECT_EQ('\n', text.back());
  EXPECT_EQ(std::to_string(LC_VERSION_MAJOR) + "." + std::to_string(LC_VERSION_MINOR) + "." +
                std::to_string(LC_VERSION_PATCH),
            leetcore::version());
}

}  // namespace
