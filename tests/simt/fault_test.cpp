// fault_test.cpp - tests of the emulator: small kernels with one fault each. Every schedule must
// find the fault and count it in the right counter; the same kernel without the fault must have no
// reports. One file: a list of small kernels.
#include <gtest/gtest.h>

#include <vector>

#include "../../cpp/simt/simt.h"
#include "device_host.h"

namespace {

using namespace simt;

constexpr int kThreads = 128, kBlocks = 2, kNumbers = 1024;

// The memory of the kernels: numbers to read, numbers to write, a workspace between two launches,
// and gaps that no kernel may access.
struct Memory {
  alignas(16) float in[kNumbers], gap[4], out[kNumbers], another_gap[4], work[kNumbers];
};
struct Arguments {
  gptr<const float> in;
  gptr<float> out, work;
};

template <bool kFault>
struct Kernel {
  static constexpr const char* kName = "kernel under test";
  static constexpr int kMaxThreads = kThreads, kMinBlocks = 1;
  using Params = Arguments;
};

// Index of this thread among the threads of all blocks.
int global_id() { return int(bid().x) * kThreads + tid(); }

// ---- shared memory ------------------------------------------------------------------------------

template <bool kFault>
struct BarrierAfterWrite : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(kThreads);
    s.st(tid(), a.in.ld(tid()));
    if (!kFault) sync_cta();
    a.out.st(global_id(), s.ld(kThreads - 1 - tid()));
  }
};

template <bool kFault>
struct BarrierBeforeOverwriting : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(kThreads);
    float sum = 0;
    for (int i = 0; i < 3; ++i) {
      s.st(tid(), a.in.ld(i * kThreads + tid()));
      sync_cta();
      sum += s.ld((tid() + 32) % kThreads);
      if (!kFault) sync_cta();
    }
    a.out.st(global_id(), sum);
  }
};

template <bool kFault>
struct BarrierOfAWarp : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(kThreads);
    s.st(tid(), a.in.ld(tid()));
    if (!kFault) sync_warp();
    a.out.st(global_id(), s.ld(tid() ^ 1));
  }
};

// A shuffle synchronizes the lanes, but orders no memory accesses.
template <bool kFault>
struct ShuffleIsNoBarrier : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(kThreads);
    s.st(tid(), a.in.ld(tid()));
    const float x = shfl_xor(a.in.ld(tid()), 1);
    if (!kFault) sync_warp();
    a.out.st(global_id(), x + s.ld(tid() ^ 1));
  }
};

template <bool kFault>
struct ReadOfWhatNobodyWrote : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(2 * kThreads);
    s.st(tid(), a.in.ld(tid()));
    a.out.st(global_id(), s.ld(tid() + (kFault ? kThreads : 0)));
  }
};

// Shared memory does not keep the data of an earlier block.
template <bool kFault>
struct ReadOfAnotherBlocksShared : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(kThreads);
    if (!kFault || bid().x == 0) s.st(tid(), a.in.ld(tid()));
    a.out.st(global_id(), s.ld(tid()));
  }
};

template <bool kFault>
struct SharedIndex : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(kThreads);
    s.st(tid(), 1);
    a.out.st(global_id(), s.ld(tid() + (kFault ? 1 : 0)));
  }
};

// An index inside of the memory, but outside of the view.
template <bool kFault>
struct IndexOfAPart : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(2 * kThreads), first = s.sub(0, kThreads);
    s.st(tid(), 1);
    s.st(kThreads + tid(), 2);
    a.out.st(global_id(), first.ld(tid() + (kFault ? kThreads : 0)));
  }
};

template <bool kFault>
struct SharedVectorAlignment : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(4 * kThreads + 4);
    for (int i = 0; i < 4; ++i) s.st(4 * tid() + i + (kFault ? 1 : 0), 1);
    a.out.st(global_id(), s.template ldv<float4>(4 * tid() + (kFault ? 1 : 0)).w);
  }
};

template <bool kFault>
struct MoreThanWasAskedFor : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>((kFault ? 2 : 1) * kNumbers);
    s.st(tid(), 1);
    a.out.st(global_id(), s.ld(tid()));
  }
};

// ---- global memory ------------------------------------------------------------------------------

template <bool kFault>
struct GlobalRead : Kernel<kFault> {
  static void run(const Arguments& a) { a.out.st(global_id(), a.in.ld(kFault && tid() == 5 ? kNumbers : tid())); }
};

