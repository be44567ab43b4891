// cufft.h - Fourier transforms by cuFFT. The library does not link to cuFFT; the first call that
// needs it searches it.
#pragma once
#include "../problem.h"

namespace lc::cuda {

// `batch` sequences of `points` complex numbers, one after another.
struct Transforms {
  bool f64;
  int64_t points, batch;
};

// nullptr, or a sentence that says how to get cuFFT. Searches for a file, and does not load it.
const char* cufft_missing();

// Bytes of workspace for transform(). The first call for a device and these Transforms makes a
// plan, which allocates on the device and is kept. Later calls allocate nothing, and a CUDA graph
// may capture transform(). Throws Error.
size_t transform_bytes(int device, const Transforms& t);

// Enqueues transforms in place on p's stream: sums over e^(-2 pi i f n / points), or e^(+...) back,
// both unscaled.
enum class Direction { forward = -1, back = 1 };
void transform(const Problem& p, const Transforms& t, Direction direction, void* data, void* work);

}  // namespace lc::cuda
