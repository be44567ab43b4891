// method_test.cpp - every CPU row of lc_method() against the definition, with the instruction set
// that LEETCORE_ISA names.
//
// Before each call, scratch and outputs are full of NaN and have guard bytes around them. A row
// serves exactly the calls whose features it declares. Its results are the same, bit for bit, for
// every number of threads.
#include <gtest/gtest.h>

#include <set>

#include "call.h"
#include "isa.h"

namespace {

using namespace test;

class Methods : public WithIsa {
 protected:
  // Runs every CPU method on the call that `spec` describes.
  void check(const Spec& spec) {
    SCOPED_TRACE(describe(spec));
    Answer answer;
    for (int row = 0; const lc_method_info* method = lc_method(row); ++row) {
      if (std::strcmp(method->device, "cpu")) continue;
      SCOPED_TRACE(method->name);
      Bytes first_o, first_state;
      for (int threads : {1, 2, 5}) {
        SCOPED_TRACE(threads);
        lc_set_num_threads(threads);
        Call call(spec);
        call.args.method = method->name;
        if (answer.o.empty() && answer.state.empty()) answer = reference(call.args);
        for (Tensor* t : {&call.o, &call.final_state})
          if (t != &call.final_state || spec.op == LC_FORWARD) t->poison();
        const auto before = call.memory();
        const lc_status status = call.run();
        EXPECT_EQ(declares(row, spec), status != LC_UNSUPPORTED) << lc_last_error();
        if (status == LC_UNSUPPORTED) {
          EXPECT_TRUE(before == call.memory());
          break;
        }
        ++served_;
        ASSERT_EQ(LC_OK, status) << lc_last_error();
        EXPECT_TRUE(call.stayed_inside(before)) << "wrote outside of its outputs and workspace";
        if (threads == 1) {
          const double o_error = relative_error(values(call.o), answer.o, answer.o);
          EXPECT_LE(o_error, output_tolerance(spec.dtype));
          if (call.args.final_state) {
            const lc_tensor& state = *call.args.final_state;
            const double error = relative_error(values(state), answer.state, answer.state);
            EXPECT_LE(error, std::max(state_tolerance(spec.dtype), state_tolerance(state.dtype)));
          }
          first_o = call.o.memory;
          first_state = (call.spec.in_place ? call.initial_state : call.final_state).memory;
        } else {
          EXPECT_TRUE(first_o == call.o.memory) << "o depends on the number of threads";
          EXPECT_TRUE(first_state == (call.spec.in_place ? call.initial_state : call.final_state).memory)
              << "the state depends on the number of threads";
        }
      }
    }
  }

  // Whether the row of a method declares what a call of this kind asks for.
  static bool declares(int index, const Spec& spec) {
    const std::string words = " " + std::string(lc_method_serves(index)) + " ";
    const auto has = [&](const char* word) { return words.find(std::string(" ") + word + " ") != std::string::npos; };
    if (!has(spec.op == LC_DECODE ? "decode" : "forward")) return false;
    if ((spec.dt && !has("token_lengths")) || (spec.skip && !has("skip")) || (spec.gate && !has("gate"))) return false;
    if (spec.transposed && spec.V > 1 && !has("transposed_states")) return false;
    if (spec.dt) return true;
    return spec.decay != Decay::token || has("decay_per_token");
  }

