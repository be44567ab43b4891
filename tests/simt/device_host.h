// device_host.h - the properties of the emulated GPU.
#pragma once
#include "../../cpp/cuda/device.h"

namespace simt {

inline constexpr lc::cuda::Limits kHopper = {90, 132, 227 * 1024, 228 * 1024, 50 << 20, 4.8e6, 67e6};
inline constexpr lc::cuda::Limits kAmpere = {80, 108, 163 * 1024, 164 * 1024, 40 << 20, 2.0e6, 19.5e6};
inline constexpr lc::cuda::Limits kAda = {89, 142, 99 * 1024, 100 * 1024, 72 << 20, 0.96e6, 91e6};

lc::cuda::Limits& device();  // kHopper until a test changes it

}  // namespace simt
