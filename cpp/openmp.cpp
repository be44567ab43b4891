#include "openmp.h"

#include <atomic>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define LC_POSIX 1
#endif

namespace lc {
namespace {

// Whether the process was forked before this library was loaded. Linux keeps it as PF_FORKNOEXEC.
bool forked_before_load() {
  std::ifstream stat("/proc/self/stat");
  std::string text;
  std::getline(stat, text);
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return false;
  std::istringstream words(text.substr(name_end + 1));
  std::string skipped;
  unsigned long flags = 0;
  for (int i = 0; i < 6; ++i) words >> skipped;
  return words >> flags && flags & 0x40;
}

std::atomic<bool> is_forked{forked_before_load()};
#if defined(LC_POSIX)
[[maybe_unused]] const int watches_forks =
    pthread_atfork(nullptr, nullptr, [] { is_forked.store(true, std::memory_order_relaxed); });
#endif

}  // namespace

bool forked() { return is_forked.load(std::memory_order_relaxed); }

#if defined(__linux__)
namespace {

// The number of libraries that the process has loaded so far.
unsigned long long loads() {
  unsigned long long count = 0;
  const auto read = [](dl_phdr_info* info, size_t, void* to) {
    *static_cast<unsigned long long*>(to) = info->dlpi_adds;
    return 1;  // every library has the same count
  };
  dl_iterate_phdr(read, &count);
  return count;
}

// Finds all entry points in a library. Returns whether it has them.
bool complete(void* library, OpenMP& to) {
  const auto find = [&](auto& function, const char* name) {
    return (function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name))) != nullptr;
  };
  return find(to.in_parallel, "omp_in_parallel") && find(to.max_threads, "omp_get_max_threads") &&
         find(to.thread_num, "omp_get_thread_num") && find(to.num_threads, "omp_get_num_threads") &&
         find(to.parallel, "GOMP_parallel");
}

// Paths of the libraries that may give the symbols of a runtime: torch with its dependencies first.
std::vector<std::string> candidates() {
  std::vector<std::string> paths[2];
  const auto collect = [](dl_phdr_info* info, size_t, void* to) {
    const char* slash = std::strrchr(info->dlpi_name, '/');
    const std::string name = slash ? slash + 1 : info->dlpi_name;
    const auto begins = [&](const char* with) { return name.rfind(with, 0) == 0; };
    auto* lists = static_cast<std::vector<std::string>*>(to);
    if (begins("libtorch_cpu.")) lists[0].push_back(info->dlpi_name);
    if (begins("libgomp") || begins("libiomp5") || begins("libomp")) lists[1].push_back(info->dlpi_name);
    return 0;
  };
  dl_iterate_phdr(collect, paths);
  paths[0].insert(paths[0].end(), paths[1].begin(), paths[1].end());
  return paths[0];
}

}  // namespace

const OpenMP* openmp() {
  static std::atomic<const OpenMP*> found{nullptr};
  static std::atomic<unsigned long long> searched{0};
  if (const OpenMP* here = found.load(std::memory_order_acquire)) return here;
  if (forked()) return nullptr;
  const unsigned long long now = loads();
  if (searched.load(std::memory_order_relaxed) == now) return nullptr;
  OpenMP runtime;
  bool good = complete(RTLD_DEFAULT, runtime);
  if (!good)
    for (const std::string& path : candidates())
      if (void* library =
              dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {  // a good library is not closed, so that it stays loaded
        if ((good = complete(library, runtime))) break;
        dlclose(library);
      }
  if (good) {
    const OpenMP* expected = nullptr;
    const auto* made = new OpenMP(runtime);  // never freed
    if (!found.compare_exchange_strong(expected, made)) delete made;
    return found.load(std::memory_order_acquire);
  }
  searched.store(now, std::memory_order_relaxed);
  return nullptr;
}

#else

const OpenMP* openmp() { return nullptr; }

#endif

}  // namespace lc
