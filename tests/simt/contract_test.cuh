// contract_test.cuh - the contract of every primitive of simt.h: a kernel, and the words that it
// has to write. The same source runs in the emulator (contract_test.cpp) and on a GPU
// (contract_test.cu), so that both implementations keep the same contracts. Unless a case tests
// rounding, its numbers are integers, for which even mma is exact. One file: test_rules.py looks
// here for the contract of each primitive.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "../../cpp/simt/simt.h"

namespace contract {

using namespace simt;
using Words = std::vector<uint32_t>;

enum class Compare { bits, floats, doubles };  // floats, doubles: all NaN are equal

struct Case {
  const char* name;
  const char* (*launch)(const uint32_t* in, uint32_t* out, Stream stream);
  Words in, want;
  Compare compare = Compare::bits;
  int64_t units = 0;  // largest error, in units of the last place
};

// ---- kernels ------------------------------------------------------------------------------------

struct Kernel {
  static constexpr const char* kName = "contract";
  static constexpr int kMaxThreads = 128, kMinBlocks = 1, kThreads = 32, kShared = 0, kGrid[3] = {1, 1, 1};
  struct Params {
    gptr<const uint32_t> in;
    gptr<uint32_t> out;
  };
};

template <class K>
const char* launch_case(const uint32_t* in, uint32_t* out, Stream stream) {
  const dim3 grid(unsigned(K::kGrid[0]), unsigned(K::kGrid[1]), unsigned(K::kGrid[2]));
  return launch<K>(grid, K::kThreads, K::kShared, stream, {{in}, {out}});
}

template <class T>
SIMT_DEV gptr<const T> in_as(const Kernel::Params& a) {
  return {reinterpret_cast<const T*>(a.in.p)};
}
template <class T>
SIMT_DEV gptr<T> out_as(const Kernel::Params& a) {
  return {reinterpret_cast<T*>(a.out.p)};
}

struct Index : Kernel {
  static constexpr int kThreads = 96, kGrid[3] = {3, 2, 2};
  static SIMT_DEV void run(const Params& a) {
    const dim3 b = bid();
    const int block = int(b.x) + 3 * (int(b.y) + 2 * int(b.z));
    const gptr<uint32_t> out = a.out.sub((int64_t(block) * nthreads() + tid()) * 5);
    out.st(0, uint32_t(block));
    out.st(1, uint32_t(nthreads()));
    out.st(2, uint32_t(fresh(lane())));
    out.st(3, uint32_t(warp()));
    out.st(4, uint32_t(nwarps()));
  }
};

struct Global : Kernel {
  static SIMT_DEV void run(const Params& a) {
    const int t = tid();
    a.out.sub(32).st(t - 32, a.in.sub(-64).ld(64 + t));
    a.out.stv(32 + 2 * t, a.in.ldv<uint2>(32 + 2 * t));
    a.out.stv(96 + 4 * t, a.in.ldv<uint4>(96 + 4 * t));
    for (int h = 0; h < 2; ++h) {
      const int i = 2 * (224 + t) + h;
      out_as<uint16_t>(a).st(i, in_as<uint16_t>(a).ld(i));
    }
    out_as<double>(a).st(128 + t, in_as<double>(a).ld(128 + t));
  }
};

struct Shared : Kernel {
  static constexpr int kShared = 2048;
  static SIMT_DEV void run(const Params& a) {
    const int t = tid();
    Smem smem;
    const auto odd = smem.alloc<uint16_t>(3);
    const auto s = smem.alloc<uint32_t>(32 * 8, 128);
    const auto d = smem.alloc<double>(32);
    if (t < 3) odd.st(t, uint16_t(t));
    s.st(t, a.in.ld(t));
    s.stv(32 + 4 * t, a.in.ldv<uint4>(32 + 4 * t));
    const auto pairs = s.sub(160, 64);
    pairs.stv(2 * t, a.in.ldv<uint2>(160 + 2 * t));
    d.st(t, double(t));
    a.out.st(t, s.ld(t));
    a.out.st(32 + 4 * t + 3, s.ldv<uint4>(32 + 4 * t).w);
    for (int i = 0; i < 3; ++i) a.out.st(32 + 4 * t + i, s.ld(32 + 4 * t + i));
    a.out.stv(160 + 2 * t, pairs.ldv<uint2>(2 * t));
    a.out.st(224 + t, uint32_t(d.ld(t)));
    a.out.st(256 + t, uint32_t(reinterpret_cast<uintptr_t>(s.p) % 128 + reinterpret_cast<uintptr_t>(d.p) % 16));
    a.out.st(288 + t, uint32_t(smem.used));
  }
};

// More shared memory than a launch has by default.
struct LargeShared : Kernel {
  static constexpr int kThreads = 128, kShared = 96 * 1024;
  static SIMT_DEV void run(const Params& a) {
    Smem smem;
    const auto s = smem.alloc<uint32_t>(kShared / 4);
    const int at = kShared / 4 - nthreads() + tid();
    s.st(tid(), a.in.ld(tid()));
    s.st(at, a.in.ld(tid()) + 1);
    a.out.st(tid(), s.ld(tid()) + s.ld(at));
  }
};

struct SyncCta : Kernel {
  static constexpr int kThreads = 128, kShared = 512;
  static SIMT_DEV void run(const Params& a) {
    Smem smem;
    const auto s = smem.alloc<uint32_t>(nthreads());
    uint32_t x = a.in.ld(tid());
    for (int i = 0; i < 4; ++i) {
      s.st(tid(), x);
      sync_cta();
      x += s.ld((tid() + 37) % nthreads());
      sync_cta();
    }
    a.out.st(tid(), x);
  }
};

struct SyncWarp : Kernel {
  static constexpr int kThreads = 128, kShared = 512;
  static SIMT_DEV void run(const Params& a) {
    Smem smem;
    const auto s = smem.alloc<uint32_t>(nthreads());
    uint32_t x = a.in.ld(tid());
    for (int i = 0; i < 4; ++i) {
      s.st(tid(), x);
      sync_warp();
      x += s.ld(warp() * 32 + (lane() + 5) % 32);
      sync_warp();
    }
    a.out.st(tid(), x);
  }
};

struct SyncNamed : Kernel {
  static constexpr int kThreads = 128, kShared = 512;
  static SIMT_DEV void run(const Params& a) {
    Smem smem;
    const auto s = smem.alloc<uint32_t>(nthreads());
    const int half = warp() / 2;
    uint32_t x = a.in.ld(tid());
    for (int i = 0; i < 2 + 3 * half; ++i) {
      s.st(tid(), x);
      sync_named(1 + 14 * half, 64);
      x += s.ld(half * 64 + (tid() + 33) % 64);
      sync_named(1 + 14 * half, 64);
    }
    a.out.st(tid(), x);
  }
};

template <class T>
struct Shuffles : Kernel {
  static constexpr int kThreads = 64;
  static SIMT_DEV void run(const Params& a) {
    const T x = in_as<T>(a).ld(tid());
    const auto out = out_as<T>(a).sub(tid() * 8);
    out.st(0, shfl_up(x, 1));
    out.st(1, shfl_up(x, 31));
    out.st(2, shfl_down(x, 2));
    out.st(3, shfl_down(x, 16));
    out.st(4, shfl_xor(x, 1)), out.st(5, shfl_xor(x, 21)), out.st(6, shfl_idx(x, 7)),
        out.st(7, shfl_idx(x, 31 - lane()));
  }
};

struct Votes : Kernel {
  static constexpr int kThreads = 96;
  static SIMT_DEV void run(const Params& a) {
    const bool x = a.in.ld(tid()) != 0;
    a.out.st(3 * tid(), vote_ballot(x));
    a.out.st(3 * tid() + 1, vote_any(x));
    a.out.st(3 * tid() + 2, vote_all(x));
  }
};

template <class T>
struct Ex2 : Kernel {
  static SIMT_DEV void run(const Params& a) { out_as<T>(a).st(tid(), ex2(in_as<T>(a).ld(tid()))); }
};

struct Rcp : Kernel {
  static SIMT_DEV void run(const Params& a) { out_as<float>(a).st(tid(), rcp(in_as<float>(a).ld(tid()))); }
};

struct SinCosPi : Kernel {
  static SIMT_DEV void run(const Params& a) {
    const double x = in_as<double>(a).ld(tid());
    out_as<double>(a).st(2 * tid(), sin_pi(x));
    out_as<double>(a).st(2 * tid() + 1, cos_pi(x));
  }
};

template <class T>
struct MulAdd : Kernel {
  static SIMT_DEV void run(const Params& a) {
    const auto in = in_as<T>(a).sub(3 * tid());
    out_as<T>(a).st(tid(), mul_add(in.ld(0), in.ld(1), in.ld(2)));
  }
};

template <class E>
struct ToFloat : Kernel {
  static constexpr int kThreads = 128, kGrid[3] = {512, 1, 1};  // one thread per bit pattern
  static SIMT_DEV void run(const Params& a) {
    const int i = int(bid().x) * nthreads() + tid();
    out_as<float>(a).st(i, to_float(E{uint16_t(i)}));
  }
};

template <class E>
struct FromFloat : Kernel {
  static constexpr int kThreads = 128, kGrid[3] = {128, 1, 1};
  static SIMT_DEV void run(const Params& a) {
    const int i = int(bid().x) * nthreads() + tid();
    out_as<float>(a).st(i, to_float(from_float<E>(in_as<float>(a).ld(i))));
  }
};

template <class E>
struct Pack : Kernel {
  static SIMT_DEV void run(const Params& a) {
    const auto in = in_as<float>(a).sub(2 * tid());
    const uint32_t u = pack2<E>(in.ld(0), in.ld(1));
    const float2 x = unpack2<E>(u);
    a.out.st(tid(), u);
    out_as<float>(a).st(32 + 2 * tid(), x.x);
    out_as<float>(a).st(33 + 2 * tid(), x.y);
  }
};

struct ToTf32 : Kernel {
  static SIMT_DEV void run(const Params& a) { out_as<float>(a).st(tid(), to_tf32(in_as<float>(a).ld(tid()))); }
};

// Storage -> accumulator -> storage, for the four types.
struct WidenNarrow : Kernel {
  static SIMT_DEV void run(const Params& a) {
    const float x = in_as<float>(a).ld(tid());
    out_as<float>(a).st(tid(), widen(narrow<bf16>(x)));
    out_as<float>(a).st(32 + tid(), widen(narrow<f16>(x)));
    out_as<float>(a).st(64 + tid(), narrow<float>(widen(x)));
    out_as<float>(a).st(96 + tid(), float(narrow<double>(widen(double(x)))));
  }
};

// Three groups of copies, in two stages and a remainder: whole copies, copies of `valid` bytes, no
// copies.
struct CpAsync : Kernel {
  static constexpr int kThreads = 64, kShared = 3 * 64 * 16;
  static SIMT_DEV void run(const Params& a) {
    Smem smem;
    const auto s = smem.alloc<uint32_t>(3 * 64 * 4);
    const int t = tid();
    cp_async16(s, 4 * t, a.in, 4 * t);
    cp_commit();
    cp_async16(s, 256 + 4 * t, a.in, 256 + 4 * t, t % 17);
    cp_commit();
    cp_async16(s, 512 + 4 * t, a.in, 0, 0);
    cp_commit();
    cp_wait<2>();
    sync_cta();
    for (int i = t; i < 256; i += nthreads()) a.out.st(i, s.ld(i));
    cp_wait<1>();
    sync_cta();
    for (int i = t; i < 256; i += nthreads()) a.out.st(256 + i, s.ld(256 + i));
    cp_wait<0>();
    sync_cta();
    for (int i = t; i < 256; i += nthreads()) a.out.st(512 + i, s.ld(512 + i));
  }
};

template <bool kTrans>
struct Ldmatrix : Kernel {
  static constexpr int kShared = 32 * 16;
  static SIMT_DEV void run(const Params& a) {
    Smem smem;
    const auto s = smem.alloc<uint16_t>(32 * 8);
    for (int i = tid(); i < 32 * 8; i += nthreads()) s.st(i, uint16_t(i));
    sync_cta();
    uint32_t r[4];
    if (kTrans)
      ldmatrix_x4_trans(r, s, 8 * lane());
    else
      ldmatrix_x4(r, s, 8 * lane());
    for (int m = 0; m < 4; ++m) a.out.st(m * 32 + lane(), r[m]);
  }
};

struct Movmatrix : Kernel {
  static SIMT_DEV void run(const Params& a) { a.out.st(lane(), movmatrix_trans(a.in.ld(lane()))); }
};

// in: A [16, kDepth], B [kDepth, 8], C [16, 8] as floats; out: A B + C. Fragments as in the PTX
// ISA.
template <class E>
struct MatrixUnit : Kernel {
  static constexpr int kDepth = std::is_same_v<E, float> ? 8 : 16, kPerRegister = kDepth / 8;
  static SIMT_DEV void run(const Params& a) {
    const int g = lane() / 4, t = lane() % 4;
    const gptr<const float> A = in_as<float>(a), B = A.sub(16 * kDepth), C = B.sub(8 * kDepth);
    float c[4];
    for (int e = 0; e < 4; ++e) c[e] = C.ld((g + e / 2 * 8) * 8 + 2 * t + e % 2);
    const auto at_a = [&](int part, int h) {
      return A.ld((g + part % 2 * 8) * kDepth + part / 2 * (kDepth / 2) + t * kPerRegister + h);
    };
    const auto at_b = [&](int part, int h) { return B.ld((part * (kDepth / 2) + t * kPerRegister + h) * 8 + g); };
    if constexpr (std::is_same_v<E, float>) {
      const float x[4] = {at_a(0, 0), at_a(1, 0), at_a(2, 0), at_a(3, 0)};
      Mma<float>::m16n8k8(c, x, at_b(0, 0), at_b(1, 0));
    } else {
      const auto a2 = [&](int part) { return pack2<E>(at_a(part, 0), at_a(part, 1)); };
      const auto b2 = [&](int part) { return pack2<E>(at_b(part, 0), at_b(part, 1)); };
      const uint32_t x[4] = {a2(0), a2(1), a2(2), a2(3)};
      Mma<E>::m16n8k16(c, x, b2(0), b2(1));
    }
    for (int e = 0; e < 4; ++e) out_as<float>(a).st((g + e / 2 * 8) * 8 + 2 * t + e % 2, c[e]);
  }
};

// ---- the words that kernels have to write -------------------------------------------------------

template <class T>
void put(Words& w, T x) {
  uint32_t u[sizeof(T) / 4];
  std::memcpy(u, &x, sizeof x);
  w.insert(w.end(), u, u + sizeof(T) / 4);
}
template <class T>
T get(const Words& w, size_t i) {
  T x;
  std::memcpy(&x, w.data() + i * (sizeof(T) / 4), sizeof x);
  return x;
}
template <class T, class F>
Words words(int n, F of) {
  Words w;
  for (int i = 0; i < n; ++i) put<T>(w, T(of(i)));
  return w;
}

// A 16-bit float with the given number of mantissa bits.
struct Format {
  int mantissa_bits, bias;
  double of_bits(unsigned u) const {
    const int exponent_bits = 15 - mantissa_bits, exponent = int(u & 0x7fff) >> mantissa_bits;
    const double mantissa = double(u & ((1u << mantissa_bits) - 1)), sign = u & 0x8000 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1)
      return sign *
             (mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity());
    const double hidden = exponent ? double(1 << mantissa_bits) : 0;
    return sign * std::ldexp(mantissa + hidden, std::max(exponent, 1) - bias - mantissa_bits);
  }
  double greatest() const { return std::ldexp(2 - std::ldexp(1, -mantissa_bits), bias); }
  // Rounds to nearest, ties to even. Infinity begins half a unit above the greatest number.
  double round(double x) const {
    if (!std::isfinite(x) || x == 0) return x;
    const double unit = std::ldexp(1, std::max(std::ilogb(x), 1 - bias) - mantissa_bits);
    const double y = std::nearbyint(x / unit) * unit;
    return std::fabs(y) > greatest() ? std::copysign(std::numeric_limits<double>::infinity(), x) : y;
  }
};
constexpr Format kBf16 = {7, 127}, kF16 = {10, 15};

