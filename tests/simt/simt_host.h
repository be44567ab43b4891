// simt_host.h - the primitives of simt.h for g++: the emulator that tests run kernels in. One fiber a thread; barriers
// and collectives hand over to another one. Every access is checked: shared memory for bounds, for reads of what was
// never written, for accesses that no barrier orders; global memory against the ranges a test has allowed.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#define SIMT_DEV inline
#define SIMT_UNROLL
#define SIMT_LOOP
#define SIMT_LOC int line = __builtin_LINE()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

namespace simt {

using Stream = void*;

// ---- what tests set and read ----------------------------------------------------------------------------------------

enum class Policy { lockstep, sticky, random, warp_priority };  // who runs next
enum class CpAsync { immediate, delayed, poison };              // when a copy lands; poison: NaN until the wait

struct Options {
  Policy policy = Policy::warp_priority;
  uint64_t seed = 1;
  CpAsync cp_async = CpAsync::poison;
};
struct Report {
  int race = 0, uninit = 0, inflight = 0, bounds = 0, align = 0, diverge = 0, deadlock = 0, other = 0;
  long launches = 0, barriers = 0, collectives = 0, mma = 0, ldmatrix_phases = 0, ldmatrix_conflicts = 0;
  std::vector<std::string> messages;  // the first few
  int errors() const { return race + uninit + inflight + bounds + align + diverge + deadlock + other; }
};
Options& options();
Report& report();

// The ranges of global memory that kernels may touch from now on; forget() empties the list.
void allow(const void* p, size_t bytes, bool writable);
void forget();

namespace emulator {

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int valid, group, line;
};
struct Fiber {
  void* context = nullptr;
  unsigned char* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // of the address sanitizer
  int tid = 0, state = 0, wait_line = 0;
  const char* wait_what = "";
  uint32_t cta_epoch = 0, warp_epoch = 0;
  int groups = 0;
  std::vector<Copy> copies;
};
extern Fiber* current;
extern dim3 block_index;
extern int block_threads, shared_bytes;
extern unsigned char* shared;

void fail(int Report::* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));
void collective(const char* what, int line, void* argument, void (*all)(void* const*));
void barrier(int id, int threads, int line);
void warp_barrier(int line);
void shared_read(const void* p, int bytes, int line, bool whole_warp = false);
void shared_write(const void* p, int bytes, int line);
bool global_read(const void* p, size_t bytes, int line);
bool global_write(const void* p, size_t bytes, int line);
void copy_issue(void* to, const void* from, int valid, int line);
void copy_wait(int groups);
void run(dim3 grid, int block, int smem, void (*body)(const void*), const void* params, const char* name);

inline bool outside(int i, int count, int n, int line) {
  const bool bad = i < 0 || i + count > n;
  if (bad) fail(&Report::bounds, "shared index %d (+%d) outside of [0, %d) at line %d", i, count, n, line);
  return bad;
}
inline bool misaligned(const void* p, size_t alignment, const char* what, int line) {
  const bool bad = reinterpret_cast<uintptr_t>(p) % alignment;
  if (bad) fail(&Report::align, "%s at line %d: address is no multiple of %zu", what, line, alignment);
  return bad;
}

}  // namespace emulator

inline int tid() { return emulator::current->tid; }
inline int nthreads() { return emulator::block_threads; }
inline dim3 bid() { return emulator::block_index; }
inline int fresh(int x) { return x; }
inline int64_t fresh(int64_t x) { return x; }

// ---- memory ---------------------------------------------------------------------------------------------------------

template <class T>
struct gptr {
  T* p;
  using Value = std::remove_const_t<T>;
  Value ld(int64_t i, SIMT_LOC) const { return emulator::global_read(p + i, sizeof(T), line) ? p[i] : Value(); }
  void st(int64_t i, Value x, SIMT_LOC) const {
    if (emulator::global_write(p + i, sizeof(T), line)) p[i] = x;
  }
  template <class V>
  V ldv(int64_t i, SIMT_LOC) const {
    V x = {};
    if (!emulator::misaligned(p + i, sizeof(V), "global vector load", line) &&
        emulator::global_read(p + i, sizeof(V), line))
      std::memcpy(&x, static_cast<const void*>(p + i), sizeof x);
    return x;
  }
  template <class V>
  void stv(int64_t i, V x, SIMT_LOC) const {
    if (!emulator::misaligned(p + i, sizeof(V), "global vector store", line) &&
        emulator::global_write(p + i, sizeof(V), line))
      std::memcpy(static_cast<void*>(p + i), &x, sizeof x);
  }
  gptr sub(int64_t offset) const { return {p + offset}; }
};

