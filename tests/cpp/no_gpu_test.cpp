// no_gpu_test.cpp - a library with CUDA methods on a machine without a driver: the CPU methods
// work, and a call for a device is refused with a sentence.
#include <gtest/gtest.h>

#include "call.h"

namespace {

using namespace test;

class NoGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string info = lc_build_info();
    ASSERT_NE(std::string::npos, info.find("cuda=")) << info;
    if (info.find("driver none") == std::string::npos) GTEST_SKIP() << "this machine has a driver: " << info;
    EXPECT_NE(std::string::npos, info.find("devices 0")) << info;
  }
};

TEST_F(NoGpu, TheCpuServes) {
  Call call{Spec()};
  const Answer answer = reference(call.args);
  ASSERT_EQ(LC_OK, call.run()) << lc_last_error();
  EXPECT_LE(relative_error(values(call.o), answer.o, answer.o), output_tolerance(kF32));
}

TEST_F(NoGpu, ACallForADeviceSaysWhy) {
  for (bool named : {false, true}) {
    Spec spec;
    spec.device = {LC_CUDA, 0};
    Call call(spec);
    call.args.method = named ? "recurrent" : nullptr;
    const auto before = call.memory();
    EXPECT_EQ(LC_DEVICE, call.run());
    EXPECT_NE(std::string::npos, std::string(lc_last_error()).find("CUDA device 0: ")) << lc_last_error();
    EXPECT_NE(std::string::npos, std::string(lc_last_error()).find("driver")) << lc_last_error();
    EXPECT_TRUE(before == call.memory());
  }
}

}  // namespace
