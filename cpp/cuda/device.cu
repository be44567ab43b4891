// device.cu - implements device.h on the CUDA runtime, which is linked statically. No driver is
// needed until the first call for a device.
#include "device.h"

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

namespace lc::cuda {
namespace {

constexpr int kMostDevices = 64, kLeastCapability = 80;

void check(cudaError_t error, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that the caller's next call does not report it
  fail(LC_DEVICE, "CUDA device %d: %s", device, cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), device);
  return value;
}

std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

int driver_version() {  // 0: none
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int device_count(int device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  const int driver = driver_version();
  if (error != cudaSuccess && !driver) fail(LC_DEVICE, "CUDA device %d: this machine has no NVIDIA driver", device);
  if (error == cudaErrorInsufficientDriver)
    fail(LC_DEVICE, "CUDA device %d: expected a driver for CUDA %s or later, got one for CUDA %s", device,
         dotted(CUDART_VERSION).c_str(), dotted(driver).c_str());
  check(error, device);
  return count;
}

Limits read(int device) {
  const int count = device_count(device);
  if (device < 0 || device >= count) fail(LC_DEVICE, "CUDA device %d: expected one of %d devices", device, count);
  Limits l = {};
  l.capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (l.capability < kLeastCapability)
    fail(LC_DEVICE, "CUDA device %d: expected compute capability %d.%d or later, got %d.%d", device,
         kLeastCapability / 10, kLeastCapability % 10, l.capability / 10, l.capability % 10);
  l.processors = attribute(cudaDevAttrMultiProcessorCount, device);
  l.shared_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  l.shared_processor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  l.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  // Clocks are in kHz. Memory has two transfers per clock, a processor 128 (or 64) FMA per clock.
  const double memory_mhz = attribute(cudaDevAttrMemoryClockRate, device) / 1e3;
  const double core_mhz = attribute(cudaDevAttrClockRate, device) / 1e3;
  l.bytes_per_us = 2 * memory_mhz * attribute(cudaDevAttrGlobalMemoryBusWidth, device) / 8;
  l.flop_per_us = 2 * core_mhz * (l.capability == 80 ? 64 : 128) * l.processors;
  return l;
}

}  // namespace

const Limits& limits(int device) {
  static Limits known[kMostDevices];
  static std::atomic<bool> ready[kMostDevices];
  static std::mutex mutex;
  if (device < 0 || device >= kMostDevices)
    fail(LC_DEVICE, "CUDA device %d: expected a number below %d", device, kMostDevices);
  if (!ready[device].load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!ready[device].load(std::memory_order_relaxed)) {
      known[device] = read(device);
      ready[device].store(true, std::memory_order_release);
    }
  }
  return known[device];
}

void launch_failed(const Problem& p, const char* kernel, const char* why) {
  // An error that every call reports was caused by earlier work, of this library or of others.
  size_t free, total;
  const cudaError_t lasting = cudaMemGetInfo(&free, &total);
  cudaGetLastError();
  if (lasting != cudaSuccess)
    fail(LC_DEVICE, "CUDA device %d: had failed before this call: %s", p.device.id, cudaGetErrorString(lasting));
  fail(LC_DEVICE, "kernel %s on CUDA device %d: %s", kernel, p.device.id, why);
}

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&before_), device);
  if (before_ != device) check(cudaSetDevice(device), device);
  if (before_ == device) before_ = -1;
}
DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

std::string versions() {
  const int driver = driver_version();
  int devices = 0;
  if (!driver || cudaGetDeviceCount(&devices) != cudaSuccess) devices = 0;
  cudaGetLastError();
  std::string text = dotted(CUDART_VERSION) + ", driver " + (driver ? dotted(driver) : "none") + ", devices " +
                     std::to_string(devices);
  for (int i = 0; i < devices; ++i) {
    cudaDeviceProp facts;
    if (cudaGetDeviceProperties(&facts, i) != cudaSuccess) continue;
    text += std::string(i ? ", " : ": ") + facts.name + " (" + std::to_string(facts.major) + "." +
            std::to_string(facts.minor) + ")";
  }
  return text;
}

}  // namespace lc::cuda
