// cost_test.cpp - compares the predictions of lc_predict with the counts of a build that counts
// (LC_COUNT): flop of products and updates, and the used bytes of the workspace.
#include <gtest/gtest.h>

#include "../../cpp/cpu/counted.h"
#include "call.h"

namespace {

using namespace test;

struct Counts {
  lc_cost predicted;
  double flop, workspace;
};

Counts run(const Spec& spec, const char* method, int threads) {
  lc_set_num_threads(threads);
  Call call(spec);
  call.args.method = method;
  Counts c = {};
  EXPECT_EQ(LC_OK, lc_predict(&call.args, &c.predicted, sizeof c.predicted)) << lc_last_error();
  EXPECT_STREQ(method, c.predicted.method);
  lc::counted.flop = lc::counted.workspace = 0;
  EXPECT_EQ(LC_OK, call.run()) << lc_last_error();
  c.flop = double(lc::counted.flop);
  c.workspace = double(lc::counted.workspace);
  lc_set_num_threads(0);
  return c;
}

Spec shape(lc_dtype dtype, int64_t N, int64_t K, int64_t V) {
  Spec spec(dtype, N, K, V);
  spec.gamma = 0.9;
  spec.decay = Decay::head;
  return spec;
}

template <class F>
void for_methods(F&& f) {
  for (int row = 0; const lc_method_info* method = lc_method(row); ++row) {
    SCOPED_TRACE(method->name);
    f(method->name);
  }
}

// The flop beyond the triangle of scores. It is computed in bands of 16 rows, with 80 columns on
// average instead of 65.
double triangle(const Spec& spec) {
  const double H = double(std::max({spec.Hq, spec.Hk, spec.Hv}));
  const double rounded_up = double((spec.N + 63) / 64 * 64);
  return double(spec.B) * H * rounded_up * (80 - 65) * double(spec.K + spec.V);
}

// The flop that a method may do beyond the prediction.
double allowance(const std::string& method, const Spec& spec) {
  return method == "recurrent" || method == "fleet" || method == "fft" ? 0 : triangle(spec);
}

TEST(Cost, FlopAreThoseThatWereDone) {
  for (lc_dtype dtype : {kF64, kBf16})
    for (int64_t N : {64, 320})
      for (const auto& [K, V] : {std::pair{16, 32}, std::pair{128, 16}})
        for (int states = 0; states < 4; ++states) {
          Spec spec = shape(dtype, N, K, V);
          spec.initial = states & 1;
          spec.final = states & 2;
          SCOPED_TRACE(describe(spec));
          for_methods([&](const char* method) {
            const Counts c = run(spec, method, 1);
            EXPECT_GE(c.flop, c.predicted.flop * (1 - 1e-12));
            EXPECT_LE(c.flop, c.predicted.flop * (1 + 1e-12) + allowance(method, spec));
          });
        }
}

TEST(Cost, GroupedHeads) {
  constexpr int64_t heads[][3] = {{4, 2, 1}, {1, 4, 2}, {6, 3, 3}};
  for (const auto& h : heads) {
    Spec spec = shape(kF32, 640, 32, 32);
    spec.Hq = h[0];
    spec.Hk = h[1];
    spec.Hv = h[2];
    spec.final = true;
    for_methods([&](const char* method) {
      const Counts c = run(spec, method, 1);
      EXPECT_GE(c.flop, c.predicted.flop * (1 - 1e-12));
      EXPECT_LE(c.flop, c.predicted.flop * (1 + 1e-12) + allowance(method, spec));
    });
  }
}

// With ragged lengths, rows of tiles and columns of vectors are rounded up, so a method does at
// least the predicted flop.
TEST(Cost, RaggedLengthsAreNeverOverestimated) {
  for (int64_t N : {1, 63, 65, 100, 777}) {
    const Spec spec = shape(kF32, N, 24, 40);
    SCOPED_TRACE(describe(spec));
    for_methods([&](const char* method) {
      const Counts c = run(spec, method, 1);
      EXPECT_GE(c.flop, c.predicted.flop * (1 - 1e-12));
    });
  }
}

// The same waste occurs in the triangles of up to five products, two of which are scores.
double backward_allowance(const Spec& spec) {
  return triangle(spec) / double(spec.K + spec.V) * double(3 * spec.K + 2 * spec.V);
}

void check_backward(const Spec& spec, int threads, bool exact) {
  SCOPED_TRACE(describe(spec));
  const Counts c = run(spec, "chunk", threads);
  EXPECT_GE(c.flop, c.predicted.flop * (1 - 1e-12));
  if (exact) {
    EXPECT_LE(c.flop, c.predicted.flop * (1 + 1e-12) + backward_allowance(spec));
  }
}

TEST(Cost, BackwardFlopAreThoseThatWereDone) {
  for (lc_dtype dtype : {kF64, kBf16})
    for (int64_t N : {64, 320})
      for (int states = 0; states < 4; ++states)
        for (unsigned wants = 1; wants < 32; ++wants) {
          Spec spec = shape(dtype, N, 32, 16);
          spec.op = LC_BACKWARD;
          spec.initial = states & 1;
          spec.final = states & 2;
          spec.wants = wants;
          check_backward(spec, 1, true);
        }
}

// Segments whose states are computed again, by one worker for a whole head or by three workers for
// parts of it.
TEST(Cost, BackwardFlopOfSegments) {
  for (int threads : {1, 3})
    for (int64_t heads : {1, 2}) {
      Spec spec = shape(kF64, 64 * 20, 128, 128);
      spec.op = LC_BACKWARD;
      spec.B = 1;
      spec.Hq = 2 * heads;
      spec.Hk = spec.Hv = heads;
      check_backward(spec, threads, true);
    }
}

TEST(Cost, BackwardOfGroupedHeadsAndRaggedLengths) {
  constexpr int64_t heads[][3] = {{4, 2, 1}, {1, 4, 2}, {6, 3, 3}};
  for (const auto& h : heads)
    for (int64_t N : {1, 63, 65, 640, 777}) {
      Spec spec = shape(kF32, N, 24, 40);
      spec.op = LC_BACKWARD;
      spec.Hq = h[0];
      spec.Hk = h[1];
      spec.Hv = h[2];
      check_backward(spec, 1, N == 640);
    }
}

TEST(Cost, WorkspaceIsUsedToTheLastByte) {
  for (lc_dtype dtype : {kF32, kF64, kF16})
    for (int threads : {1, 3})
      for (int64_t N : {1, 65, 1100}) {
        Spec spec = shape(dtype, N, 64, 48);
        spec.Hq = spec.Hk = spec.Hv = 3;
        spec.final = true;
        SCOPED_TRACE(describe(spec));
        for_methods([&](const char* method) {
          const Counts c = run(spec, method, threads);
          EXPECT_EQ(double(c.predicted.workspace), c.workspace);
        });
        spec.op = LC_BACKWARD;
        const Counts c = run(spec, "chunk", threads);
        EXPECT_EQ(double(c.predicted.workspace), c.workspace);
      }
}

TEST(Cost, BytesAndDepthFollowTheLength) {
  for_methods([&](const char* method) {
    const lc_cost one = run(shape(kF32, 512, 32, 32), method, 1).predicted;
    const lc_cost two = run(shape(kF32, 1024, 32, 32), method, 1).predicted;
    EXPECT_DOUBLE_EQ(2 * one.least_bytes, two.least_bytes);
    EXPECT_GE(one.bytes, one.least_bytes);
    EXPECT_GE(two.bytes, 2 * one.bytes * (1 - 1e-12));
    EXPECT_GE(one.depth, 1);
    EXPECT_GE(two.depth, one.depth);
  });
}

}  // namespace
