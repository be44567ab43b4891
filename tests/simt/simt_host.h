// simt_host.h - the primitives of simt.h for g++: the emulator that tests run kernels in. A thread
// is a fiber; barriers and collectives switch to another fiber. Every access is checked: bounds,
// alignment, reads of memory that was never written, accesses of one block or of several that no
// barrier orders. README.md lists the faults that are found, and those that are not.
#pragma once
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#define SIMT_DEV inline
#define SIMT_UNROLL
#define SIMT_LOOP
#define SIMT_LOC ::simt::emulator::Line line = {__builtin_FILE(), __builtin_LINE()}  // of the caller

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

// ---- settings and reports -----------------------------------------------------------------------

enum class Policy { lockstep, sticky, random, warp_priority };  // which thread runs next
enum class CpAsync { immediate, delayed, poison };              // when a copy lands; poison: NaN until the wait

struct Options {
  Policy policy = Policy::warp_priority;
  uint64_t seed = 1;
  CpAsync cp_async = CpAsync::poison;
};
struct Report {
  int race = 0, uninit = 0, inflight = 0, bounds = 0, align = 0, diverge = 0, deadlock = 0, other = 0;
  long launches = 0, barriers = 0, collectives = 0, mma = 0, ldmatrix_phases = 0, ldmatrix_conflicts = 0;
  Stream stream = nullptr;            // of the last launch, ...
  int device = -1;                    // ... and the current device at that time
  std::vector<std::string> messages;  // the first few
  int errors() const { return race + uninit + inflight + bounds + align + diverge + deadlock + other; }
};
Options& options();
Report& report();

// Adds a range of global memory that kernels may access; forget() empties the list. Memory that is
// not `filled` must be written, in this launch or an earlier one, before it is read.
void allow(const void* p, size_t bytes, bool writable, bool filled = true);
void forget();

// Bytes of shared memory that a block may have on the emulated device.
int most_shared();
int& current_device();  // of this thread

namespace emulator {

struct Line {
  const char* file;
  int number;
  bool operator==(const Line& l) const { return file == l.file && number == l.number; }
  bool operator!=(const Line& l) const { return !(*this == l); }
};
std::string text(Line line);  // "chunk.cuh:12"

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int valid, group;
  Line line;
};
struct Fiber {
  void* context = nullptr;
  unsigned char* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // for the address sanitizer
  int tid = 0, state = 0;
  const char* wait_what = "";
  Line wait_line = {};
  int groups = 0;
  std::vector<Copy> copies;
};
extern Fiber* current;
extern dim3 block_index;
extern int block_threads, shared_bytes;
extern unsigned char* shared;

void fail(int Report::* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));
void collective(const char* what, Line line, void* argument, void (*all)(void* const*));
void barrier(int id, int threads, Line line);
void warp_barrier(Line line);
bool outside(int i, int count, int n, Line line);
// Returns whether the access may be made. `bytes` is a power of two, and the address must be a
// multiple of it.
bool shared_read(const void* p, int bytes, Line line, bool whole_warp = false);
bool shared_write(const void* p, int bytes, Line line);
bool global_read(const void* p, size_t bytes, Line line);
bool global_write(const void* p, size_t bytes, Line line);
void copy(void* to, const void* from, int valid, Line line);
void copy_wait(int groups);
const char* refuse_launch(dim3 grid, int block, int most_threads, int smem);
void run(dim3 grid, int block, int smem, void (*body)(const void*), const void* params, const char* name);

template <class V>
V load(bool may, const void* p) {
  V x = {};
  if (may) std::memcpy(static_cast<void*>(&x), p, sizeof x);
  return x;
}
template <class V>
void store(bool may, void* p, const V& x) {
  if (may) std::memcpy(p, static_cast<const void*>(&x), sizeof x);
}

}  // namespace emulator

inline int tid() { return emulator::current->tid; }
inline int nthreads() { return emulator::block_threads; }
inline dim3 bid() { return emulator::block_index; }
inline int fresh(int x) { return x; }
inline int64_t fresh(int64_t x) { return x; }

// ---- memory -------------------------------------------------------------------------------------

template <class T>
struct gptr {
  T* p;
  using Value = std::remove_const_t<T>;
  Value ld(int64_t i, SIMT_LOC) const { return ldv<Value>(i, line); }
  void st(int64_t i, Value x, SIMT_LOC) const { stv(i, x, line); }
  template <class V>
  V ldv(int64_t i, SIMT_LOC) const {
    return emulator::load<V>(emulator::global_read(p + i, sizeof(V), line), p + i);
  }
  template <class V>
  void stv(int64_t i, V x, SIMT_LOC) const {
    emulator::store(emulator::global_write(p + i, sizeof(V), line), p + i, x);
  }
  gptr sub(int64_t offset) const { return {p + offset}; }
};