  int served_ = 0;  // calls
};

constexpr lc_dtype kInputs[] = {kF64, kF32, kF16, kBf16};
constexpr int64_t kTokens[] = {1, 63, 64, 65, 130};

TEST_F(Methods, TokensAndHeadDims) {
  constexpr int64_t head_dims[][2] = {{1, 1}, {16, 24}, {33, 17}, {64, 64}, {7, 80}, {128, 3}};
  for (lc_dtype dtype : kInputs)
    for (int64_t N : kTokens)
      for (const auto& dims : head_dims) {
        Spec spec(dtype, N, dims[0], dims[1]);
        spec.initial = spec.final = true;
        check(spec);
      }
  EXPECT_GT(served_, 0);
}

TEST_F(Methods, Decays) {
  for (lc_dtype dtype : kInputs)
    for (Decay decay : {Decay::none, Decay::scalar, Decay::head, Decay::batch, Decay::token})
      for (double gamma : {0.0, 0.5, 1.0, kMixed})
        for (int64_t N : {int64_t{65}, int64_t{130}}) {
          if (decay == Decay::none && gamma != 1) continue;
          Spec spec(dtype, N, 16, 8);
          spec.decay = decay;
          spec.gamma = gamma;
          spec.initial = spec.final = true;
          check(spec);
        }
  EXPECT_GT(served_, 0);
}

// With these slopes gamma^-t overflows within a few tokens.
TEST_F(Methods, SteepDecays) {
  for (lc_dtype dtype : kInputs)
    for (double slope : {2.9, 20.0, 87.0, 1000.0})
      for (Decay decay : {Decay::head, Decay::token}) {
        Spec spec(dtype, 130, 16, 8);
        spec.decay = decay;
        spec.gamma = std::exp(-slope);
        spec.initial = spec.final = true;
        check(spec);
      }
}

// Lengths of tokens, skip, gate and states with contiguous keys, as in Mamba-2.
TEST_F(Methods, Mamba2) {
  constexpr int64_t shapes[][4] = {{1, 1, 16, 24}, {4, 1, 33, 17}, {6, 3, 8, 80}, {16, 2, 32, 1}, {3, 3, 1, 40}};
  for (lc_dtype dtype : kInputs)
    for (const auto& [heads, groups, K, V] : shapes)
      for (int64_t N : {1, 130})
        for (int form = 0; form < 3; ++form) {
          if ((heads * V > 100 || dtype == kF16) && form != 1) continue;
          Spec spec(dtype, N, K, V);
          spec.B = 1 + form;
          spec.heads(groups, groups, heads);
          spec.bnhd = true;
          spec.dt = true;
          spec.softplus = form;
          if (form == 2) {
            spec.dt_min = 0.05;
            spec.dt_max = 0.5;
          }
          spec.strided = form == 1;
          spec.skip = form;
          spec.gate = form == 1;
          spec.initial = spec.final = spec.transposed = true;
          spec.decay = form == 1 ? Decay::batch : Decay::head;
          check(spec);
        }
  EXPECT_GT(served_, 0);
}

TEST_F(Methods, PartsOfMamba2Alone) {
  for (Decay decay : {Decay::none, Decay::scalar, Decay::head, Decay::token})
    for (int part = 0; part < 4; ++part) {
      if (part == 0 && decay == Decay::token) continue;
      Spec spec(kF32, 100, 24, 40);
      spec.heads(4, 2, 2);
      spec.decay = decay;
      spec.dt = part == 0;
      spec.skip = part == 1 ? 2 : 0;
      spec.gate = part == 2;
      spec.transposed = part == 3;
      spec.initial = spec.final = true;
      check(spec);
      spec.in_place = true;
      spec.initial = spec.final = false;
      check(spec);
      spec.in_place = false;
      spec.B = 1;
      spec.cu = {0, 0, 1, 66, 100};
      spec.final = true;
      check(spec);
    }
}

TEST_F(Methods, StepsOfMamba2) {
  for (lc_dtype dtype : kInputs)
    for (lc_dtype pool : {kF32, kF16, kBf16})
      for (const auto& [K, V] : {std::pair{16, 24}, std::pair{33, 17}, std::pair{128, 64}})
        for (int64_t N : {1, 3}) {
          if ((dtype == kF64 && pool != kF32) || (K > 100 && dtype != kF32)) continue;
          Spec spec(dtype, N, K, V);
          spec.op = LC_DECODE;
          spec.B = 3;
          spec.heads(2, 2, 4);
          if (dtype != kF64) spec.pool = pool;
          spec.slots = 5;
          spec.indices = {4, -1, 0};
          spec.dt = spec.softplus = spec.gate = spec.transposed = true;
          spec.skip = 1;
          check(spec);
          spec.heads(4, 2, 2);  // two q heads read one state
          check(spec);
        }
  EXPECT_GT(served_, 0);
}

TEST_F(Methods, States) {
  for (lc_dtype dtype : kInputs)
    for (int64_t N : {0, 1, 65})
      for (int states = 0; states < 5; ++states) {
        Spec spec(dtype, N, 9, 20);
        spec.initial = states & 1;
        spec.final = states & 2;
        spec.in_place = states == 4;
        check(spec);
      }
  EXPECT_GT(served_, 0);
}

TEST_F(Methods, PackedSequences) {
  for (lc_dtype dtype : kInputs)
    for (lc_dtype cu_dtype : {kI32, kI64})
      for (const Index& cu :
           {Index{0, 130}, Index{0, 0, 1, 64, 130, 130}, Index{0, 63, 63, 128, 129, 130}, Index{0, 0}, Index{0}})
        for (Decay decay : {Decay::head, Decay::token})
          for (bool bnhd : {false, true}) {
            Spec spec(dtype, cu.back(), 16, 12);
            spec.B = 1;
            spec.cu = cu;
            spec.cu_dtype = cu_dtype;
            spec.decay = decay;
            spec.initial = spec.final = true;
            spec.bnhd = bnhd;
            check(spec);
          }
  EXPECT_GT(served_, 0);
}

TEST_F(Methods, GroupedHeads) {
  constexpr int64_t heads[][3] = {{4, 2, 1}, {4, 1, 2}, {1, 4, 2},  {2, 4, 4},
                                  {1, 1, 4}, {6, 3, 3}, {12, 6, 3}, {1, 1, 1}};
  for (lc_dtype dtype : kInputs)
    for (const auto& h : heads)
      for (Decay decay : {Decay::head, Decay::batch, Decay::token})
        for (bool bnhd : {false, true}) {
          Spec spec(dtype, 65, 8, 16);
          spec.heads(h[0], h[1], h[2]);
          spec.decay = decay;
          spec.bnhd = bnhd;
          spec.initial = spec.final = true;
          check(spec);
        }
  EXPECT_GT(served_, 0);
}

TEST_F(Methods, Layouts) {
  for (lc_dtype dtype : kInputs)
    for (int64_t N : kTokens)
      for (bool bnhd : {false, true})
        for (bool strided : {false, true})
          for (Decay decay : {Decay::head, Decay::token}) {
            Spec spec(dtype, N, 13, 32);
            spec.bnhd = bnhd;
            spec.strided = strided;
            spec.decay = decay;
            spec.initial = spec.final = true;
            check(spec);
          }
  EXPECT_GT(served_, 0);
}

// Calls that are large enough to give every thread work.
TEST_F(Methods, ManyThreads) {
  for (lc_dtype dtype : kInputs)
    for (const auto& [B, H, N] : {std::tuple{2, 4, 130}, std::tuple{1, 1, 600}, std::tuple{1, 3, 200}}) {
      Spec spec(dtype, N, 64, 64);
      spec.heads(H, H, H);
      spec.B = B;
      spec.initial = spec.final = true;
      check(spec);
    }
}

TEST_F(Methods, Decode) {
  for (lc_dtype dtype : kInputs)
    for (lc_dtype pool : kInputs)
      for (int64_t N : {1, 5, 64})
        for (const Index& indices : {Index{}, Index{6, 0, 3}, Index{-1, 2, -1}})
          for (bool strided : {false, true}) {
            if ((pool == kF64) != (dtype == kF64)) continue;
            Spec spec(dtype, N, 24, 40);
            spec.op = LC_DECODE;
            spec.pool = pool;
            spec.B = 3;
            spec.slots = 7;
            spec.indices = indices;
            spec.index_dtype = indices.empty() || indices[0] < 0 ? kI32 : kI64;
            spec.Hq = 4;
            spec.strided = strided;
            spec.bnhd = strided;
            spec.decay = N == 1 ? Decay::head : Decay::token;
            check(spec);
          }
  EXPECT_GT(served_, 0);
}

}  // namespace
