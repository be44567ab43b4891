// emulated_test.cpp - tests every CUDA row of lc_method() in the emulator, through lc_run, against
// the definition, under several schedules and with every access of a kernel checked. Outputs and
// workspace are filled with NaN before each call. One file: its tests share one fixture.
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "../../cpp/simt/simt.h"
#include "../cpp/call.h"
#include "device_host.h"

namespace {

using namespace test;

struct Schedule {
  simt::Policy policy;
  uint64_t seed;
};
constexpr Schedule kSchedules[] = {{simt::Policy::lockstep, 1},
                                   {simt::Policy::sticky, 1},
                                   {simt::Policy::warp_priority, 1},
                                   {simt::Policy::warp_priority, 2}};

class Emulated : public ::testing::Test {
 protected:
  void TearDown() override {
    simt::options() = {};
    simt::report() = {};
    simt::device() = simt::kHopper;
    simt::forget();
  }

  // Runs every CUDA method on the call that `spec` describes, under the first `schedules`
  // schedules.
  void check(Spec spec, int schedules = 1) {
    spec.device = {LC_CUDA, 0};
    SCOPED_TRACE(describe(spec));
    Answer answer;
    for (int i = 0; const lc_method_info* method = lc_method(i); ++i) {
      if (std::strcmp(method->device, "cuda") || left_out_.count(method->name)) continue;
      SCOPED_TRACE(method->name);
      Bytes first_o, first_state;
      for (int n = 0; n < schedules; ++n) {
        SCOPED_TRACE(n);
        Call call(spec);
        call.args.method = method->name;
        if (answer.o.empty() && answer.state.empty()) answer = reference(call.args);
        call.o.poison();
        if (spec.op == LC_FORWARD) call.final_state.poison();
        const auto before = call.memory();
        const long launches = simt::report().launches;
        const lc_status status = run(call, kSchedules[n]);
        if (status == LC_UNSUPPORTED) {
          EXPECT_EQ(0, n) << "served under another schedule";
          EXPECT_TRUE(before == call.memory());
          refusals_.insert(std::string(method->name) + ": " + lc_last_error());
          break;
        }
        ASSERT_EQ(LC_OK, status) << lc_last_error();
        ASSERT_EQ(0, simt::report().errors()) << simt::report().messages[0];
        if (!answer.o.empty()) {
          EXPECT_GT(simt::report().launches, launches);
        }
        EXPECT_TRUE(call.stayed_inside(before)) << "wrote outside of its outputs and workspace";
        Tensor& state = spec.in_place ? call.initial_state : call.final_state;
        if (!n) {
          ++served_[method->name];
          EXPECT_LE(relative_error(values(call.o), answer.o, answer.o), output_tolerance(spec.dtype));
          if (call.args.final_state) {
            EXPECT_LE(relative_error(values(*call.args.final_state), answer.state, answer.state),
                      std::max(state_tolerance(spec.dtype), state_tolerance(call.args.final_state->dtype)));
          }
          first_o = call.o.memory;
          first_state = state.memory;
        } else {
          EXPECT_TRUE(first_o == call.o.memory) << "o depends on the schedule";
          EXPECT_TRUE(first_state == state.memory) << "the state depends on the schedule";
        }
      }
    }
  }

  // Runs the gradients of the row that serves them, under the first `schedules` schedules.
  void check_gradients(Spec spec, int schedules = 1) {
    spec.device = {LC_CUDA, 0};
    spec.op = LC_BACKWARD;
    if (spec.decay == Decay::none) spec.wants &= ~8u;
    SCOPED_TRACE(describe(spec));
    std::vector<Bytes> first;
    for (int n = 0; n < schedules; ++n) {
      SCOPED_TRACE(n);
      Call call(spec);
      for (Tensor* t : call.gradients()) t->poison();
      const auto before = call.memory();
      ASSERT_EQ(LC_OK, run(call, kSchedules[n])) << lc_last_error();
      ASSERT_EQ(0, simt::report().errors()) << simt::report().messages[0];
      EXPECT_TRUE(call.stayed_inside(before)) << "wrote outside of its outputs and workspace";
      if (n) {
        EXPECT_TRUE(first == call.memory()) << "gradients depend on the schedule";
        continue;
      }
      first = call.memory();
      const Gradients want = reference_gradients(call.args);
      for (const Output& output : gradient_outputs(call, want))
        if (!output.tensor->memory.empty()) {
          EXPECT_LE(relative_error(values(*output.tensor), *output.want, *output.size), output.tolerance)
              << output.name;
        }
    }
  }

