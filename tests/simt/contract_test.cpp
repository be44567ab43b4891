// contract_test.cpp - the contracts of the primitives in the emulator, under every schedule.
#include "contract_test.cuh"

#include <gtest/gtest.h>

namespace {

using namespace simt;

TEST(Contract, EveryPrimitive) {
  for (const contract::Case& c : contract::cases())
    for (Policy policy : {Policy::lockstep, Policy::sticky, Policy::random, Policy::warp_priority})
      for (CpAsync cp_async : {CpAsync::immediate, CpAsync::delayed, CpAsync::poison}) {
        options() = {policy, 1, cp_async};
        report() = {};
        contract::Words got(c.want.size(), ~0u);
        forget();
        allow(c.in.data(), 4 * c.in.size(), false);
        allow(got.data(), 4 * got.size(), true, /*filled=*/false);
        const char* why = c.launch(c.in.data(), got.data(), nullptr);
        EXPECT_EQ(nullptr, why) << c.name << ": " << why;
        EXPECT_EQ("", contract::difference(c, got));
      }
  forget();
}

TEST(Contract, RefusedLaunches) {
  const contract::Words in(128, 1);
  contract::Words out(128);
  allow(in.data(), 4 * in.size(), false);
  allow(out.data(), 4 * out.size(), true);
  EXPECT_EQ("", contract::refused_launches(in.data(), out.data(), nullptr));
  forget();
}

// The comparison finds a wrong word in every case.
TEST(Contract, WrongAnswersDiffer) {
  for (const contract::Case& c : contract::cases()) {
    contract::Words wrong = c.want;
    wrong.front() ^= 0x00200000;
    EXPECT_NE("", contract::difference(c, wrong)) << c.name;
  }
}

}  // namespace
