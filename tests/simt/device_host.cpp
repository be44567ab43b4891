// device_host.cpp - device.h for the emulator: devices 0 and 1, whose limits tests can set.
#include "device_host.h"

#include <cstdlib>

#include "../../cpp/simt/simt.h"

namespace simt {

// Sets LEETCORE_CUFFT unless it is set. The library reads the environment when it is loaded, so
// this constructor has a priority, which makes it run before constructors without a priority.
__attribute__((constructor(200))) static void choose_cufft() {
  setenv("LEETCORE_CUFFT", CUFFT_DOUBLE, /*overwrite=*/0);
}

lc::cuda::Limits& device() {
  static lc::cuda::Limits l = kHopper;
  return l;
}

int most_shared() { return device().shared_block; }

int& current_device() {
  static thread_local int number = 0;
  return number;
}

}  // namespace simt

namespace lc::cuda {

const Limits& limits(int device) {
  constexpr int kDevices = 2;
  if (device < 0 || device >= kDevices) fail(LC_DEVICE, "CUDA device %d: expected one of %d devices", device, kDevices);
  return simt::device();
}

void launch_failed(const Problem& p, const char* kernel, const char* why) {
  fail(LC_DEVICE, "kernel %s on CUDA device %d: %s", kernel, p.device.id, why);
}

DeviceGuard::DeviceGuard(int device) : before_(simt::current_device()) { simt::current_device() = device; }
DeviceGuard::~DeviceGuard() { simt::current_device() = before_; }

std::string versions() { return "emulated"; }

}  // namespace lc::cuda