  static lc_status run(Call& call, const Schedule& schedule) {
    simt::options() = {schedule.policy, schedule.seed, simt::CpAsync::poison};
    const lc_status status = call.make_workspace();
    if (status != LC_OK) return status;
    simt::forget();
    const std::vector<Tensor*> gradients = call.gradients();
    for (const Tensor* t : call.tensors()) {
      const bool gradient = std::find(gradients.begin(), gradients.end(), t) != gradients.end();
      const bool written = gradient || call.args.o == t || call.args.final_state == t;
      const bool filled = !gradient && call.args.o != t &&
                          (call.args.final_state != t || call.spec.in_place || call.spec.op == LC_DECODE);
      if (t->device.type == LC_CUDA && !t->memory.empty())
        simt::allow(t->memory.data() + Tensor::kGuard, t->memory.size() - 2 * Tensor::kGuard, written, filled);
    }
    simt::allow(call.args.workspace, call.args.workspace_bytes, true, false);
    return lc_run(&call.args);
  }
  std::set<std::string> refusals_;
  std::map<std::string, int> served_;
  std::set<std::string> left_out_;  // methods that check() does not run
};

constexpr lc_dtype kInputs[] = {kF64, kF32, kF16, kBf16};
constexpr lc_dtype kOnMatrixUnit[] = {kF32, kF16, kBf16};

// Every row serves each of its dtypes. This is the smallest call with a second chunk.
TEST_F(Emulated, EveryRowServes) {
  for (lc_dtype dtype : kInputs) {
    Spec spec(dtype, 65, 16, 16);
    spec.heads(1, 1, 1);
    spec.B = 1;
    spec.initial = spec.final = true;
    served_.clear();
    check(spec);
    for (int i = 0; const lc_method_info* method = lc_method(i); ++i)
      if (!std::strcmp(method->device, "cuda") && (dtype != kF64 || std::strstr(lc_method_serves(i), "float64"))) {
        EXPECT_EQ(1, served_[method->name]) << method->name << " " << name(dtype);
      }
  }
}

// At least three chunks of 64, the last one ragged, with unequal head dims, under every schedule.
TEST_F(Emulated, Schedules) {
  for (lc_dtype dtype : kInputs)
    for (Decay decay : {Decay::head, Decay::token}) {
      Spec spec(dtype, 200, 40, 24);
      spec.B = 1;
      spec.decay = decay;
      if (decay == Decay::head) {
        spec.K = 9;
        spec.V = 12;
      }
      spec.initial = spec.final = true;
      check(spec, std::size(kSchedules));
    }
}

TEST_F(Emulated, TokensAndHeadDims) {
  constexpr int64_t head_dims[][2] = {{1, 1}, {16, 24}, {33, 17}, {64, 64}, {7, 80}, {128, 3}};
  for (lc_dtype dtype : kInputs)
    for (int64_t N : {1, 63, 64, 65, 130})
      for (const auto& dims : head_dims) {
        Spec spec(dtype, N, dims[0], dims[1]);
        spec.heads(1, 1, 1);
        spec.B = 1;
        spec.initial = spec.final = true;
        check(spec);
      }
}

TEST_F(Emulated, LargeHeadDims) {
  for (lc_dtype dtype : kInputs) {
    Spec spec(dtype, 70, 256, 256);
    spec.heads(1, 1, 1);
    spec.B = 1;
    spec.initial = spec.final = true;
    check(spec);
  }
}

// A device with less shared memory, and so few processors that blocks can be large.
TEST_F(Emulated, OneProcessor) {
  for (lc::cuda::Limits device : {simt::kAmpere, simt::kAda})
    for (lc_dtype dtype : kInputs)
      for (int64_t K : {40, 256}) {
        device.processors = 1;
        simt::device() = device;
        Spec spec(dtype, 35, K, 72);
        spec.heads(2, 1, 1);
        spec.B = 1;
        spec.decay = Decay::token;
        spec.in_place = true;
        check(spec);
      }
}

// A device with a cache so small that fft takes several passes, over units and over pairs of ranks.
TEST_F(Emulated, SmallCaches) {
  for (lc_dtype dtype : kInputs)
    for (int kilobytes : {1, 40, 200}) {
      simt::device().l2_bytes = kilobytes * 1024;
      Spec spec(dtype, 70, 7, 19);
      spec.Hq = 4;
      spec.initial = spec.final = true;
      check(spec);
    }
}

// More than 128 chunks, which take a third round of merges in the tree of recursive.
TEST_F(Emulated, LongSequences) {
  for (Decay decay : {Decay::head, Decay::token}) {
    Spec spec(kF32, 8300, 4, 8);
    spec.heads(1, 1, 1);
    spec.B = 1;
    spec.decay = decay;
    spec.gamma = 1 - 1e-4;
    spec.initial = spec.final = true;
    left_out_ = {"parallel"};  // quadratic
    check(spec);
    left_out_.clear();
    spec.N = 1500;
    spec.cu = {0, 590, 590, 600, 1500};
    spec.gamma = kMixed;
    check(spec);
  }
}

TEST_F(Emulated, Decays) {
  for (lc_dtype dtype : kInputs)
    for (Decay decay : {Decay::none, Decay::scalar, Decay::head, Decay::batch, Decay::token})
      for (double gamma : {0., 0.5, 1 - 1e-6, 1., kMixed}) {
        if (decay == Decay::none && gamma != 1) continue;
        Spec spec(dtype, 140, 8, 16);
        spec.decay = decay;
        spec.gamma = gamma;
        spec.initial = spec.final = true;
        check(spec);
      }
}

TEST_F(Emulated, GroupedHeads) {
  constexpr int64_t heads[][3] = {{4, 2, 2}, {4, 1, 1}, {2, 2, 4}, {1, 1, 4}, {4, 1, 2}, {2, 4, 1}};
  for (const auto& h : heads)
    for (Decay decay : {Decay::batch, Decay::token})
      for (bool in_place : {false, true}) {
        Spec spec(kF32, 70, 16, 16);
        spec.heads(h[0], h[1], h[2]);
        spec.decay = decay;
        spec.final = !in_place;
        spec.in_place = in_place;
        check(spec);
      }
}

TEST_F(Emulated, Layouts) {
  for (lc_dtype dtype : kInputs)
    for (bool bnhd : {false, true})
      for (bool strided : {false, true}) {
        Spec spec(dtype, 70, 24, 40);
        spec.bnhd = bnhd;
        spec.strided = strided;
        spec.decay = bnhd == strided ? Decay::token : Decay::head;
        spec.initial = spec.final = true;
        check(spec);
      }
}

TEST_F(Emulated, PackedSequences) {
  for (lc_dtype cu : {kI32, kI64})
    for (const Index& bounds : {Index{0, 0, 5, 5, 141, 230}, Index{0, 230}, Index{0, 64, 128, 230}})
      for (Decay decay : {Decay::head, Decay::token}) {
        Spec spec(kF32, 230, 8, 16);
        spec.B = 1;
        spec.cu = bounds;
        spec.cu_dtype = cu;
        spec.decay = decay;
        spec.initial = spec.final = true;
        check(spec);
      }
}

// Several segments of scan and block, with constant decays that a segment forgets and that it does
// not.
TEST_F(Emulated, Segments) {
  left_out_ = {"parallel"};  // quadratic
  for (double gamma : {0., 0.5, 0.95, 1 - 1e-6, 1., kMixed})
    for (Decay decay : {Decay::head, Decay::token}) {
      Spec spec(gamma == 0.5 ? kF32 : kBf16, 700, 8, 16);
      spec.B = 1;
      spec.decay = decay;
      spec.gamma = gamma;
      spec.initial = spec.final = true;
      check(spec);
    }
  for (const Index& bounds : {Index{0, 0, 300, 300, 310, 950, 1000}, Index{0, 1000}, Index{0, 256, 512, 1000}})
    for (Decay decay : {Decay::head, Decay::token}) {
      Spec spec(kBf16, 1000, 8, 16);
      spec.B = 1;
      spec.cu = bounds;
      spec.decay = decay;
      spec.initial = spec.final = true;
      check(spec);
    }
  for (bool in_place : {false, true}) {
    Spec spec(kBf16, 520, 16, 16);
    spec.Hq = 4;
    spec.decay = Decay::token;
    spec.final = !in_place;
    spec.in_place = in_place;
    check(spec);
  }
}

// The divisions of the columns of V and of shared memory, which depend on the number of processors
// and on their shared memory.
TEST_F(Emulated, Devices) {
  const std::pair<lc::cuda::Limits, int> devices[] = {
      {simt::kHopper, 1}, {simt::kHopper, 132}, {simt::kAmpere, 108}, {simt::kAda, 1}};
  for (const auto& [device, processors] : devices)
    for (lc_dtype dtype : {kF32, kF16, kBf16})
      for (int64_t K : {128, 256}) {
        simt::device() = device;
        simt::device().processors = processors;
        Spec spec(dtype, 130, K, 144);
        spec.heads(1, 1, 1);
        spec.B = 1;
        spec.final = true;
        check(spec);
      }
  const std::set<std::string> small = {"K is too large for the shared memory of this device"};
  for (const std::string& refusal : refusals_) EXPECT_NE(std::string::npos, refusal.find(*small.begin())) << refusal;
}

TEST_F(Emulated, NoBankConflicts) {
  for (lc_dtype dtype : {kF16, kBf16}) {
    Spec spec(dtype, 130, 128, 64);
    spec.heads(1, 1, 1);
    spec.B = 1;
    check(spec);
  }
  EXPECT_GT(simt::report().ldmatrix_phases, 0);
  EXPECT_EQ(0, simt::report().ldmatrix_conflicts);
}

// States and scores that exceed the range of float16.
TEST_F(Emulated, LargeStates) {
  for (lc_dtype dtype : {kF16, kBf16}) {
    Spec spec(dtype, 200, 64, 16);
    spec.heads(1, 1, 1);
    spec.B = 1;
    spec.decay = Decay::none;
    spec.scale = 1e-6;
    spec.initial = spec.final = true;
    spec.magnitude = 100;
    check(spec);
  }
}

// Rounding errors do not grow with the sequence.
TEST_F(Emulated, RoundingOfLongSequences) {
  for (lc_dtype dtype : {kF32, kF16, kBf16})
    for (double gamma : {1 - 1e-6, 1.}) {
      Spec spec(dtype, 8192, 16, 16);
      spec.heads(1, 1, 1);
      spec.B = 1;
      spec.decay = gamma == 1 ? Decay::token : Decay::head;
      spec.gamma = gamma;
      spec.final = true;
      left_out_ = {"parallel"};  // quadratic
      check(spec);
      left_out_.clear();
      spec.N = 1500;
      check(spec);
    }
}

// Every type of pool, with skipped slots, and a slot outside of the pool, which no kernel may
// touch.
TEST_F(Emulated, Decode) {
  for (lc_dtype dtype : kInputs)
    for (lc_dtype pool : kInputs)
      for (int64_t N : {1, 3, 64})
        for (const Index& indices : {Index{}, Index{4, -1, 7}})
          for (bool strided : {false, true}) {
            if ((pool == kF64) != (dtype == kF64)) continue;
            if (N == 64 && strided == indices.empty()) continue;
            Spec spec(dtype, N, 22, 40);
            spec.op = LC_DECODE;
            spec.pool = pool;
            spec.B = 3;
            spec.slots = 5;
            spec.indices = indices;
            spec.index_dtype = N == 3 ? kI64 : kI32;
            spec.Hq = N == 3 ? 4 : 2;
            spec.strided = strided;
            spec.bnhd = strided;
            spec.decay = N == 1 ? Decay::head : Decay::token;
            check(spec, N == 3 ? int(std::size(kSchedules)) : 1);
          }
  EXPECT_GT(served_["recurrent"], 0);
}

// Blocks with the most threads, a state cut into slices, and a device that is full without slices.
TEST_F(Emulated, DecodeHeadDims) {
  constexpr int64_t head_dims[][2] = {{1, 1}, {128, 128}, {256, 256}, {300, 20}, {1024, 4}, {3, 1100}};
  for (lc_dtype dtype : kInputs)
    for (int64_t B : {1, 300})
      for (const auto& dims : head_dims) {
        if (B > 1 && dims[0] * dims[1] > 100) continue;
        Spec spec(dtype, 1, dims[0], dims[1]);
        spec.heads(2, 2, 2);
        spec.op = LC_DECODE;
        spec.B = B;
        check(spec);
      }
}

// A rounding error of the decay would be raised to the number of tokens.
TEST_F(Emulated, DecodesManyTokensOfSlowStates) {
  constexpr int kCalls = 24, kTokens = 64;
  Spec spec(kF32, kCalls * kTokens, 8, 8);
  spec.heads(1, 1, 1);
  spec.device = {LC_CUDA, 0};
  spec.B = 1;
  spec.gamma = 1 - 1e-6;
  spec.in_place = true;
  Call call(spec);
  const Answer answer = reference(call.args);
  call.args.op = LC_DECODE;
  call.args.method = "recurrent";
  call.args.initial_state = nullptr;
  for (int i = 0; i < kCalls; ++i) {
    for (Tensor* t : {&call.q, &call.k, &call.v, &call.o}) {
      t->sizes[2] = kTokens;
      t->byte_offset = uint64_t(i) * kTokens * t->steps[2] * sizeof(float);
    }
    ASSERT_EQ(LC_OK, run(call, kSchedules[0])) << lc_last_error();
  }
  call.o.sizes[2] = spec.N;
  call.o.byte_offset = 0;
  EXPECT_LE(relative_error(values(call.o), answer.o, answer.o), output_tolerance(kF32));
  EXPECT_LE(relative_error(values(call.initial_state), answer.state, answer.state), state_tolerance(kF32));
}

// Devices differ in the shared memory of a block and in the number of processors.
TEST_F(Emulated, DecodeDevices) {
  for (const lc::cuda::Limits& device : {simt::kHopper, simt::kAmpere, simt::kAda})
    for (lc_dtype dtype : kInputs)
      for (int64_t K : {256, 1100}) {
        simt::device() = device;
        Spec spec(dtype, 2, K, 136);
        spec.heads(2, 1, 1);
        spec.op = LC_DECODE;
        spec.B = 1;
        spec.decay = Decay::token;
        served_.clear();
        check(spec);
        EXPECT_EQ(K == 256, served_["recurrent"]);
      }
  Spec spec;
  spec.dtype = kF64;
  spec.N = 1;
  spec.K = 1100;
  check(spec);
  EXPECT_EQ(0, served_["recurrent"]);
}

// ---- Mamba-2

// chunk, scan, block, recursive and recurrent serve every part in every dtype that they have.
TEST_F(Emulated, Mamba2) {
  constexpr int64_t shapes[][3] = {{1, 16, 24}, {65, 16, 24}, {200, 33, 17}, {130, 1, 80}};
  for (lc_dtype dtype : kInputs)
    for (Parts parts : kParts)
      for (const auto& [N, K, V] : shapes) {
        served_.clear();
        check(mamba2(dtype, N, K, V, parts));
        for (const char* name : {"chunk", "scan", "block", "recursive"})
          EXPECT_EQ(dtype != kF64, served_[name]) << name;
        EXPECT_EQ(1, served_["recurrent"]);
      }
}

// Head dims of models: Nemotron Nano, Puzzle, Falcon-H1, Zamba2.
TEST_F(Emulated, Mamba2HeadDims) {
  constexpr int64_t head_dims[][2] = {{128, 80}, {96, 64}, {256, 64}, {64, 64}, {128, 64}};
  for (lc_dtype dtype : kOnMatrixUnit)
    for (const auto& [K, V] : head_dims) {
      Spec spec = mamba2(dtype, 70, K, V, Parts::all);
      spec.Hv = 1;
      check(spec);
    }
}

TEST_F(Emulated, Mamba2Schedules) {
  for (lc_dtype dtype : kInputs) check(mamba2(dtype, 200, 24, 16, Parts::all), std::size(kSchedules));
}

TEST_F(Emulated, Mamba2Segments) {
  for (lc_dtype dtype : {kF32, kBf16}) {
    Spec spec = mamba2(dtype, 700, 8, 16, Parts::all);
    check(spec);
    spec.N = 1000;
    spec.cu = {0, 0, 300, 300, 310, 950, 1000};
    check(spec);
    spec.in_place = true;
    spec.final = false;
    check(spec);
  }
}

// Tokens of length 0 and tokens so long that they decay the state to nothing, with decays from none
// to -inf. Lengths of float16 are scaled to the range of its products.
TEST_F(Emulated, Mamba2Lengths) {
  for (lc_dtype dtype : kInputs)
    for (double gamma : {0., 0.5, 1.})
      for (const auto& [least, most] : {std::pair{1e-6, 1e-6}, std::pair{3e4, 3e4}, std::pair{0., 1e-30}}) {
        Spec spec = mamba2(dtype, 140, 8, 16, Parts::lengths);
        spec.gamma = gamma;
        spec.dt_min = least;
        spec.dt_max = most;
        spec.initial = false;
        spec.scale = 1 / most;
        check(spec);
      }
}

TEST_F(Emulated, Mamba2Decode) {
  constexpr int64_t head_dims[][2] = {{22, 40}, {128, 64}, {1, 3}, {7, 1}, {256, 80}};
  for (lc_dtype dtype : kInputs)
    for (lc_dtype pool : kInputs)
      for (Parts parts : kParts)
        for (const auto& [K, V] : head_dims) {
          if ((pool == kF64) != (dtype == kF64) || (K > 100 && parts != Parts::all)) continue;
          Spec spec = mamba2(dtype, K == 22 ? 3 : 1, K, V, parts);
          spec.op = LC_DECODE;
          spec.pool = pool;
          spec.B = 3;
          spec.slots = 5;
          if (parts != Parts::states) spec.indices = {4, -1, 0};
          served_.clear();
          check(spec, K == 22 && parts == Parts::all ? int(std::size(kSchedules)) : 1);
          EXPECT_EQ(1, served_["recurrent"]);
        }
}

TEST_F(Emulated, Mamba2Gradients) {
  constexpr int64_t shapes[][4] = {{1, 1, 16, 24}, {3, 1, 33, 17}, {4, 2, 64, 64}, {2, 2, 7, 80}, {1, 1, 128, 3}};
  for (lc_dtype dtype : kOnMatrixUnit)
    for (Parts parts : {Parts::lengths, Parts::limits, Parts::states})
      for (const auto& [heads, groups, K, V] : shapes)
        for (int64_t N : {1, 130}) {
          Spec spec = mamba2(dtype, N, K, V, parts);
          spec.heads(groups, groups, heads);
          spec.transposed = heads > 1;
          check_gradients(spec);
        }
}

TEST_F(Emulated, Mamba2GradientsOfSegments) {
  for (lc_dtype dtype : kOnMatrixUnit) {
    Spec spec = mamba2(dtype, 2200, 8, 16, Parts::limits);
    spec.heads(1, 1, 2);
    spec.transposed = true;
    spec.gamma = 0.9;
    check_gradients(spec);
    spec.decay = Decay::head;
    spec.cu = {0, 0, 300, 300, 310, 2150, 2200};
    check_gradients(spec, 2);
  }
}

TEST_F(Emulated, Mamba2SomeGradients) {
  for (unsigned wants = 1; wants < 64; ++wants) {
    Spec spec = mamba2(wants % 2 ? kF32 : kBf16, 140, 8, 16, wants % 4 < 2 ? Parts::lengths : Parts::limits);
    spec.wants = wants;
    spec.transposed = wants % 3;
    spec.initial = wants % 5;
    spec.final = wants % 7;
    spec.d_o = !spec.final || wants % 11;
    if (wants % 13 == 0) spec.decay = Decay::none;
    check_gradients(spec);
  }
}

// ---- gradients

TEST_F(Emulated, GradientsOfTokensAndHeadDims) {
  constexpr int64_t head_dims[][2] = {{1, 1}, {16, 24}, {33, 17}, {64, 64}, {7, 80}, {128, 3}};
  for (lc_dtype dtype : kOnMatrixUnit)
    for (int64_t N : {1, 63, 64, 65, 130})
      for (const auto& dims : head_dims) {
        Spec spec(dtype, N, dims[0], dims[1]);
        spec.heads(1, 1, 1);
        spec.B = 1;
        spec.initial = spec.final = N != 65;
        spec.decay = N == 63 ? Decay::head : Decay::token;
        check_gradients(spec);
      }
}

TEST_F(Emulated, GradientSchedules) {
  for (lc_dtype dtype : kOnMatrixUnit)
    for (Decay decay : {Decay::none, Decay::head, Decay::token}) {
      Spec spec(dtype, 330, 40, 24);
      spec.B = 1;
      spec.decay = decay;
      spec.initial = spec.final = true;
      check_gradients(spec, std::size(kSchedules));
    }
}

TEST_F(Emulated, GradientsOfLargeHeadDims) {
  constexpr int64_t head_dims[][2] = {{256, 256}, {128, 144}, {250, 16}};
  for (lc_dtype dtype : kOnMatrixUnit)
    for (Decay decay : {Decay::none, Decay::head, Decay::token})
      for (const auto& dims : head_dims) {
        Spec spec(dtype, 70, dims[0], dims[1]);
        spec.heads(1, 1, 1);
        spec.B = 1;
        spec.decay = decay;
        spec.initial = spec.final = true;
        check_gradients(spec);
      }
}

TEST_F(Emulated, GradientsOfDecays) {
  for (lc_dtype dtype : kOnMatrixUnit)
    for (Decay decay : {Decay::none, Decay::scalar, Decay::head, Decay::batch, Decay::token})
      for (double gamma : {0., 1e-4, 0.5, 1 - 1e-6, 1., kMixed}) {
        if (decay == Decay::none && gamma != 1) continue;
        Spec spec(dtype, 140, 8, 16);
        spec.decay = decay;
        spec.gamma = gamma;
        spec.initial = spec.final = true;
        check_gradients(spec);
      }
}

// Every combination of requested gradients and optional inputs.
TEST_F(Emulated, SomeGradients) {
  for (unsigned wants = 1; wants < 32; ++wants)
    for (int given = 0; given < 4; ++given) {
      Spec spec(kF32, 300, 4, 8);
      spec.heads(2, 1, 1);
      spec.B = 1;
      spec.decay = wants & 1 ? Decay::token : Decay::head;
      spec.wants = wants;
      spec.initial = given & 1;
      spec.final = given != 0;
      spec.d_o = given != 2;
      check_gradients(spec);
    }
}

TEST_F(Emulated, GradientsOfGroupedHeads) {
  constexpr int64_t heads[][3] = {{4, 2, 2}, {4, 1, 1}, {2, 2, 4}, {1, 1, 4}, {4, 1, 2}, {2, 4, 1}};
  for (lc_dtype dtype : {kF32, kBf16})
    for (const auto& h : heads)
      for (Decay decay : {Decay::batch, Decay::token}) {
        Spec spec(dtype, 270, 16, 8);
        spec.heads(h[0], h[1], h[2]);
        spec.decay = decay;
        spec.initial = spec.final = true;
        check_gradients(spec);
      }
}

TEST_F(Emulated, GradientLayouts) {
  for (lc_dtype dtype : kOnMatrixUnit)
    for (bool bnhd : {false, true})
      for (bool strided : {false, true}) {
        Spec spec(dtype, 70, 24, 40);
        spec.bnhd = bnhd;
        spec.strided = strided;
        spec.decay = bnhd == strided ? Decay::token : Decay::head;
        spec.initial = spec.final = true;
        check_gradients(spec);
      }
}

// Segments that heads forget and do not forget; checkpoints at every 1024 tokens; packed sequences.
TEST_F(Emulated, GradientsOfSegments) {
  for (double gamma : {0., 0.5, 0.95, 1 - 1e-6, 1., kMixed})
    for (Decay decay : {Decay::head, Decay::token}) {
      Spec spec(gamma == 0.5 ? kF32 : kBf16, gamma == 0.95 ? 2200 : 700, 8, 16);
      spec.B = 1;
      spec.decay = decay;
      spec.gamma = gamma;
      spec.initial = spec.final = true;
      check_gradients(spec);
    }
  for (lc_dtype cu : {kI32, kI64})
    for (const Index& bounds : {Index{0, 0, 300, 300, 310, 1450, 1500}, Index{0, 1500}, Index{0, 256, 512, 1500}})
      for (Decay decay : {Decay::head, Decay::token}) {
        Spec spec(cu == kI32 ? kBf16 : kF32, 1500, 8, 16);
        spec.B = 1;
        spec.cu = bounds;
        spec.cu_dtype = cu;
        spec.decay = decay;
        spec.initial = spec.final = true;
        check_gradients(spec);
      }
}

// A device that is full without segments: states pass through a whole sequence, and errors must not
// grow.
TEST_F(Emulated, GradientsOfLongSequences) {
  simt::device().processors = 1;
  for (lc_dtype dtype : kOnMatrixUnit)
    for (Decay decay : {Decay::head, Decay::token})
      for (double gamma : {0.9, 1 - 1e-4, 1.}) {
        Spec spec(dtype, 4200, 8, 16);
        spec.heads(1, 1, 1);
        spec.B = 1;
        spec.decay = decay;
        spec.gamma = gamma;
        spec.final = true;
        check_gradients(spec);
      }
}

TEST_F(Emulated, GradientDevices) {
  for (const lc::cuda::Limits& device : {simt::kHopper, simt::kAmpere, simt::kAda})
    for (lc_dtype dtype : kOnMatrixUnit)
      for (int64_t K : {128, 256}) {
        if (device.shared_block == simt::kAda.shared_block && K == 256) continue;
        simt::device() = device;
        simt::device().processors = K == 128 ? 1 : 100;
        Spec spec(dtype, 100, 40, K);
        spec.heads(2, 1, 1);
        spec.B = 1;
        spec.decay = Decay::token;
        spec.final = true;
        check_gradients(spec);
        spec.wants = 7;
        check_gradients(spec);
      }
}

TEST_F(Emulated, GradientsHaveOneRow) {
  Spec spec;
  spec.op = LC_BACKWARD;
  spec.device = {LC_CUDA, 0};
  for (const char* method : {"scan", "recurrent"}) {
    Call call(spec);
    call.args.method = method;
    EXPECT_EQ(LC_UNSUPPORTED, call.run());
    EXPECT_NE(nullptr, std::strstr(lc_last_error(),
                                   "does not compute gradients; method chunk does, and its gradients are valid"));
  }
  spec.dtype = kF64;
  Call call(spec);
  EXPECT_EQ(LC_UNSUPPORTED, call.run());
  EXPECT_NE(nullptr, std::strstr(lc_last_error(), "chunk: does not compute in float64 on a GPU; on the CPU it does"));
}

TEST_F(Emulated, NothingToDo) {
  for (int64_t B : {0, 2}) {
    Spec spec;
    spec.B = B;
    spec.N = 0;
    spec.initial = spec.final = true;
    check(spec);
  }
}

// For a run with LEETCORE_CUFFT=/nowhere/libcufft.so.
TEST(WithoutCufft, IsRefusedWithWhatToDo) {
  const std::string chosen = std::getenv("LEETCORE_CUFFT");
  if (chosen == CUFFT_DOUBLE) GTEST_SKIP() << "there is one";
  Spec spec;
  spec.device = {LC_CUDA, 0};
  Call call(spec);
  char text[4096];
  ASSERT_EQ(LC_OK, lc_explain(&call.args, text, sizeof text)) << lc_last_error();
  EXPECT_NE(nullptr, std::strstr(text, "cannot: needs cuFFT, which was not found: pip install nvidia-cufft"));
  call.args.method = "fft";
  EXPECT_EQ(LC_UNSUPPORTED, call.run());
  EXPECT_NE(nullptr, std::strstr(lc_last_error(), "fft: needs cuFFT"));
}

}  // namespace