template <class T>
struct sptr {
  T* p;
  int n;
  T ld(int i, SIMT_LOC) const {
    if (emulator::outside(i, 1, n, line)) return T();
    emulator::shared_read(p + i, sizeof(T), line);
    return p[i];
  }
  void st(int i, T x, SIMT_LOC) const {
    if (emulator::outside(i, 1, n, line)) return;
    emulator::shared_write(p + i, sizeof(T), line);
    p[i] = x;
  }
  template <class V>
  V ldv(int i, SIMT_LOC) const {
    V x = {};
    if (emulator::outside(i, sizeof(V) / sizeof(T), n, line) ||
        emulator::misaligned(p + i, sizeof(V), "shared vector load", line))
      return x;
    emulator::shared_read(p + i, sizeof(V), line);
    std::memcpy(&x, static_cast<const void*>(p + i), sizeof x);
    return x;
  }
  template <class V>
  void stv(int i, V x, SIMT_LOC) const {
    if (emulator::outside(i, sizeof(V) / sizeof(T), n, line) ||
        emulator::misaligned(p + i, sizeof(V), "shared vector store", line))
      return;
    emulator::shared_write(p + i, sizeof(V), line);
    std::memcpy(static_cast<void*>(p + i), &x, sizeof x);
  }
  sptr sub(int offset, int count, SIMT_LOC) const {
    emulator::outside(offset, count, n, line);
    return {p + offset, count};
  }
};

struct Smem {  // the layout of the device, so that swizzles and banks agree
  int used = 0;
  template <class T>
  sptr<T> alloc(int n, int align = 16, SIMT_LOC) {
    used = (used + align - 1) / align * align;
    const sptr<T> view{reinterpret_cast<T*>(emulator::shared + used), n};
    used += n * int(sizeof(T));
    if (used > emulator::shared_bytes)
      emulator::fail(&Report::bounds, "line %d asks for %d bytes of shared memory, the launch has %d", line, used,
                     emulator::shared_bytes);
    return view;
  }
};

// ---- synchronisation ------------------------------------------------------------------------------------------------

inline void sync_cta(SIMT_LOC) { emulator::barrier(0, nthreads(), line); }
inline void sync_warp(SIMT_LOC) { emulator::warp_barrier(line); }
inline void sync_named(int id, int n, SIMT_LOC) { emulator::barrier(id, n, line); }

// ---- warp collectives -----------------------------------------------------------------------------------------------

namespace emulator {

// result = of(values of all lanes, lane)
template <class T, class R, class F>
R gather(const char* what, int line, T value, F of) {
  struct Argument {
    T value;
    R result;
    F of;
  } mine{value, R(), of};
  collective(what, line, &mine, [](void* const* all) {
    T values[32];
    for (int l = 0; l < 32; ++l) values[l] = static_cast<Argument*>(all[l])->value;
    for (int l = 0; l < 32; ++l) {
      auto* a = static_cast<Argument*>(all[l]);
      a->result = a->of(values, l);
    }
  });
  return mine.result;
}

template <class T>
T shuffle(const char* what, int line, T x, int from) {
  return gather<T, T>(what, line, x, [=](const T* v, int l) { return from >= 0 && from < 32 ? v[from] : v[l]; });
}

}  // namespace emulator

template <class T>
T shfl_up(T x, int d, SIMT_LOC) {
  return emulator::shuffle("shfl_up", line, x, (tid() & 31) - d);
}
template <class T>
T shfl_down(T x, int d, SIMT_LOC) {
  return emulator::shuffle("shfl_down", line, x, (tid() & 31) + d);
}
template <class T>
T shfl_xor(T x, int mask, SIMT_LOC) {
  return emulator::shuffle("shfl_xor", line, x, (tid() & 31) ^ mask);
}
template <class T>
T shfl_idx(T x, int from, SIMT_LOC) {
  return emulator::shuffle("shfl_idx", line, x, from & 31);
}
inline uint32_t vote_ballot(bool x, SIMT_LOC) {
  return emulator::gather<bool, uint32_t>("vote_ballot", line, x, [](const bool* v, int) {
    uint32_t mask = 0;
    for (int l = 0; l < 32; ++l) mask |= uint32_t(v[l]) << l;
    return mask;
  });
}
inline bool vote_any(bool x, SIMT_LOC) { return vote_ballot(x, line) != 0; }
inline bool vote_all(bool x, SIMT_LOC) { return vote_ballot(x, line) == ~0u; }

