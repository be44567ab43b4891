// cufft.h - Fourier transforms by cuFFT, which is looked for when a call first asks: nothing links to it.
#pragma once
#include "../problem.h"

namespace lc::cuda {

// `batch` sequences of `points` complex numbers, each behind the one before it.
struct Transforms {
  bool f64;
  int64_t points, batch;
};

// nullptr, or a sentence for who has no cuFFT. Looks for a file, and loads none where one is found.
const char* cufft_missing();

// Bytes that transform() needs beside the data. The first call for a device and these Transforms makes a plan, which
// allocates on the device, and is kept: from then on nothing is allocated, and a CUDA graph may capture transform().
// Throws Error.
size_t transform_bytes(int device, const Transforms& t);

// Puts transforms, in place, on p's stream: sums over e^(-2 pi i f n / points), or e^(+...) back, neither one scaled.
enum class Direction { forward = -1, back = 1 };
void transform(const Problem& p, const Transforms& t, Direction direction, void* data, void* work);

}  // namespace lc::cuda
