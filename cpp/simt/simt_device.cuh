// simt_device.cuh - the primitives of simt.h as PTX: one function per instruction, named after it.
// No other file contains PTX. References: PTX ISA, sections "Data Movement", "Warp-level Matrix",
// "Parallel Synchronization".
#pragma once
#include <cuda_runtime.h>

#define SIMT_DEV __device__ __forceinline__
#define SIMT_UNROLL _Pragma("unroll")
#define SIMT_LOOP _Pragma("unroll 1")

namespace simt {

using Stream = cudaStream_t;

SIMT_DEV int tid() { return int(threadIdx.x); }
SIMT_DEV int nthreads() { return int(blockDim.x); }
SIMT_DEV dim3 bid() { return dim3(blockIdx.x, blockIdx.y, blockIdx.z); }
// Returns x in a way that the compiler cannot see through. Values derived from it are computed
// again instead of kept in registers.
SIMT_DEV int fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
SIMT_DEV int64_t fresh(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

// ---- memory -------------------------------------------------------------------------------------

// A view of global memory. V is a vector of several T; its address must be a multiple of its size.
template <class T>
struct gptr {
  T* p;
  SIMT_DEV T ld(int64_t i) const { return *at(i); }
  SIMT_DEV void st(int64_t i, T x) const { *at(i) = x; }
  template <class V>
  SIMT_DEV V ldv(int64_t i) const {
    return *reinterpret_cast<const V*>(at(i));
  }
  template <class V>
  SIMT_DEV void stv(int64_t i, V x) const {
    *reinterpret_cast<V*>(at(i)) = x;
  }
  SIMT_DEV gptr sub(int64_t offset) const { return {p + offset}; }

 private:
  // Tells the compiler that the pointer is to global memory.
  SIMT_DEV T* at(int64_t i) const {
    __builtin_assume(__isGlobal(p));
    return p + i;
  }
};

// A view of n numbers in shared memory. The emulator checks n.
template <class T>
struct sptr {
  T* p;
  SIMT_DEV T ld(int i) const { return p[i]; }
  SIMT_DEV void st(int i, T x) const { p[i] = x; }
  template <class V>
  SIMT_DEV V ldv(int i) const {
    return *reinterpret_cast<const V*>(p + i);
  }
  template <class V>
  SIMT_DEV void stv(int i, V x) const {
    *reinterpret_cast<V*>(p + i) = x;
  }
  SIMT_DEV sptr sub(int offset, int /*n*/) const { return {p + offset}; }
  SIMT_DEV uint32_t address(int i) const { return uint32_t(__cvta_generic_to_shared(p + i)); }
};

// Allocates the launch's dynamic shared memory, front to back.
struct Smem {
  int used = 0;
  template <class T>
  SIMT_DEV sptr<T> alloc(int n, int align = 16) {
    extern __shared__ __align__(1024) unsigned char simt_smem[];
    used = (used + align - 1) / align * align;
    const sptr<T> view{reinterpret_cast<T*>(simt_smem + used)};
    used += n * int(sizeof(T));
    return view;
  }
};

// ---- synchronisation ----------------------------------------------------------------------------

SIMT_DEV void sync_cta() { __syncthreads(); }
SIMT_DEV void sync_warp() { __syncwarp(); }
// Barrier `id` (1 to 15) for n threads of the block, a multiple of 32.
SIMT_DEV void sync_named(int id, int n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }

// ---- warp collectives ---------------------------------------------------------------------------

template <class T>
SIMT_DEV T shfl_up(T x, int d) {
  return __shfl_up_sync(~0u, x, d);
}
template <class T>
SIMT_DEV T shfl_down(T x, int d) {
  return __shfl_down_sync(~0u, x, d);
}
template <class T>
SIMT_DEV T shfl_xor(T x, int mask) {
  return __shfl_xor_sync(~0u, x, mask);
}
template <class T>
SIMT_DEV T shfl_idx(T x, int from) {
  return __shfl_sync(~0u, x, from);
}
SIMT_DEV uint32_t vote_ballot(bool x) { return __ballot_sync(~0u, x); }
SIMT_DEV bool vote_any(bool x) { return __any_sync(~0u, x); }
SIMT_DEV bool vote_all(bool x) { return __all_sync(~0u, x); }

// ---- arithmetic ---------------------------------------------------------------------------------

// 2^x. The float version is within 2 units of the last place and flushes results below 2^-126 to 0.
SIMT_DEV float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SIMT_DEV double ex2(double x) { return exp2(x); }
// 1 / x, within one unit of the last place.
SIMT_DEV float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Sine and cosine of pi x, accurate at both ends of 0 <= x <= 1 and in the middle.
SIMT_DEV double sin_pi(double x) { return sinpi(x); }
SIMT_DEV double cos_pi(double x) { return cospi(x); }
SIMT_DEV float mul_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SIMT_DEV double mul_add(double a, double b, double c) { return __fma_rn(a, b, c); }

SIMT_DEV float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
SIMT_DEV float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class E>
SIMT_DEV E from_float(float x);
template <>
SIMT_DEV bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
SIMT_DEV f16 from_float<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// Two numbers in one register, the first in its lower half.
template <class E>
SIMT_DEV uint32_t pack2(float lo, float hi);
template <>
SIMT_DEV uint32_t pack2<bf16>(float lo, float hi) {
  uint32_t u;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(hi), "f"(lo));
  return u;
}
template <>
SIMT_DEV uint32_t pack2<f16>(float lo, float hi) {
  uint32_t u;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(hi), "f"(lo));
  return u;
}
template <class E>
SIMT_DEV float2 unpack2(uint32_t u) {
  return {to_float(E{uint16_t(u)}), to_float(E{uint16_t(u >> 16)})};
}
// Rounds to tf32 (10 bits of mantissa), to nearest with ties away from zero. The other bits of the
// result are zero.
SIMT_DEV float to_tf32(float x) {
  uint32_t u;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(u) : "f"(x));
  return __uint_as_float(u);
}