template <bool kFault>
struct GlobalWrite : Kernel<kFault> {
  static void run(const Arguments& a) { a.out.st(global_id() - (kFault && global_id() == 0 ? 1 : 0), 1); }
};

template <bool kFault>
struct WriteToAnInput : Kernel<kFault> {
  static void run(const Arguments& a) {
    const gptr<float> in{const_cast<float*>(a.in.p)};
    (kFault ? in : a.out).st(global_id(), 1);
  }
};

template <bool kFault>
struct GlobalVectorAlignment : Kernel<kFault> {
  static void run(const Arguments& a) {
    a.out.st(global_id(), a.in.template ldv<float4>(4 * tid() + (kFault ? 2 : 0)).x);
  }
};

template <bool kFault>
struct GlobalNumberAlignment : Kernel<kFault> {
  static void run(const Arguments& a) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(a.in.p) + (kFault ? 2 : 0);
    a.out.st(global_id(), gptr<const float>{reinterpret_cast<const float*>(bytes)}.ld(tid()));
  }
};

template <bool kFault>
struct ReadOfAnOutput : Kernel<kFault> {
  static void run(const Arguments& a) {
    if (!kFault) a.out.st(global_id(), 1);
    a.out.st(global_id(), a.out.ld(global_id()));
  }
};

template <bool kFault>
struct GlobalWithinABlock : Kernel<kFault> {
  static void run(const Arguments& a) {
    a.work.st(global_id(), a.in.ld(tid()));
    if (!kFault) sync_cta();
    a.out.st(global_id(), a.work.ld(global_id() ^ 64));
  }
};

template <bool kFault>
struct BlocksWriteTheSame : Kernel<kFault> {
  static void run(const Arguments& a) { a.out.st(kFault ? tid() : global_id(), 1); }
};

// One block reads memory that the other block writes, in either order.
template <bool kFault>
struct BlockReadsWhatAnotherWrites : Kernel<kFault> {
  static void run(const Arguments& a) {
    if (bid().x == 0)
      a.work.st(tid(), a.in.ld(tid()));
    else if (kFault)
      a.out.st(tid(), a.work.ld(tid()));
  }
};

// Two blocks read, and then the second block writes.
template <bool kFault>
struct BlockWritesWhatAnotherRead : Kernel<kFault> {
  static void run(const Arguments& a) {
    a.out.st(global_id(), a.work.ld(kFault ? tid() : global_id()));
    sync_cta();
    a.work.st(global_id() % (kFault ? kThreads : kNumbers), 1);
  }
};

// ---- cp.async -----------------------------------------------------------------------------------

template <bool kFault>
struct ShortWait : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(8 * kThreads);
    for (int stage = 0; stage < 2; ++stage) {
      cp_async16(s, 4 * (stage * kThreads + tid()), a.in, 4 * tid());
      cp_commit();
    }
    if (kFault)
      cp_wait<1>();
    else
      cp_wait<0>();
    a.out.st(global_id(), s.ld(4 * tid()) + s.ld(4 * (kThreads + tid())));
    cp_wait<0>();
  }
};

template <bool kFault>
struct Commit : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(4 * kThreads);
    cp_async16(s, 4 * tid(), a.in, 4 * tid());
    if (!kFault) cp_commit();
    cp_wait<0>();
    a.out.st(global_id(), s.ld(4 * tid()));
  }
};

template <bool kFault>
struct WaitAtTheEnd : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(4 * kThreads);
    cp_async16(s, 4 * tid(), a.in, 4 * tid());
    cp_commit();
    a.out.st(global_id(), a.in.ld(tid()));
    if (!kFault) cp_wait<0>();
  }
};

// A thread waits only for its own copies; other threads see them after a barrier.
template <bool kFault>
struct BarrierAfterTheWait : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(4 * kThreads);
    cp_async16(s, 4 * tid(), a.in, 4 * tid());
    cp_commit();
    if (kFault) {
      sync_cta();
      cp_wait<0>();
    } else {
      cp_wait<0>();
      sync_cta();
    }
    a.out.st(global_id(), s.ld(4 * ((tid() + 1) % kThreads)));
  }
};

template <bool kFault>
struct WriteUnderACopy : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(4 * kThreads);
    cp_async16(s, 4 * tid(), a.in, 4 * tid());
    cp_commit();
    if (!kFault) cp_wait<0>();
    s.st(4 * tid() + 1, 1);
    cp_wait<0>();
    a.out.st(global_id(), s.ld(4 * tid()));
  }
};

