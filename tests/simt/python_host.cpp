// python_host.cpp - the emulator's settings and reports for Python's ctypes, used by tests of
// arrays.
#include "../../cpp/simt/simt.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulator_allow(const void* p, size_t bytes, bool writable) { simt::allow(p, bytes, writable); }
EXPORT void emulator_forget() {
  simt::forget();
  simt::report() = {};
}
EXPORT int64_t emulator_launches() { return simt::report().launches; }
EXPORT uintptr_t emulator_stream() { return reinterpret_cast<uintptr_t>(simt::report().stream); }
EXPORT int emulator_device() { return simt::report().device; }