// Inputs for conversions to a format: its numbers, ties between two of them, and the neighbours of
// ties.
inline std::vector<float> hard_to_round(Format f, int count) {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> all = {0.f,
                            -0.f,
                            inf,
                            -inf,
                            std::numeric_limits<float>::quiet_NaN(),
                            1e-40f,
                            float(f.greatest()),
                            std::numeric_limits<float>::max()};
  for (unsigned u = 0; int(all.size()) < count; u = (u + 12347) & 0xffff) {
    const double x = f.of_bits(u), next = f.of_bits(u + 1);
    if (!std::isfinite(x) || !std::isfinite(next) || (u & 0x7fff) == 0x7fff) continue;
    const float tie = float((x + next) / 2);
    for (float y : {float(x), tie, std::nextafter(tie, inf), std::nextafter(tie, -inf)}) all.push_back(y);
  }
  all.resize(size_t(count));
  return all;
}

inline int number(int i) { return i * 29 % 17 - 8; }  // integers of few bits

template <class E>
Case matrix_unit(const char* name) {
  using K = MatrixUnit<E>;
  constexpr int D = K::kDepth;
  Case c{name, launch_case<K>, words<float>(24 * D + 128, number), {}};
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      int sum = number(24 * D + i * 8 + j);
      for (int k = 0; k < D; ++k) sum += number(i * D + k) * number(16 * D + k * 8 + j);
      put(c.want, float(sum));
    }
  return c;
}

