// device.h - the GPU as launchers see it: its limits, the current device, errors of launches.
#pragma once
#include "../problem.h"

namespace lc::cuda {

// Properties of a device that launches depend on. They are read once per device.
struct Limits {
  int capability;                    // 10 major + minor
  int processors;                    // streaming multiprocessors
  int shared_block;                  // bytes of shared memory that a block may have
  int shared_processor;              // bytes of shared memory for all blocks of a processor
  int64_t l2_bytes;                  // size of the L2 cache
  double bytes_per_us, flop_per_us;  // memory; float32 FMA; rough, for predictions
};

// Throws Error(LC_DEVICE) if the device does not exist, there is no driver, or either is too old
// for this build.
const Limits& limits(int device);

// Throws Error(LC_DEVICE) for a kernel that did not start. The message names the kernel, or reports
// the earlier failure if the device had failed before.
[[noreturn]] void launch_failed(const Problem& p, const char* kernel, const char* why);

// Makes a device current, and restores the previous one at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

std::string versions();  // the text after "cuda=" in lc_build_info

}  // namespace lc::cuda