template <class T>
struct sptr {
  T* p;
  int n;
  T ld(int i, SIMT_LOC) const { return ldv<T>(i, line); }
  void st(int i, T x, SIMT_LOC) const { stv(i, x, line); }
  template <class V>
  V ldv(int i, SIMT_LOC) const {
    const bool may =
        !emulator::outside(i, sizeof(V) / sizeof(T), n, line) && emulator::shared_read(p + i, sizeof(V), line);
    return emulator::load<V>(may, p + i);
  }
  template <class V>
  void stv(int i, V x, SIMT_LOC) const {
    const bool may =
        !emulator::outside(i, sizeof(V) / sizeof(T), n, line) && emulator::shared_write(p + i, sizeof(V), line);
    emulator::store(may, p + i, x);
  }
  sptr sub(int offset, int count, SIMT_LOC) const {
    emulator::outside(offset, count, n, line);
    return {p + offset, count};
  }
};

struct Smem {  // has the layout of the device, so that swizzles and banks agree
  int used = 0;
  template <class T>
  sptr<T> alloc(int n, int align = 16, SIMT_LOC) {
    used = (used + align - 1) / align * align;
    const sptr<T> view{reinterpret_cast<T*>(emulator::shared + used), n};
    used += n * int(sizeof(T));
    if (used > emulator::shared_bytes)
      emulator::fail(&Report::bounds, "%s asks for %d bytes of shared memory, the launch has %d",
                     emulator::text(line).c_str(), used, emulator::shared_bytes);
    return view;
  }
};

// ---- synchronisation ----------------------------------------------------------------------------

inline void sync_cta(SIMT_LOC) { emulator::barrier(0, nthreads(), line); }
inline void sync_warp(SIMT_LOC) { emulator::warp_barrier(line); }
inline void sync_named(int id, int n, SIMT_LOC) { emulator::barrier(id, n, line); }

// ---- warp collectives ---------------------------------------------------------------------------

namespace emulator {

// result = of(values of all lanes, lane)
template <class T, class R, class F>
R gather(const char* what, Line line, T value, F of) {
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
T shuffle(const char* what, Line line, T x, int from) {
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

// ---- arithmetic ---------------------------------------------------------------------------------

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
inline float rcp(float x) { return 1 / x; }
inline double sin_pi(double x) { return std::sin(3.14159265358979323846 * (x > 0.5 ? 1 - x : x)); }
inline double cos_pi(double x) { return sin_pi(0.5 - x < 0 ? x - 0.5 : 0.5 - x) * (x > 0.5 ? -1 : 1); }
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

// ---- cp.async -----------------------------------------------------------------------------------

template <class T, class U>
void cp_async16(sptr<T> to, int at, gptr<U> from, int64_t i, int valid = 16, SIMT_LOC) {
  if (!emulator::outside(at, 16 / int(sizeof(T)), to.n, line)) emulator::copy(to.p + at, from.p + i, valid, line);
}
inline void cp_commit() { ++emulator::current->groups; }
template <int N>
void cp_wait() {
  emulator::copy_wait(N);
}

// ---- matrix unit --------------------------------------------------------------------------------

namespace emulator {

void ldmatrix(bool trans, uint32_t (&r)[4], const void* row, Line line);
uint32_t movmatrix(uint32_t x, Line line);
void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Line line);
void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Line line);
void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1, Line line);

template <class T>
void ldmatrix(bool trans, uint32_t (&r)[4], sptr<T> s, int i, Line line) {
  alignas(16) static const unsigned char nothing[16] = {};
  const void* row = s.p + i;
  if (outside(i, 16 / int(sizeof(T)), s.n, line) || !shared_read(row, 16, line, true)) row = nothing;
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

// ---- launch -------------------------------------------------------------------------------------

// Runs the kernel to its end. Faults are added to report(), and make the launch fail.
template <class K>
const char* launch(dim3 grid, int block, int smem, Stream stream, const typename K::Params& p) {
  static_assert(std::is_trivially_copyable_v<typename K::Params> && sizeof p <= 4096, "kernel parameters");
  if (const char* why = emulator::refuse_launch(grid, block, K::kMaxThreads, smem)) return why;
  Report& r = report();
  r.stream = stream;
  r.device = current_device();
  const size_t told = r.messages.size();
  const int before = r.errors();
  emulator::run(
      grid, block, smem, [](const void* params) { K::run(*static_cast<const typename K::Params*>(params)); }, &p,
      K::kName);
  return r.errors() == before ? nullptr : r.messages[std::min(told, r.messages.size() - 1)].c_str();
}

}  // namespace simt