// The ring of a loop: a stage may be filled again once all threads have read it.
template <bool kFault>
struct Ring : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(8 * kThreads);
    const auto fill = [&](int step) {
      if (step < 2) cp_async16(s, 4 * (step % 2 * kThreads + tid()), a.in, 4 * (step % 2 * kThreads + tid()));
      cp_commit();
    };
    float sum = 0;
    fill(0);
    for (int step = 0; step < 4; ++step) {
      if (step + 1 < 4) cp_async16(s, 4 * ((step + 1) % 2 * kThreads + tid()), a.in, 4 * tid());
      cp_commit();
      cp_wait<1>();
      sync_cta();
      sum += s.ld(4 * (step % 2 * kThreads + (tid() + 40) % kThreads));
      if (!kFault) sync_cta();
    }
    a.out.st(global_id(), sum);
  }
};

template <bool kFault>
struct CopyAlignment : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(4 * kThreads + 4);
    cp_async16(s, 4 * tid() + (kFault ? 2 : 0), a.in, 4 * tid());
    cp_commit();
    cp_wait<0>();
    a.out.st(global_id(), 1);
  }
};

template <bool kFault>
struct CopyBehindTheEnd : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(4 * kThreads);
    const bool last = kFault && tid() == 0;
    cp_async16(s, 4 * tid(), a.in, last ? kNumbers : 0, 4);
    cp_commit();
    cp_wait<0>();
    a.out.st(global_id(), 1);
  }
};

// ---- collectives and barriers -------------------------------------------------------------------

template <bool kFault>
struct CollectiveInABranch : Kernel<kFault> {
  static void run(const Arguments& a) {
    float x = a.in.ld(tid());
    if (!kFault)
      x = shfl_xor(x, 16);
    else if (lane() < 16)
      x = shfl_xor(x, 8);
    else
      x = shfl_xor(x, 4);
    a.out.st(global_id(), x);
  }
};

template <bool kFault>
struct CollectiveOfHalfAWarp : Kernel<kFault> {
  static void run(const Arguments& a) {
    float x = a.in.ld(tid());
    if (!kFault || lane() < 16) x = shfl_xor(x, 8);
    a.out.st(global_id(), x);
  }
};

template <bool kFault>
struct EarlyReturn : Kernel<kFault> {
  static void run(const Arguments& a) {
    if (kFault && tid() >= 96) return;
    sync_cta();
    a.out.st(global_id(), 1);
  }
};

template <bool kFault>
struct BarriersOfTwoBranches : Kernel<kFault> {
  static void run(const Arguments& a) {
    if (!kFault)
      sync_cta();
    else if (warp() % 2)
      sync_cta();
    else
      sync_cta();
    a.out.st(global_id(), 1);
  }
};

template <bool kFault>
struct BarrierOfHalfWarps : Kernel<kFault> {
  static void run(const Arguments& a) {
    if (kFault ? lane() < 16 && warp() < 2 : warp() == 0) sync_named(1, 32);
    a.out.st(global_id(), 1);
  }
};

template <bool kFault>
struct BarrierForTooMany : Kernel<kFault> {
  static void run(const Arguments& a) {
    if (warp() < 2) sync_named(1, kFault ? 96 : 64);
    a.out.st(global_id(), 1);
  }
};

template <bool kFault>
struct NumberOfABarrier : Kernel<kFault> {
  static void run(const Arguments& a) {
    sync_named(kFault ? 16 : 15, kThreads);
    a.out.st(global_id(), 1);
  }
};

// Two pairs of warps, each with its own barrier, exchange numbers many times. Only the last barrier
// orders accesses of different pairs; the barrier of a pair orders nothing of the other pair.
template <bool kFault>
struct NamedBarriers : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<float>(kThreads);
    const int pair = warp() / 2;
    float sum = 0;
    for (int i = 0; i < (pair ? 9 : 3); ++i) {
      s.st(tid(), a.in.ld(tid()));
      sync_named(1 + pair, 64);
      sum += s.ld(tid() ^ 32);
      sync_named(1 + pair, 64);
    }
    if (!kFault) sync_cta();
    a.out.st(global_id(), sum + s.ld(tid() ^ 64));
  }
};

