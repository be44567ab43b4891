// thread_test.cpp - the pool of threads and the number of threads, compiled from the library's
// sources.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <fstream>
#include <set>
#include <thread>

#include "../../cpp/cpu/threads.h"
#include "../../cpp/thread_count.h"

namespace {

// Runs `wished` workers that share 1000 tasks, and expects each task to run once. Returns the
// number of workers.
int deal(int wished) {
  lc::Problem p = {};
  p.threads = wished;
  lc::Tasks tasks(p);
  std::vector<std::atomic<int>> done(1000);
  std::atomic<int> granted_most{0};
  lc::run_workers(wished, [&](int worker, int granted) {
    EXPECT_LT(worker, granted);
    EXPECT_LE(granted, wished);
    granted_most = granted;
    tasks.each(1000, worker, granted, [&](int64_t i) { ++done[size_t(i)]; });
  });
  for (const auto& count : done) EXPECT_EQ(1, count);
  return granted_most;
}

// The exit status of a forked child that runs f. An alarm ends a child that hangs.
template <class F>
int in_child(F&& f) {
  const pid_t child = fork();
  if (!child) {
    alarm(20);
    _exit(f());
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

TEST(Pool, EveryTaskIsDoneOnce) {
  for (int round = 0; round < 200; ++round)
    for (int wished : {1, 2, 5, 16}) EXPECT_EQ(wished, deal(wished));
}

// Either all workers pass a barrier, or none does.
TEST(Pool, BarriersWaitForWorkersThatBeginLate) {
  lc::Problem p = {};
  for (int round = 0; round < 500; ++round) {
    lc::Tasks first(p), second(p);
    lc::Barrier barrier;
    std::atomic<int> before{0}, after{0};
    lc::run_workers(4, [&](int worker, int granted) {
      first.each(8, worker, granted, [&](int64_t) { ++before; });
      barrier.wait(granted);
      second.each(8, worker, granted, [&](int64_t) { after += before == 8; });
    });
    ASSERT_EQ(8, after);
  }
}

TEST(Pool, CallsAtTheSameTimeShareIt) {
  std::vector<std::thread> callers;
  for (int i = 0; i < 8; ++i)
    callers.emplace_back([] {
      for (int round = 0; round < 200; ++round) EXPECT_GE(deal(4), 1);
    });
  for (std::thread& caller : callers) caller.join();
}

TEST(Pool, ChildrenAndGrandchildrenHavePoolsOfTheirOwn) {
  deal(4);
  const auto child = [] {
    if (deal(4) != 4) return 1;
    return in_child([] { return deal(4) == 4 ? 0 : 2; }) ? 3 : 0;
  };
  EXPECT_EQ(0, in_child(child));
  EXPECT_EQ(4, deal(4));
}

// Forks while other threads are inside the pool. In the child, threads that do not exist there hold
// its locks.
TEST(Pool, ForksDuringCalls) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i)
    callers.emplace_back([&] {
      while (!stop) deal(3);
    });
  for (int i = 0; i < 30; ++i) EXPECT_EQ(0, in_child([] { return deal(3) == 3 ? 0 : 1; }));
  stop = true;
  for (std::thread& caller : callers) caller.join();
}

#if !defined(__SANITIZE_ADDRESS__)  // shadow memory is larger than any limit
TEST(Pool, DoesWithFewerThreadsWhereNoMoreCanBeMade) {
  EXPECT_EQ(0, in_child([] {
              const rlimit none = {1 << 20, 1 << 20};  // less than is in use, so no stack can be allocated
              if (setrlimit(RLIMIT_AS, &none)) return 1;
              const int granted = deal(64);  // some: glibc keeps stacks of ended threads
              return granted >= 1 && granted < 64 ? 0 : 2;
            }));
}
#endif

TEST(Pool, FlushesDenormalsAndGivesTheCallerItsModeBack) {
  volatile float tiny = 1e-38f, factor = 1e-3f;
  std::atomic<int> kept{0};
  lc::run_workers(3, [&](int, int) { kept += tiny * factor != 0; });
  EXPECT_EQ(0, kept);
  EXPECT_NE(0, tiny * factor);
}

TEST(Pool, FollowsTheAffinityOfTheCaller) {
  cpu_set_t before, one;
  ASSERT_EQ(0, sched_getaffinity(0, sizeof before, &before));
  deal(4);
  CPU_ZERO(&one);
  for (int cpu = 0; cpu < CPU_SETSIZE && !CPU_COUNT(&one); ++cpu)
    if (CPU_ISSET(cpu, &before)) CPU_SET(cpu, &one);
  ASSERT_EQ(0, sched_setaffinity(0, sizeof one, &one));
  EXPECT_EQ(1, lc::thread_count(0).count);
  std::atomic<int> elsewhere{0};
  lc::run_workers(4, [&](int, int) {
    cpu_set_t mine;
    elsewhere += sched_getaffinity(0, sizeof mine, &mine) || !CPU_EQUAL(&mine, &one);
  });
  EXPECT_EQ(0, elsewhere);
  ASSERT_EQ(0, sched_setaffinity(0, sizeof before, &before));
  EXPECT_EQ(std::min<double>(CPU_COUNT(&before), std::ceil(lc::cpu_quota())), lc::thread_count(0).count);
}

// A tree of files like the one in which Linux shows control groups.
class Groups : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/leetcore-groups-XXXXXX";
    ASSERT_TRUE(mkdtemp(name));
    root_ = name;
  }
  void TearDown() override { std::system(("rm -r '" + root_ + "'").c_str()); }

  void write(const std::string& path, const std::string& text) {
    for (size_t i = 1; (i = path.find('/', i)) != std::string::npos; ++i)
      mkdir((root_ + path.substr(0, i)).c_str(), 0700);
    std::ofstream(root_ + path) << text;
  }
  double quota() { return lc::cpu_quota(root_); }

  std::string root_;
};