template <class T>
Case shuffles(const char* name) {
  const auto x = [](int i) { return i * 3 + 1; };
  Case c{name, launch_case<Shuffles<T>>, words<T>(64, x), {}};
  for (int t = 0; t < 64; ++t) {
    const int l = t % 32, first = t - l;
    for (int from : {l - 1, l - 31, l + 2, l + 16, l ^ 1, l ^ 21, 7, 31 - l})
      put(c.want, T(x(first + (from < 0 || from > 31 ? l : from))));
  }
  return c;
}

template <class E>
void conversions(std::vector<Case>& all, Format f, const char* to, const char* from, const char* pack) {
  all.push_back({to,
                 launch_case<ToFloat<E>>,
                 {0},
                 words<float>(1 << 16, [&](int i) { return f.of_bits(unsigned(i)); }),
                 Compare::floats});
  constexpr int kCount = FromFloat<E>::kThreads * FromFloat<E>::kGrid[0];
  const std::vector<float> x = hard_to_round(f, kCount);
  all.push_back({from, launch_case<FromFloat<E>>, words<float>(kCount, [&](int i) { return x[size_t(i)]; }),
                 words<float>(kCount, [&](int i) { return f.round(double(x[size_t(i)])); }), Compare::floats});
  Case c{pack, launch_case<Pack<E>>, words<float>(64, number), {}};
  const auto half = [&](int i) {
    unsigned u = 0;
    while (f.of_bits(u) != number(i) || (u & 0x8000 && !number(i))) ++u;
    return u;
  };
  for (int i = 0; i < 32; ++i) put(c.want, uint32_t(half(2 * i) | half(2 * i + 1) << 16));
  for (int i = 0; i < 64; ++i) put(c.want, float(number(i)));
  all.push_back(c);
}

