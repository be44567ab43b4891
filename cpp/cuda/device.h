// device.h - the GPU as a launcher sees it: its limits, the current device, kernels put on a stream.
#pragma once
#include "../problem.h"

namespace lc::cuda {

// Facts of a device that a launch depends on; asked for once a device.
struct Limits {
  int capability;                    // 10 major + minor
  int processors;                    // streaming multiprocessors
  int shared_block;                  // bytes of shared memory that one block may have
  int shared_processor;              // bytes that the blocks of one processor share
  int64_t l2_bytes;                  // of the cache that all processors share
  double bytes_per_us, flop_per_us;  // of memory; of fused multiply-adds in float32: rough, for predictions
};

// Throws Error(LC_DEVICE): no such device, no driver, too old for this build.
const Limits& limits(int device);

// Throws Error(LC_DEVICE) for a kernel that did not start: with its name, or, where the device had failed before, with
// what is known of that.
[[noreturn]] void launch_failed(const Problem& p, const char* kernel, const char* why);

// Makes a device the current one, and the one before it again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

std::string versions();  // of lc_build_info: "cuda=..." and what stands behind it

}  // namespace lc::cuda
