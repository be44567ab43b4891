// simt.h - the GPU as a kernel sees it. Kernels are written in these primitives and in the tile
// verbs. A kernel has one source for two compilers: nvcc turns the primitives into PTX
// (simt_device.cuh), g++ into a SIMT emulator that checks every access (tests/simt). No binary
// contains both.
//
// A kernel is a struct with kName, kMaxThreads, kMinBlocks, a plain struct Params and a static
// function SIMT_DEV void run(const Params&). All lanes of a warp call a collective (shuffle, vote,
// ldmatrix, mma, barrier) at the same call site. A block is a multiple of 32 threads. No thread
// returns before the last sync_cta. Every cp.async is waited for.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace simt {

// The 16-bit formats, for storage and for operands of the matrix unit.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type of sums of numbers of type E.
template <class E>
using Accumulator = std::conditional_t<std::is_same_v<E, double>, double, float>;

}  // namespace simt

#ifdef __CUDACC__
#include "simt_device.cuh"
#else
#include "simt_host.h"
#endif

namespace simt {

SIMT_DEV int lane() { return tid() & 31; }
SIMT_DEV int warp() { return tid() >> 5; }
SIMT_DEV int nwarps() { return nthreads() >> 5; }

// Converts storage to accumulator and back, rounding to nearest even.
template <class E>
SIMT_DEV Accumulator<E> widen(E x) {
  if constexpr (std::is_same_v<E, bf16> || std::is_same_v<E, f16>)
    return to_float(x);
  else
    return x;
}
template <class E>
SIMT_DEV E narrow(Accumulator<E> x) {
  if constexpr (std::is_same_v<E, bf16> || std::is_same_v<E, f16>)
    return from_float<E>(x);
  else
    return x;
}

}  // namespace simt