TEST_F(Groups, NoneIsNoQuota) { EXPECT_TRUE(std::isinf(quota())); }

TEST_F(Groups, TheLeastOfAllLevelsOfVersion2) {
  write("/proc/self/cgroup", "0::/a/b\n");
  write("/sys/fs/cgroup/cpu.max", "800000 100000\n");
  write("/sys/fs/cgroup/a/cpu.max", "max 100000\n");
  EXPECT_EQ(8, quota());
  write("/sys/fs/cgroup/a/b/cpu.max", "150000 100000\n");
  EXPECT_EQ(1.5, quota());
  write("/sys/fs/cgroup/a/cpu.max", "20000 40000\n");
  EXPECT_EQ(0.5, quota());
}

TEST_F(Groups, VersionsOneAndTwoTogether) {
  write("/proc/self/cgroup", "7:memory:/x\n4:cpu,cpuacct:/docker/1f\n0::/\n");
  write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
  write("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  EXPECT_TRUE(std::isinf(quota()));
  write("/sys/fs/cgroup/cpu,cpuacct/docker/1f/cpu.cfs_quota_us", "300000\n");
  write("/sys/fs/cgroup/cpu,cpuacct/docker/1f/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(3, quota());
  write("/sys/fs/cgroup/unified/cpu.max", "200000 100000\n");
  EXPECT_EQ(2, quota());
}

TEST_F(Groups, FilesOfAnyContent) {
  write("/proc/self/cgroup", "\n:::\nno colon\n0::\n0::relative\n0::/a\n");
  for (const char* text : {"", "\n", "max", "x y", "-5 100000", "100000 0", "100000", "nan nan"}) {
    write("/sys/fs/cgroup/a/cpu.max", text);
    EXPECT_TRUE(std::isinf(quota())) << text;
  }
}

}  // namespace