inline void memory_and_barriers(std::vector<Case>& all) {
  Case index{"tid nthreads bid lane warp nwarps fresh", launch_case<Index>, {0}, {}};
  for (uint32_t block = 0; block < 12; ++block)
    for (uint32_t t = 0; t < 96; ++t)
      for (uint32_t x : {block, 96u, t % 32, t / 32, 3u}) index.want.push_back(x);
  all.push_back(index);

  const Words numbers = words<uint32_t>(320, [](int i) { return 0x9E3779B9u * uint32_t(i + 1); });
  all.push_back({"gptr", launch_case<Global>, numbers, numbers});
  Case shared{"sptr Smem", launch_case<Shared>, numbers, numbers};
  for (uint32_t t = 0; t < 32; ++t) {
    shared.want[224 + t] = t;
    shared.want[256 + t] = 0;
    shared.want[288 + t] = 128 + 32 * 8 * 4 + 32 * 8;
  }
  all.push_back(shared);
  all.push_back({"launch with 96 KB of shared memory", launch_case<LargeShared>, words<uint32_t>(128, number),
                 words<uint32_t>(128, [](int i) { return 2 * number(i) + 1; })});

  const auto exchange = [](int steps, int first, int size, int shift, Words x) {
    for (int i = 0; i < steps; ++i) {
      const Words before = x;
      for (int t = first; t < first + size; ++t) x[size_t(t)] += before[size_t(first + (t - first + shift) % size)];
    }
    return x;
  };
  const Words start(numbers.begin(), numbers.begin() + 128);
  all.push_back({"sync_cta", launch_case<SyncCta>, start, exchange(4, 0, 128, 37, start)});
  Words warps = start;
  for (int w = 0; w < 4; ++w) warps = exchange(4, 32 * w, 32, 5, warps);
  all.push_back({"sync_warp", launch_case<SyncWarp>, start, warps});
  all.push_back({"sync_named", launch_case<SyncNamed>, start, exchange(5, 64, 64, 33, exchange(2, 0, 64, 33, start))});

  Words copied = words<uint32_t>(768, [](int i) { return 0x01010101u * uint32_t(i % 250 + 1); });
  Case copies{"cp_async16 cp_commit cp_wait", launch_case<CpAsync>, copied, copied};
  auto* bytes = reinterpret_cast<unsigned char*>(copies.want.data());
  for (int t = 0; t < 64; ++t)
    for (int i = t % 17; i < 16; ++i) bytes[1024 + 16 * t + i] = 0;
  std::fill(copies.want.begin() + 512, copies.want.end(), 0u);
  all.push_back(copies);
}

