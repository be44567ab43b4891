// isa.h - tests of what the library computes run with the instruction set that LEETCORE_ISA names, where the machine
// has it.
#pragma once
#include <gtest/gtest.h>
#include <leetcore/leetcore.h>

#include <cstdlib>
#include <sstream>
#include <string>

namespace test {

// "key=value" of lc_build_info
inline std::string build_info(const std::string& key) {
  std::istringstream lines(lc_build_info());
  for (std::string line; std::getline(lines, line);)
    if (line.compare(0, key.size() + 1, key + "=") == 0) return line.substr(key.size() + 1);
  return "";
}

inline bool machine_has(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == "avx2") return avx2;
  if (isa == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == "generic";
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