// One warp fills memory that three warps read, with barriers "full" and "free".
template <bool kFault>
struct ProducerAndConsumers : Kernel<kFault> {
  static void run(const Arguments& a) {
    constexpr int kSteps = 6, kFull = 1, kFree = 2;
    Smem smem;
    const auto s = smem.alloc<float>(32);
    float sum = 0;
    for (int step = 0; step < kSteps; ++step) {
      if (warp() == 0) {
        if (step > 0 && !kFault) sync_named(kFree, kThreads);
        s.st(lane(), a.in.ld(32 * step + lane()));
        sync_named(kFull, kThreads);
      } else {
        sync_named(kFull, kThreads);
        sum += s.ld(lane());
        if (step + 1 < kSteps && !kFault) sync_named(kFree, kThreads);
      }
    }
    a.out.st(global_id(), sum);
  }
};

// ---- the matrix unit ----------------------------------------------------------------------------

template <bool kFault>
struct LdmatrixRow : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<uint16_t>(32 * 8 + 8);
    for (int i = tid(); i < 32 * 8 + 8; i += nthreads()) s.st(i, uint16_t(i));
    sync_cta();
    uint32_t r[4];
    ldmatrix_x4(r, s, 8 * lane() + (kFault ? 4 : 0));
    a.out.st(global_id(), float(r[0]));
  }
};

template <bool kFault>
struct LdmatrixBeforeTheBarrier : Kernel<kFault> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<uint16_t>(32 * 8);
    for (int i = tid(); i < 32 * 8; i += nthreads()) s.st(i, uint16_t(i));
    if (!kFault) sync_cta();
    uint32_t r[4];
    ldmatrix_x4(r, s, 8 * lane());
    a.out.st(global_id(), float(r[0]));
  }
};

// A 16 x 8 product. The fault swaps two registers of the left operand.
template <bool kFault>
struct Product : Kernel<kFault> {
  static void run(const Arguments& a) {
    const int g = lane() / 4, t = lane() % 4;
    const float left[4] = {a.in.ld(g * 8 + t), a.in.ld((g + 8) * 8 + t), a.in.ld(g * 8 + t + 4),
                           a.in.ld((g + 8) * 8 + t + 4)};
    const float swapped[4] = {left[0], left[2], left[1], left[3]};
    float c[4] = {};
    Mma<float>::m16n8k8(c, kFault ? swapped : left, a.in.ld(128 + t * 8 + g), a.in.ld(128 + (t + 4) * 8 + g));
    if (global_id() >= 32) return;
    for (int e = 0; e < 4; ++e) a.out.st((g + e / 2 * 8) * 8 + 2 * t + e % 2, c[e]);
  }
};

// ---- running the kernels ------------------------------------------------------------------------

struct Schedule {
  Policy policy;
  uint64_t seed;
  CpAsync cp_async;
};
std::vector<Schedule> schedules() {
  std::vector<Schedule> all;
  for (Policy policy : {Policy::lockstep, Policy::sticky, Policy::random, Policy::warp_priority})
    for (CpAsync cp_async : {CpAsync::immediate, CpAsync::delayed, CpAsync::poison})
      for (uint64_t seed : {1, 2, 3}) all.push_back({policy, seed, cp_async});
  return all;
}

class Fault : public ::testing::Test {
 protected:
  void SetUp() override {
    for (int i = 0; i < kNumbers; ++i) {
      memory_.in[i] = float(i % 13 - 6);
      memory_.work[i] = 0;
    }
  }
  void TearDown() override {
    options() = {};
    report() = {};
    device() = kHopper;
    forget();
  }

  void allow_all(bool work_filled = true) {
    forget();
    allow(memory_.in, sizeof memory_.in, false);
    allow(memory_.out, sizeof memory_.out, true, false);
    allow(memory_.work, sizeof memory_.work, true, work_filled);
  }
  template <class K>
  const char* launch_one(int blocks = kBlocks, int threads = kThreads, int smem = kNumbers * int(sizeof(float))) {
    return launch<K>(dim3(unsigned(blocks)), threads, smem, nullptr, {{memory_.in}, {memory_.out}, {memory_.work}});
  }
  template <class K>
  const char* run_under(const Schedule& s) {
    options() = {s.policy, s.seed, s.cp_async};
    report() = {};
    allow_all();
    return launch_one<K>();
  }