inline void warps(std::vector<Case>& all) {
  all.push_back(shuffles<uint32_t>("shfl_up shfl_down shfl_xor shfl_idx, 32 bits"));
  all.push_back(shuffles<float>("shfl_up shfl_down shfl_xor shfl_idx, float"));
  all.push_back(shuffles<double>("shfl_up shfl_down shfl_xor shfl_idx, double"));

  const uint32_t masks[3] = {0x80000005u, 0, ~0u};  // one for each warp
  Case votes{"vote_ballot vote_any vote_all",
             launch_case<Votes>,
             words<uint32_t>(96, [&](int i) { return masks[i / 32] >> i % 32 & 1; }),
             {}};
  for (int t = 0; t < 96; ++t) {
    const uint32_t m = masks[t / 32];
    for (uint32_t x : {m, uint32_t(m != 0), uint32_t(m == ~0u)}) votes.want.push_back(x);
  }
  all.push_back(votes);

  // Element (i, j) of matrix m is 64 m + 8 i + j; lane l holds (l / 4, 2 (l % 4)) and the next
  // number.
  Case plain{"ldmatrix_x4", launch_case<Ldmatrix<false>>, {0}, {}};
  Case trans{"ldmatrix_x4_trans", launch_case<Ldmatrix<true>>, {0}, {}};
  for (uint32_t m = 0; m < 4; ++m)
    for (uint32_t l = 0; l < 32; ++l) {
      const uint32_t i = l / 4, j = l % 4 * 2;
      plain.want.push_back((64 * m + 8 * i + j) | (64 * m + 8 * i + j + 1) << 16);
      trans.want.push_back((64 * m + 8 * j + i) | (64 * m + 8 * (j + 1) + i) << 16);
    }
  all.push_back(plain);
  all.push_back(trans);
  all.push_back({"movmatrix_trans", launch_case<Movmatrix>, Words(plain.want.begin(), plain.want.begin() + 32),
                 Words(trans.want.begin(), trans.want.begin() + 32)});

  all.push_back(matrix_unit<bf16>("Mma<bf16>::m16n8k16"));
  all.push_back(matrix_unit<f16>("Mma<f16>::m16n8k16"));
  all.push_back(matrix_unit<float>("Mma<float>::m16n8k8"));
}

