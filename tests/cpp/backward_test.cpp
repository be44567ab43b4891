// backward_test.cpp - LC_BACKWARD against the derivative of the definition, with the instruction
// set that LEETCORE_ISA names.
//
// Before each call, scratch and outputs are full of NaN and have guard bytes around them. Gradients
// must have the same bits for every number of threads and for every selection of gradients.
#include <gtest/gtest.h>

#include "call.h"
#include "isa.h"

namespace {

using namespace test;

class Backward : public WithIsa {
 protected:
  static Spec backward() {
    Spec spec;
    spec.op = LC_BACKWARD;
    spec.initial = spec.final = true;
    return spec;
  }

  static void close(const char* name, const Tensor& x, const std::vector<double>& want, const std::vector<double>& size,
                    double tolerance) {
    if (x.memory.empty()) return;
    EXPECT_LE(relative_error(values(x), want, size), tolerance) << name;
  }

  void check(const Spec& spec) {
    SCOPED_TRACE(describe(spec));
    std::vector<Bytes> first;
    for (int threads : {1, 2, 5}) {
      SCOPED_TRACE(threads);
      lc_set_num_threads(threads);
      Call call(spec);
      for (Tensor* t : call.gradients()) t->poison();
      const auto before = call.memory();
      ASSERT_EQ(LC_OK, call.run()) << lc_last_error();
      EXPECT_TRUE(call.stayed_inside(before)) << "wrote outside of its outputs and workspace";
      if (threads > 1) {
        EXPECT_TRUE(first == call.memory()) << "gradients depend on the number of threads";
        continue;
      }
      first = call.memory();
      const Gradients want = reference_gradients(call.args);
      const double tolerance = gradient_tolerance(spec.dtype), exact = gradient_tolerance(call.wide());
      close("d_q", call.d_q, want.d_q, want.d_q, tolerance);
      close("d_k", call.d_k, want.d_k, want.d_k, tolerance);
      close("d_v", call.d_v, want.d_v, want.d_v, tolerance);
      close("d_log_decay", call.d_log_decay, want.d_log_decay, want.d_log_decay_size, exact);
      close("d_initial_state", call.d_initial_state, want.d_initial_state, want.d_initial_state, exact);
      close("d_dt", call.d_dt, want.d_dt, want.d_dt, tolerance);
    }
  }
};

constexpr lc_dtype kInputs[] = {kF64, kF32, kF16, kBf16};
constexpr int64_t kTokens[] = {1, 63, 64, 65, 130};

TEST_F(Backward, TokensAndHeadDims) {
  constexpr int64_t head_dims[][2] = {{1, 1}, {16, 24}, {33, 17}, {64, 64}, {7, 80}, {128, 3}};
  for (lc_dtype dtype : kInputs)
    for (int64_t N : kTokens)
      for (const auto& dims : head_dims) {
        Spec spec = backward();
        spec.dtype = dtype;
        spec.N = N;
        spec.K = dims[0];
        spec.V = dims[1];
        check(spec);
      }
}

// Lengths of tokens and states with contiguous keys, as in Mamba-2. Lengths of 0 have a gradient.
TEST_F(Backward, Mamba2) {
  constexpr int64_t shapes[][4] = {{1, 1, 16, 24}, {4, 1, 33, 17}, {6, 3, 8, 80}, {3, 3, 1, 40}, {4, 2, 128, 1}};
  for (lc_dtype dtype : kInputs)
    for (const auto& [heads, groups, K, V] : shapes)
      for (int64_t N : {1, 130})
        for (int form = 0; form < 3; ++form) {
          if ((heads * V > 100 || dtype == kF16) && form != 1) continue;
          Spec spec = backward();
          spec.dtype = dtype;
          spec.N = N;
          spec.K = K;
          spec.V = V;
          spec.heads(groups, groups, heads);
          spec.bnhd = form != 1;
          spec.dt = true;
          spec.softplus = form;
          if (form == 2) {
            spec.dt_min = 0.05;
            spec.dt_max = 0.5;
          }
          spec.strided = form == 1;
          spec.transposed = form != 2;
          spec.decay = form == 1 ? Decay::batch : Decay::head;
          check(spec);
        }
}

TEST_F(Backward, Decays) {
  for (lc_dtype dtype : kInputs)
    for (Decay decay : {Decay::none, Decay::scalar, Decay::head, Decay::batch, Decay::token})
      for (double gamma : {0.0, 1e-4, 0.5, 1.0, kMixed})
        for (int64_t N : {65, 130}) {
          if (decay == Decay::none && gamma != 1) continue;
          Spec spec = backward();
          spec.dtype = dtype;
          spec.decay = decay;
          spec.gamma = gamma;
          spec.N = N;
          spec.K = 16;
          spec.V = 8;
          if (decay == Decay::none) spec.wants &= ~8u;
          check(spec);
        }
}

// Slopes at which gamma^-t overflows within a few tokens.
TEST_F(Backward, SteepDecays) {
  for (lc_dtype dtype : kInputs)
    for (double slope : {2.9, 20.0})
      for (Decay decay : {Decay::head, Decay::token}) {
        Spec spec = backward();
        spec.dtype = dtype;
        spec.decay = decay;
        spec.gamma = std::exp(-slope);
        spec.N = 130;
        spec.K = 16;
        spec.V = 8;
        check(spec);
      }
}

// All combinations of given and requested tensors. An absent d_o or d_final_state means zero.
TEST_F(Backward, States) {
  for (lc_dtype dtype : {kF64, kBf16})
    for (int64_t N : {0, 1, 65})
      for (int given = 0; given < 8; ++given)
        for (unsigned wants : {31u, 15u}) {
          Spec spec = backward();
          spec.dtype = dtype;
          spec.N = N;
          spec.K = 9;
          spec.V = 20;
          spec.decay = Decay::token;
          spec.wants = wants;
          spec.initial = given & 1;
          spec.final = given & 2;
          spec.d_o = given & 4;
          if (spec.final || spec.d_o) check(spec);
        }
}

TEST_F(Backward, SomeOfTheGradients) {
  for (lc_dtype dtype : {kF64, kF16})
    for (const auto& [decay, dt] : {std::pair{Decay::head, false}, {Decay::token, false}, {Decay::head, true}}) {
      Spec spec = backward();
      spec.dtype = dtype;
      spec.N = 600;
      spec.K = 20;
      spec.V = 36;
      spec.decay = decay;
      spec.dt = dt;
      Call all(spec);
      ASSERT_EQ(LC_OK, all.run()) << lc_last_error();
      for (spec.wants = 1; spec.wants < (dt ? 63 : 31); ++spec.wants) {
        SCOPED_TRACE(describe(spec));
        Call some(spec);
        ASSERT_EQ(LC_OK, some.run()) << lc_last_error();
        for (size_t i = 0; i < (dt ? 6 : 5); ++i)
          if (spec.wants >> i & 1) {
            EXPECT_TRUE(some.gradients()[i]->memory == all.gradients()[i]->memory) << i;
          }
      }
    }
}

TEST_F(Backward, PackedSequences) {
  for (lc_dtype dtype : kInputs)
    for (const Index& cu :
         {Index{0, 130}, Index{0, 0, 1, 64, 130, 130}, Index{0, 63, 63, 128, 129, 530}, Index{0, 0}, Index{0}})
      for (Decay decay : {Decay::scalar, Decay::head, Decay::batch, Decay::token})
        for (bool bnhd : {false, true}) {
          Spec spec = backward();
          spec.dtype = dtype;
          spec.B = 1;
          spec.N = cu.back();
          spec.K = 16;
          spec.V = 12;
          spec.cu = cu;
          spec.cu_dtype = bnhd ? kI64 : kI32;
          spec.decay = decay;
          spec.bnhd = bnhd;
          check(spec);
        }
}

TEST_F(Backward, GroupedHeads) {
  constexpr int64_t heads[][3] = {{4, 2, 1}, {4, 1, 2}, {1, 4, 2},  {2, 4, 4},
                                  {1, 1, 4}, {6, 3, 3}, {12, 6, 3}, {2, 6, 3}};
  for (lc_dtype dtype : kInputs)
    for (const auto& h : heads)
      for (Decay decay : {Decay::head, Decay::token})
        for (int64_t N : {65, 200}) {
          Spec spec = backward();
          spec.dtype = dtype;
          spec.Hq = h[0];
          spec.Hk = h[1];
          spec.Hv = h[2];
          spec.decay = decay;
          spec.N = N;
          spec.K = 8;
          spec.V = 16;
          spec.bnhd = N > 65;
          check(spec);
        }
}

TEST_F(Backward, Layouts) {
  for (lc_dtype dtype : kInputs)
    for (int64_t N : kTokens)
      for (bool bnhd : {false, true})
        for (bool strided : {false, true})
          for (Decay decay : {Decay::head, Decay::token}) {
            Spec spec = backward();
            spec.dtype = dtype;
            spec.N = N;
            spec.K = 13;
            spec.V = 32;
            spec.bnhd = bnhd;
            spec.strided = strided;
            spec.decay = decay;
            check(spec);
          }
}

// Problems so large that every thread gets heads, segments or columns of states to work on.
TEST_F(Backward, ManyThreads) {
  for (lc_dtype dtype : kInputs)
    for (const auto& [B, H, N] : {std::tuple{2, 4, 130}, std::tuple{1, 1, 600}, std::tuple{1, 3, 200}}) {
      Spec spec = backward();
      spec.dtype = dtype;
      spec.B = B;
      spec.Hq = spec.Hk = spec.Hv = H;
      spec.N = N;
      spec.K = 64;
      spec.V = 64;
      check(spec);
    }
}

// More states than a worker keeps, so that they are computed again segment by segment.
TEST_F(Backward, ManySegments) {
  for (int64_t heads : {1, 10}) {
    Spec spec = backward();
    spec.B = 1;
    spec.Hq = spec.Hv = heads;
    spec.Hk = 1;
    spec.N = 1100;
    spec.K = 256;
    spec.V = 128;
    spec.decay = Decay::head;
    spec.gamma = 0.99;
    check(spec);
  }
}

}  // namespace