  // K<true> adds to `kind`, and may add to other counters as a consequence. K<false> adds to no
  // counter.
  template <template <bool> class K>
  void expect(int Report::* kind) {
    for (const Schedule& s : schedules()) {
      SCOPED_TRACE(__PRETTY_FUNCTION__);
      SCOPED_TRACE("policy " + std::to_string(int(s.policy)) + " seed " + std::to_string(s.seed) + " copies " +
                   std::to_string(int(s.cp_async)));
      const char* why = run_under<K<true>>(s);
      EXPECT_GT(report().*kind, 0);
      ASSERT_FALSE(report().messages.empty());
      EXPECT_STREQ(report().messages[0].c_str(), why);
      EXPECT_NE(std::string::npos, report().messages[0].find("kernel under test")) << report().messages[0];
      EXPECT_NE(std::string::npos, report().messages[0].find("fault_test.cpp:")) << report().messages[0];
      why = run_under<K<false>>(s);
      EXPECT_EQ(nullptr, why) << why;
      EXPECT_EQ(0, report().errors());
    }
  }

  Memory memory_;
};

TEST_F(Fault, Races) {
  expect<BarrierAfterWrite>(&Report::race);
  expect<BarrierBeforeOverwriting>(&Report::race);
  expect<BarrierOfAWarp>(&Report::race);
  expect<ShuffleIsNoBarrier>(&Report::race);
  expect<BarrierAfterTheWait>(&Report::race);
  expect<Ring>(&Report::race);
  expect<NamedBarriers>(&Report::race);
  expect<ProducerAndConsumers>(&Report::race);
  expect<LdmatrixBeforeTheBarrier>(&Report::race);
}

TEST_F(Fault, RacesInGlobalMemory) {
  expect<GlobalWithinABlock>(&Report::race);
  expect<BlocksWriteTheSame>(&Report::race);
  expect<BlockReadsWhatAnotherWrites>(&Report::race);
  expect<BlockWritesWhatAnotherRead>(&Report::race);
}

TEST_F(Fault, Unwritten) {
  expect<ReadOfWhatNobodyWrote>(&Report::uninit);
  expect<ReadOfAnotherBlocksShared>(&Report::uninit);
  expect<ReadOfAnOutput>(&Report::uninit);
}

// A workspace is empty at the start of a call, and keeps its contents from one launch to the next.
TEST_F(Fault, Workspace) {
  for (bool first : {false, true}) {
    report() = {};
    allow_all(/*work_filled=*/false);
    if (first) {
      EXPECT_EQ(nullptr, (launch_one<GlobalWithinABlock<false>>()));
    }
    EXPECT_EQ(first, (launch_one<BlockWritesWhatAnotherRead<false>>() == nullptr));
    EXPECT_EQ(first, report().uninit == 0);
    EXPECT_EQ(0, report().race);
  }
}

TEST_F(Fault, Bounds) {
  expect<SharedIndex>(&Report::bounds);
  expect<IndexOfAPart>(&Report::bounds);
  expect<MoreThanWasAskedFor>(&Report::bounds);
  expect<GlobalRead>(&Report::bounds);
  expect<GlobalWrite>(&Report::bounds);
  expect<WriteToAnInput>(&Report::bounds);
  expect<CopyBehindTheEnd>(&Report::bounds);
}

TEST_F(Fault, Alignment) {
  expect<SharedVectorAlignment>(&Report::align);
  expect<GlobalVectorAlignment>(&Report::align);
  expect<GlobalNumberAlignment>(&Report::align);
  expect<CopyAlignment>(&Report::align);
  expect<LdmatrixRow>(&Report::align);
}

TEST_F(Fault, Copies) {
  expect<ShortWait>(&Report::inflight);
  expect<Commit>(&Report::inflight);
  expect<WaitAtTheEnd>(&Report::inflight);
  expect<WriteUnderACopy>(&Report::inflight);
}

TEST_F(Fault, Divergence) {
  expect<CollectiveInABranch>(&Report::diverge);
  expect<EarlyReturn>(&Report::diverge);
  expect<BarriersOfTwoBranches>(&Report::diverge);
  expect<BarrierOfHalfWarps>(&Report::diverge);
}

TEST_F(Fault, Deadlock) {
  expect<CollectiveOfHalfAWarp>(&Report::deadlock);
  expect<BarrierForTooMany>(&Report::deadlock);
}

TEST_F(Fault, NumbersOfBarriers) { expect<NumberOfABarrier>(&Report::other); }