inline void arithmetic(std::vector<Case>& all) {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> powers = {0,    -1,   -2,    -126,  -200,  -1e6, -inf,  inf,  nan,  1,    10,
                                127,  -0.5, -0.25, -1e-3, -1e-6, -3.7, -17.3, -100, 0.5,  0.75, 1.9,
                                33.3, -125, -64,   -32,   -16,   -8,   -4,    -5.5, -7.1, -0.};
  const auto power = [&](int i) { return powers[size_t(i)]; };
  // float: results below 2^-126 are 0
  all.push_back({"ex2, float", launch_case<Ex2<float>>, words<float>(32, power),
                 words<float>(32, [&](int i) { return power(i) < -126 ? 0 : std::exp2(double(float(power(i)))); }),
                 Compare::floats, 2});
  all.push_back({"ex2, double", launch_case<Ex2<double>>, words<double>(32, power),
                 words<double>(32, [&](int i) { return std::exp2(power(i)); }), Compare::doubles, 2});

  // Results below 2^-126 are 0.
  const auto divisor = [&](int i) {
    return i < 28 ? std::ldexp(1 + i / 9., 8 * i - 100) * (i % 3 ? 1 : -1) : i < 30 ? inf : nan;
  };
  all.push_back({"rcp", launch_case<Rcp>, words<float>(32, divisor),
                 words<float>(32, [&](int i) { return 1 / double(float(divisor(i))); }), Compare::floats, 2});

  // Multiples of 1/24, and numbers close to zeros of sine and cosine.
  const auto turn = [](int i) {
    if (i < 25) return i / 24.;
    return std::array{
        0x1p-40, 1 - 0x1p-40, 0.5 - 0x1p-40, 0.5 + 0x1p-40, 0x1p-12, 1 - 0x1p-12, 0.5 - 0x1p-12}[size_t(i - 25)];
  };
  const auto sine = [](double x) { return std::sin(3.14159265358979323846 * std::min(x, 1 - x)); };  // 0 <= x <= 1
  all.push_back({"sin_pi cos_pi", launch_case<SinCosPi>, words<double>(32, turn),
                 words<double>(64,
                               [&](int i) {
                                 const double x = turn(i / 2);
                                 return i % 2 == 0 ? sine(x) : x > 0.5 ? -sine(x - 0.5) : sine(0.5 - x);
                               }),
                 Compare::doubles, 4});

  // (1 + e) (1 - e) - 1 = -e^2, which a rounded product loses
  const auto factor = [](int bits) {
    return [=](int i) { return i % 3 == 0 ? 1 + std::ldexp(1, -bits) : i % 3 == 1 ? 1 - std::ldexp(1, -bits) : -1; };
  };
  all.push_back({"mul_add, float", launch_case<MulAdd<float>>, words<float>(96, factor(20)),
                 words<float>(32, [](int) { return -std::ldexp(1, -40); })});
  all.push_back({"mul_add, double", launch_case<MulAdd<double>>, words<double>(96, factor(40)),
                 words<double>(32, [](int) { return -std::ldexp(1, -80); })});

  conversions<bf16>(all, kBf16, "to_float(bf16)", "from_float<bf16>", "pack2 unpack2, bf16");
  conversions<f16>(all, kF16, "to_float(f16)", "from_float<f16>", "pack2 unpack2, f16");

  // 1 + i 2^-12: of four neighbours two round down; two round up, one of them a tie (away from
  // zero)
  const auto near = [](int i) { return (i % 2 ? -1 : 1) * (1 + std::ldexp(i / 2, -12)); };
  all.push_back({"to_tf32", launch_case<ToTf32>, words<float>(32, near), words<float>(32, [&](int i) {
                   return std::copysign(std::floor(std::ldexp(std::fabs(near(i)), 10) + 0.5) / 1024, near(i));
                 })});

  const auto third = [](int i) { return float(i - 16) / 3; };
  Case round{"widen narrow", launch_case<WidenNarrow>, words<float>(32, third), {}};
  for (int i = 0; i < 128; ++i) {
    const float x = third(i % 32);
    put(round.want, i < 32 ? float(kBf16.round(double(x))) : i < 64 ? float(kF16.round(double(x))) : x);
  }
  all.push_back(round);
}