// ---- arithmetic -----------------------------------------------------------------------------------------------------

namespace emulator {

template <class T>
T bits_as(uint32_t u) {
  T x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}
inline uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

}  // namespace emulator

inline float ex2(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0 : y;
}
inline double ex2(double x) { return std::exp2(x); }
inline float mul_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double mul_add(double a, double b, double c) { return std::fma(a, b, c); }

inline float to_float(bf16 x) { return emulator::bits_as<float>(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  _Float16 h;
  std::memcpy(&h, &x.bits, sizeof h);
  return float(h);
}
template <class E>
E from_float(float x);
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = emulator::bits(x);
  if (x != x) return {uint16_t(u >> 16 | 0x40)};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const auto h = static_cast<_Float16>(x);
  f16 y;
  std::memcpy(&y.bits, &h, sizeof h);
  return y;
}
template <class E>
uint32_t pack2(float lo, float hi) {
  return uint32_t(from_float<E>(lo).bits) | uint32_t(from_float<E>(hi).bits) << 16;
}
template <class E>
float2 unpack2(uint32_t u) {
  return {to_float(E{uint16_t(u)}), to_float(E{uint16_t(u >> 16)})};
}
inline float to_tf32(float x) { return x != x ? x : emulator::bits_as<float>((emulator::bits(x) + 0x1000) & ~0x1fffu); }

// ---- cp.async -------------------------------------------------------------------------------------------------------

template <class T, class U>
void cp_async16(sptr<T> to, int at, gptr<U> from, int64_t i, int valid = 16, SIMT_LOC) {
  if (emulator::outside(at, 16 / int(sizeof(T)), to.n, line) ||
      emulator::misaligned(to.p + at, 16, "cp.async destination", line) ||
      emulator::misaligned(from.p + i, 16, "cp.async source", line) ||
      (valid > 0 && !emulator::global_read(from.p + i, size_t(valid), line)))
    return;
  emulator::copy_issue(to.p + at, from.p + i, valid, line);
}
inline void cp_commit() { ++emulator::current->groups; }
template <int N>
void cp_wait() {
  emulator::copy_wait(N);
}

// ---- matrix unit ----------------------------------------------------------------------------------------------------

namespace emulator {

void ldmatrix(bool trans, uint32_t (&r)[4], const void* row, int line);
uint32_t movmatrix(uint32_t x, int line);
void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line);
void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line);
void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1, int line);

template <class T>
void ldmatrix(bool trans, uint32_t (&r)[4], sptr<T> s, int i, int line) {
  alignas(16) static const unsigned char nothing[16] = {};
  const void* row = s.p + i;
  if (outside(i, 16 / int(sizeof(T)), s.n, line) || misaligned(row, 16, "ldmatrix row", line))
    row = nothing;
  else
    shared_read(row, 16, line, true);
  ldmatrix(trans, r, row, line);
}

}  // namespace emulator

template <class T>
void ldmatrix_x4(uint32_t (&r)[4], sptr<T> s, int i, SIMT_LOC) {
  emulator::ldmatrix(false, r, s, i, line);
}
template <class T>
void ldmatrix_x4_trans(uint32_t (&r)[4], sptr<T> s, int i, SIMT_LOC) {
  emulator::ldmatrix(true, r, s, i, line);
}
inline uint32_t movmatrix_trans(uint32_t x, SIMT_LOC) { return emulator::movmatrix(x, line); }

template <class E>
struct Mma;
template <>
struct Mma<bf16> {
  static void m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_LOC) {
    emulator::mma_bf16(c, a, b0, b1, line);
  }
};
template <>
struct Mma<f16> {
  static void m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_LOC) {
    emulator::mma_f16(c, a, b0, b1, line);
  }
};
template <>
struct Mma<float> {
  static void m16n8k8(float (&c)[4], const float (&a)[4], float b0, float b1, SIMT_LOC) {
    emulator::mma_tf32(c, a, b0, b1, line);
  }
};

// ---- launch ---------------------------------------------------------------------------------------------------------

// Runs the kernel to its end; what goes wrong is in report(), and is a failed launch as well.
template <class K>
const char* launch(dim3 grid, int block, int smem, Stream, const typename K::Params& p) {
  if (block > K::kMaxThreads || block % 32 || block <= 0) return "invalid configuration argument";
  const int before = report().errors();
  emulator::run(
      grid, block, smem, [](const void* params) { K::run(*static_cast<const typename K::Params*>(params)); }, &p,
      K::kName);
  return report().errors() == before ? nullptr : report().messages.back().c_str();
}

}  // namespace simt
