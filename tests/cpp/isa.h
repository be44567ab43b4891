// isa.h - WithIsa: a test that runs with the instruction set that LEETCORE_ISA names, and is
// skipped on machines that lack it.
#pragma once
#include <gtest/gtest.h>
#include <leetcore/leetcore.h>

#include <cstdlib>
#include <sstream>
#include <string>

namespace test {

// The value of the line "key=value" of lc_build_info().
inline std::string build_info(const std::string& key) {
  std::istringstream lines(lc_build_info());
  for (std::string line; std::getline(lines, line);)
    if (line.compare(0, key.size() + 1, key + "=") == 0) return line.substr(key.size() + 1);
  return "";
}

inline bool machine_has(const std::string& isa) {
#if defined(__x86_64__)
#define LC_X86_ISAS
  __builtin_cpu_init();
#endif
#define HAS(feature) __builtin_cpu_supports(#feature)
#define ISA(name, needs, flags) \
  if (isa == #name) return needs;
#include "../../cpp/cpu/isas.def"
#undef ISA
#undef HAS
  return false;
}

class WithIsa : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* wanted = std::getenv("LEETCORE_ISA");
    if (wanted && !machine_has(wanted)) GTEST_SKIP() << "this machine lacks " << wanted;
    if (wanted) {
      ASSERT_EQ(wanted, build_info("isa")) << lc_last_error();
    }
  }
  void TearDown() override { lc_set_num_threads(0); }
};

}  // namespace test
