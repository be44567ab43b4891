// simt.h - the GPU as a kernel sees it: the only header below the tile verbs. One kernel source, two worlds: nvcc turns
// the primitives into PTX (simt_device.cuh), g++ into a SIMT emulator that watches every access (tests/simt). The two
// never meet in one binary.
//
// A kernel is a struct with kName, kMaxThreads, kMinBlocks, a plain struct Params and static SIMT_DEV void run(const
// Params&). Collectives (shuffles, votes, ldmatrix, mma, barriers) are for whole warps at one call site; a block is a
// multiple of 32 threads; no thread returns before the last sync_cta; every cp.async is waited for.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace simt {

// The 16-bit formats are storage, and operands of the matrix unit.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// What numbers of type E are summed in.
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

// Storage to accumulator and back, to nearest even.
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
