#include "environment.h"

#include <cstdlib>

namespace lc {
namespace {

std::string variable(const char* name) {
  const char* text = std::getenv(name);
  return text ? text : "";
}

// Whether OMP_PROC_BIND, OMP_PLACES, GOMP_CPU_AFFINITY or KMP_AFFINITY makes an OpenMP runtime pin
// threads.
bool omp_binds() {
  for (const char* name : {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"}) {
    const std::string text = variable(name);
    if (!text.empty() && text != "false" && text != "FALSE" && text.find("none") == std::string::npos &&
        text.find("disabled") == std::string::npos)
      return true;
  }
  return false;
}

}  // namespace

const Environment& environment() {
  static const Environment at_load = {variable("LEETCORE_ISA"),
                                      variable("LEETCORE_METHOD"),
                                      variable("LEETCORE_NUM_THREADS"),
                                      variable("LEETCORE_CUFFT"),
                                      variable("OMP_NUM_THREADS"),
                                      variable("OMP_THREAD_LIMIT"),
                                      omp_binds()};
  return at_load;
}

namespace {
[[maybe_unused]] const Environment& read_at_load = environment();
}

}  // namespace lc