// ---- cp.async -----------------------------------------------------------------------------------

// Copies 16 bytes from global to shared memory: the first `valid` bytes from the source, then
// zeros.
template <class T, class U>
SIMT_DEV void cp_async16(sptr<T> to, int at, gptr<U> from, int64_t i, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address(at)), "l"(from.p + i), "r"(valid)
               : "memory");
}
SIMT_DEV void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are pending.
template <int N>
SIMT_DEV void cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- matrix unit --------------------------------------------------------------------------------

// Loads four 8x8 matrices of 16-bit numbers. Lane l names row l % 8 of matrix l / 8.
template <class T>
SIMT_DEV void ldmatrix_x4(uint32_t (&r)[4], sptr<T> s, int i) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(s.address(i))
               : "memory");
}
template <class T>
SIMT_DEV void ldmatrix_x4_trans(uint32_t (&r)[4], sptr<T> s, int i) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(s.address(i))
               : "memory");
}
// Transposes an 8x8 matrix, of which lane l holds the pair from (l / 4, 2 (l % 4)) on.
SIMT_DEV uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// c += a b by a warp, with float sums. E: bf16, f16 (m16n8k16), or float read as tf32 (m16n8k8).
template <class E>
struct Mma;
template <>
struct Mma<bf16> {
  static SIMT_DEV void m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};
template <>
struct Mma<f16> {
  static SIMT_DEV void m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};
template <>
struct Mma<float> {
  static SIMT_DEV void m16n8k8(float (&c)[4], const float (&a)[4], float b0, float b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
  }
};

// ---- launch -------------------------------------------------------------------------------------

template <class K>
__global__ void __launch_bounds__(K::kMaxThreads, K::kMinBlocks) entry(const __grid_constant__ typename K::Params p) {
  K::run(p);
}

// Launches the kernel on the stream. Returns nullptr, or the error of the runtime.
template <class K>
const char* launch(dim3 grid, int block, int smem, Stream stream, const typename K::Params& p) {
  cudaError_t error = cudaSuccess;
  if (smem > 48 * 1024) error = cudaFuncSetAttribute(entry<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<typename K::Params*>(&p)};
    error = cudaLaunchKernel(entry<K>, grid, dim3(unsigned(block)), arguments, size_t(smem), stream);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears the error
  return cudaGetErrorString(error);
}

}  // namespace simt
