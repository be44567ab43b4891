// faulty.cu - kernels that gates.py has to refuse, one for each property that it checks.
#include "../../cpp/simt/simt.h"

namespace faulty {

struct Kernel {
  static constexpr int kMaxThreads = 128, kMinBlocks = 1;
  struct Params {
    float* x;
    int n;
  };
};

// More numbers than a thread has registers.
struct Spills : Kernel {
  static constexpr int kMaxThreads = 1024;
  static SIMT_DEV void run(const Params& p) {
    float x[128];
    SIMT_UNROLL
    for (int i = 0; i < 128; ++i) x[i] = p.x[simt::tid() + 1024 * i];
    for (int step = 0; step < p.n; ++step) {
      SIMT_UNROLL
      for (int i = 0; i < 128; ++i) x[i] = simt::mul_add(x[i], x[(i * 37 + 5) % 128], x[(i * 11 + 3) % 128]);
    }
    SIMT_UNROLL
    for (int i = 0; i < 128; ++i) p.x[simt::tid() + 1024 * i] = x[i];
  }
};

// Static shared memory, which no launcher counts.
struct StaticShared : Kernel {
  static SIMT_DEV void run(const Params& p) {
    __shared__ float x[128];
    x[simt::tid()] = p.x[simt::tid()];
    simt::sync_cta();
    p.x[simt::tid()] = x[127 - simt::tid()];
  }
};

// A product that does not use the matrix unit.
struct NoMatrixUnit : Kernel {
  static SIMT_DEV void run(const Params& p) {
    p.x[simt::tid()] = simt::mul_add(p.x[simt::tid() + 1], p.x[simt::tid() + 2], p.x[simt::tid()]);
  }
};

const char* launch_all(const Kernel::Params& p) {
  const char* why = simt::launch<Spills>(dim3(1), 1024, 0, nullptr, p);
  if (!why) why = simt::launch<StaticShared>(dim3(1), 128, 0, nullptr, p);
  if (!why) why = simt::launch<NoMatrixUnit>(dim3(1), 128, 0, nullptr, p);
  return why;
}

}  // namespace faulty
