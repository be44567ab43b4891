// device_host.cpp - device.h for the emulator: one device, number 0, whose limits tests set.
#include "device_host.h"

#include "../../cpp/simt/simt.h"

namespace simt {

lc::cuda::Limits& device() {
  static lc::cuda::Limits l = kHopper;
  return l;
}

int most_shared() { return device().shared_block; }

}  // namespace simt

namespace lc::cuda {

const Limits& limits(int device) {
  if (device) fail(LC_DEVICE, "CUDA device %d: expected one of 1 devices", device);
  return simt::device();
}

DeviceGuard::DeviceGuard(int) : before_(-1) {}
DeviceGuard::~DeviceGuard() = default;

std::string versions() { return "emulated"; }

}  // namespace lc::cuda