inline std::vector<Case> cases() {
  std::vector<Case> all;
  memory_and_barriers(all);
  warps(all);
  arithmetic(all);
  return all;
}

// ---- comparing ----------------------------------------------------------------------------------

template <class T, class I>
bool close(T x, T want, int64_t units) {
  if (x != x || want != want) return x != x && want != want;
  I a, b;
  std::memcpy(&a, &x, sizeof x);
  std::memcpy(&b, &want, sizeof x);
  return x == want || (std::isfinite(x) && std::isfinite(want) && std::signbit(x) == std::signbit(want) &&
                       std::llabs(int64_t(a) - int64_t(b)) <= units);
}

// What is wrong with the words that a case wrote, or an empty string.
inline std::string difference(const Case& c, const Words& got) {
  const size_t size = c.compare == Compare::doubles ? 2 : 1;
  for (size_t i = 0; i < c.want.size() / size; ++i) {
    bool good = got[i] == c.want[i];
    if (c.compare == Compare::floats)
      good = close<float, int32_t>(get<float>(got, i), get<float>(c.want, i), c.units);
    else if (c.compare == Compare::doubles)
      good = close<double, int64_t>(get<double>(got, i), get<double>(c.want, i), c.units);
    if (good) continue;
    const auto shown = [&](const Words& w) {
      return c.compare == Compare::bits     ? std::to_string(w[i])
             : c.compare == Compare::floats ? std::to_string(get<float>(w, i))
                                            : std::to_string(get<double>(w, i));
    };
    return std::string(c.name) + ": number " + std::to_string(i) + " is " + shown(got) + ", expected " + shown(c.want);
  }
  return {};
}

// Checks that an impossible launch returns an error and does not disturb the next launch. Returns
// what is wrong, or an empty string.
inline std::string refused_launches(const uint32_t* in, uint32_t* out, Stream stream) {
  const Kernel::Params p{{in}, {out}};
  if (!launch<SyncCta>(dim3(1), 2 * SyncCta::kMaxThreads, SyncCta::kShared, stream, p)) return "a block too large runs";
  if (!launch<SyncCta>(dim3(1), SyncCta::kThreads, 1 << 20, stream, p)) return "1 MB of shared memory was there";
  if (const char* why = launch_case<SyncCta>(in, out, stream)) return std::string("after a refused launch: ") + why;
  return {};
}

}  // namespace contract
