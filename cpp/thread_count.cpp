#include "thread_count.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>

#include "environment.h"
#include "openmp.h"
#include "problem.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace lc {
namespace {

std::atomic<int> requested{0};
thread_local Cores cores;

// A number of threads from the environment. It is the first of OpenMP's lists "4,2", and 0 if there
// is none.
int first_number(const std::string& text) {
  const long n = std::strtol(text.c_str(), nullptr, 10);
  return int(std::clamp<long>(n, 0, kMostThreads));
}

int from_environment() {
  const std::string& text = environment().num_threads;
  if (text.empty()) return 0;
  char* end;
  const long n = std::strtol(text.c_str(), &end, 10);
  if (*end || n < 1 || n > kMostThreads)
    fail(LC_DEVICE, "LEETCORE_NUM_THREADS: expected a number from 1 to %d, got '%.100s'", kMostThreads, text.c_str());
  return int(n);
}

#if defined(__linux__)

int read_affinity(Cores& to) {
  to.size = Cores::kBytes;
  auto* set = reinterpret_cast<cpu_set_t*>(to.set);
  if (sched_getaffinity(0, to.size, set)) return to.size = 0;
  return CPU_COUNT_S(to.size, set);
}

// All cores that the process may use, even if an OpenMP runtime has pinned the calling thread to
// some of them. The kernel reduces a set of all cores to the allowed ones.
const Cores& allowed_cores() {
  static const Cores all = [] {
    Cores pinned, wide;
    if (!read_affinity(pinned)) return pinned;
    std::fill(std::begin(wide.set), std::end(wide.set), ~0ul);
    if (sched_setaffinity(0, Cores::kBytes, reinterpret_cast<const cpu_set_t*>(wide.set))) return pinned;
    read_affinity(wide);
    sched_setaffinity(0, Cores::kBytes, reinterpret_cast<const cpu_set_t*>(pinned.set));
    return wide;
  }();
  return all;
}

int usable_cores() {
  if (!environment().omp_binds) return read_affinity(cores);
  cores = allowed_cores();
  return cores.size ? CPU_COUNT_S(cores.size, reinterpret_cast<const cpu_set_t*>(cores.set)) : 0;
}

#else

int usable_cores() { return 0; }

#endif

// Facts that are looked up again when they are older than a second: an operator may change the
// quota, which is a file, and a library that is loaded late may bring an OpenMP runtime.
struct Surroundings {
  double quota;
  const OpenMP* runtime;
};
Surroundings surroundings() {
  using Clock = std::chrono::steady_clock;
  static std::atomic<double> quota{0};
  static std::atomic<const OpenMP*> runtime{nullptr};
  static std::atomic<Clock::rep> next{std::numeric_limits<Clock::rep>::min()};
  const Clock::rep now = Clock::now().time_since_epoch().count();
  if (now >= next.load(std::memory_order_acquire)) {
    quota.store(cpu_quota(), std::memory_order_relaxed);
    runtime.store(openmp(), std::memory_order_relaxed);
    next.store(now + Clock::duration(std::chrono::seconds(1)).count(), std::memory_order_release);
  }
  return {quota.load(std::memory_order_relaxed), runtime.load(std::memory_order_relaxed)};
}

// Reads the first two numbers of a file. "max" and a missing number are infinite. Returns false if
// there is no file or no word in it.
bool read_pair(const std::string& path, double (&values)[2]) {
  std::ifstream file(path);
  std::string words[2];
  if (!(file >> words[0])) return false;
  file >> words[1];
  for (int i = 0; i < 2; ++i) {
    char* end;
    values[i] = std::strtod(words[i].c_str(), &end);
    if (words[i].empty() || *end) values[i] = std::numeric_limits<double>::infinity();
  }
  return true;
}

// The quota of the group in `folder`: cpu.max in control groups version 2, cpu.cfs_* in version 1.
double group_quota(const std::string& folder) {
  double v2[2], quota[2], period[2];
  const auto ratio = [](double part, double whole) {
    const bool good = std::isfinite(part) && part > 0 && std::isfinite(whole) && whole > 0;
    return good ? part / whole : std::numeric_limits<double>::infinity();
  };
  if (read_pair(folder + "/cpu.max", v2)) return ratio(v2[0], v2[1]);
  if (read_pair(folder + "/cpu.cfs_quota_us", quota) && read_pair(folder + "/cpu.cfs_period_us", period))
    return ratio(quota[0], period[0]);
  return std::numeric_limits<double>::infinity();
}

}  // namespace

double cpu_quota(const std::string& root) {
  double least = std::numeric_limits<double>::infinity();
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "number:controllers:/path"
    std::istringstream parts(line);
    std::string number, controllers, path;
    if (!std::getline(parts, number, ':') || !std::getline(parts, controllers, ':') || !std::getline(parts, path))
      continue;
    const bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    const std::string mounts[] = {"/sys/fs/cgroup", v2 ? "/sys/fs/cgroup/unified" : "/sys/fs/cgroup/" + controllers,
                                  "/sys/fs/cgroup/cpu"};
    for (int i = v2 ? 0 : 1; i < (v2 ? 2 : 3); ++i)
      for (std::string group = path;; group.resize(group.rfind('/'))) {  // this group and its parents
        if (group == "/") group.clear();
        least = std::min(least, group_quota(root + mounts[i] + group));
        if (group.empty() || group[0] != '/') break;
      }
  }
  return least;
}

ThreadCount thread_count(int framework) {
  const auto [quota, runtime] = surroundings();
  if (runtime && runtime->in_parallel()) return {1, "an OpenMP region"};
  const int usable = usable_cores();
  if (const int n = requested.load(std::memory_order_relaxed); n > 0) return {n, "set_num_threads"};
  if (const int n = from_environment()) return {n, "LEETCORE_NUM_THREADS"};

  static const int omp_num_threads = first_number(environment().omp_num_threads);
  static const int omp_thread_limit = first_number(environment().omp_thread_limit);
  static const int machine = std::max(1, int(std::thread::hardware_concurrency()));
  ThreadCount best = usable ? ThreadCount{usable, "affinity"} : ThreadCount{machine, "the machine"};
  const auto limit = [&](double n, const char* source) {
    if (n > 0 && std::ceil(n) < best.count) best = {int(std::ceil(n)), source};
  };
  limit(quota, "CPU quota");
  if (framework > 0)
    limit(framework, "the caller's framework");
  else if (runtime)
    limit(runtime->max_threads(), "the caller's OpenMP");
  else
    limit(omp_num_threads, "OMP_NUM_THREADS");
  limit(omp_thread_limit, "OMP_THREAD_LIMIT");
  return best;
}

void set_num_threads(int n) { requested.store(std::clamp(n, 0, kMostThreads), std::memory_order_relaxed); }

const Cores& last_seen_cores() { return cores; }

}  // namespace lc