// A message names the kernel, both accesses with their source lines, the block and the thread.
TEST_F(Fault, Messages) {
  const auto first = [&](auto kernel) {
    run_under<decltype(kernel)>({Policy::sticky, 1, CpAsync::poison});
    return report().messages.at(0);
  };
  const auto expect_parts = [](const std::string& message, std::initializer_list<const char*> parts) {
    size_t at = 0;
    for (const char* part : parts) {
      const size_t found = message.find(part, at);
      ASSERT_NE(std::string::npos, found) << message << " has no " << part;
      at = found + std::strlen(part);
    }
  };
  expect_parts(first(BarrierBeforeOverwriting<true>()),
               {"kernel under test: shared byte ", ": write of fault_test.cpp:", " and read, fault_test.cpp:",
                ", are not ordered [block ", ",0,0 thread "});
  expect_parts(first(BlocksWriteTheSame<true>()),
               {"kernel under test: range 1 byte ", ": write of fault_test.cpp:",
                " and write of another block, fault_test.cpp:", ", are not ordered [block ", ",0,0 thread "});
  expect_parts(first(BarrierForTooMany<true>()),
               {"kernel under test: 64 of 128 threads left: 64 from thread 0 wait in a barrier of fault_test.cpp:"});
}

TEST_F(Fault, SwappedFragment) {
  std::vector<float> want(16 * 8);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j)
      for (int k = 0; k < 8; ++k) want[size_t(i * 8 + j)] += memory_.in[i * 8 + k] * memory_.in[128 + k * 8 + j];
  for (const Schedule& s : schedules()) {
    for (bool fault : {false, true}) {
      const char* why = fault ? run_under<Product<true>>(s) : run_under<Product<false>>(s);
      EXPECT_EQ(nullptr, why) << why;
      EXPECT_EQ(fault, std::vector<float>(memory_.out, memory_.out + 128) != want);
    }
  }
}

TEST_F(Fault, LaunchesThatNoDeviceTakes) {
  using K = BarrierAfterWrite<false>;
  allow_all();
  for (int threads : {-32, 0, 33, 100, kThreads + 32}) EXPECT_NE(nullptr, launch_one<K>(1, threads)) << threads;
  EXPECT_NE(nullptr, launch_one<K>(0));
  EXPECT_NE(nullptr, launch_one<K>(1, kThreads, -1));
  for (const auto& limits : {kHopper, kAmpere, kAda}) {
    device() = limits;
    EXPECT_EQ(nullptr, launch_one<K>(1, kThreads, limits.shared_block));
    EXPECT_NE(nullptr, launch_one<K>(1, kThreads, limits.shared_block + 1));
  }
  EXPECT_EQ(nullptr, launch_one<K>());
  EXPECT_EQ(0, report().errors());
}

// Rows of 128 bytes are in the same banks; rows of 144 bytes are not.
template <int kStride>
struct Banks : Kernel<false> {
  static void run(const Arguments& a) {
    Smem smem;
    const auto s = smem.alloc<uint16_t>(8 * kStride + 24);
    for (int i = tid(); i < 8 * kStride + 24; i += nthreads()) s.st(i, 0);
    sync_cta();
    uint32_t r[4];
    ldmatrix_x4(r, s, lane() % 8 * kStride + lane() / 8 * 8);
    a.out.st(global_id(), float(r[0]));
  }
};

TEST_F(Fault, BankConflicts) {
  const Schedule s{Policy::lockstep, 1, CpAsync::poison};
  ASSERT_EQ(nullptr, run_under<Banks<64>>(s));
  EXPECT_EQ(7 * report().ldmatrix_phases, report().ldmatrix_conflicts);
  ASSERT_EQ(nullptr, run_under<Banks<72>>(s));
  EXPECT_GT(report().ldmatrix_phases, 0);
  EXPECT_EQ(0, report().ldmatrix_conflicts);
}

#ifndef __SANITIZE_ADDRESS__  // the sanitizer reports it
struct EndlessRecursion : Kernel<false> {
  static float down(int n, float x) {
    volatile float use[256] = {x};
    return n ? down(n - 1, use[0] + 1) + use[n % 256] : x;
  }
  static void run(const Arguments& a) { a.out.st(global_id(), down(1 << 20, a.in.ld(tid()))); }
};

TEST_F(Fault, StackOverflow) {
  allow_all();
  EXPECT_DEATH(launch_one<EndlessRecursion>(), "kernel under test: thread [0-9]+ has used up its stack");
}
#endif

}  // namespace
