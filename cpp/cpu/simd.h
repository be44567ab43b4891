// simd.h - vectors of T, as wide as in the instruction set that this file is compiled for, and
// their operations. The arithmetic of methods needs no other file with intrinsics. Vectors are GCC
// and Clang vector extensions: +, *, ?: and comparisons work as written, a scalar operand is
// broadcast, and a * b + c becomes one FMA (-ffp-contract=fast).
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../problem.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace lc::LC_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

// The 16-bit formats are used for storage only.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class T>
struct Simd {
  using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  static constexpr int kLanes = kVectorBytes / int(sizeof(T));
  typedef T Vec __attribute__((vector_size(kVectorBytes)));
  typedef Int Ivec __attribute__((vector_size(kVectorBytes)));  // the result of comparisons
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));  // kLanes values of 16 bits
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
constexpr int kLanes = Simd<T>::kLanes;

template <class T>
LC_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // exact for -0 too
}

// The larger of x and a bound. NaN stays NaN. The AVX-512 functions are masked, since GCC 12 warns
// in its own header of those without a mask.
template <class T>
LC_INLINE Vec<T> at_least(Vec<T> x, T least) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_maskz_max_ps(0xffff, broadcast<T>(least), x);
  else
    return _mm512_maskz_max_pd(0xff, broadcast<T>(least), x);
#elif defined(__F16C__)
  if constexpr (sizeof(T) == 4)
    return _mm256_max_ps(broadcast<T>(least), x);
  else
    return _mm256_max_pd(broadcast<T>(least), x);
#else
  return x < least ? broadcast<T>(least) : x;
#endif
}

// 0, 1, 2, ...
template <class T>
LC_INLINE typename Simd<T>::Ivec iota() {
  typename Simd<T>::Ivec v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
  return v;
}

namespace detail {

using F = Simd<float>;
typedef uint32_t Uvec __attribute__((vector_size(kVectorBytes)));

LC_INLINE Vec<float> from_bits(Uvec u) { return reinterpret_cast<Vec<float>>(u); }
LC_INLINE Uvec to_bits(Vec<float> x) { return reinterpret_cast<Uvec>(x); }

LC_INLINE Vec<float> widen_bf16(F::Half h) { return from_bits(__builtin_convertvector(h, Uvec) << 16); }

LC_INLINE F::Half narrow_bf16(Vec<float> x) {  // to nearest even
  const Uvec u = to_bits(x);
  const Uvec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Uvec nan = (u >> 16) | 0x40;
  return __builtin_convertvector(x == x ? rounded : nan, F::Half);
}

LC_INLINE Vec<float> widen_f16(F::Half h) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(h));  // unmasked, GCC 12 warns in its own header
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h));
#else
  const Uvec u = __builtin_convertvector(h, Uvec);
  const Uvec sign = (u & 0x8000) << 16, magnitude = u & 0x7fff;
  Uvec normal = (magnitude << 13) + (112u << 23);
  normal = magnitude >= 0x7c00 ? normal + (112u << 23) : normal;  // inf and NaN
  const Vec<float> small = __builtin_convertvector(reinterpret_cast<F::Ivec>(magnitude), Vec<float>) * 0x1p-24f;
  return from_bits((magnitude < 0x400 ? to_bits(small) : normal) | sign);
#endif
}

LC_INLINE F::Half narrow_f16(Vec<float> x) {  // to nearest even
#if defined(__AVX512F__)
  return reinterpret_cast<F::Half>(_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return reinterpret_cast<F::Half>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Uvec u = to_bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  const Uvec normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const Uvec small = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;  // 0.5 has the unit of the half's subnormals
  Uvec r = magnitude < 0x38800000 ? small : normal;
  const Uvec inf = Uvec{} + 0x7c00, nan = Uvec{} + 0x7e00;
  r = magnitude >= 0x477ff000 ? inf : r;
  r = magnitude > 0x7f800000 ? nan : r;
  return __builtin_convertvector(r | sign, F::Half);
#endif
}

template <class T, int... L>
LC_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, L...);
#else
  return __builtin_shuffle(a, b, typename Simd<T>::Ivec{L...});
#endif
}

// x plus x with lanes i and i + D exchanged; then the same for D / 2, down to 1.
template <class T, int D, int... L>
LC_INLINE Vec<T> add_across(Vec<T> x, std::integer_sequence<int, L...> lanes) {
  x = x + shuffle<T, (L ^ D)...>(x, x);
  if constexpr (D > 1) x = add_across<T, D / 2>(x, lanes);
  return x;
}

template <class T, int D, int... L>
LC_INLINE void transpose_steps(Vec<T> (&r)[kLanes<T>], std::integer_sequence<int, L...> lanes) {
  constexpr int n = kLanes<T>;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i & D) continue;
    const Vec<T> a = r[i], b = r[i + D];
    r[i] = shuffle<T, (L & D ? n + L - D : L)...>(a, b);
    r[i + D] = shuffle<T, (L & D ? n + L : L + D)...>(a, b);
  }
  if constexpr (D > 1) transpose_steps<T, D / 2>(r, lanes);
}

}  // namespace detail

// The sum of all elements: the upper half is added to the lower half until one number remains.
template <class T>
LC_INLINE T sum(Vec<T> x) {
  return detail::add_across<T, kLanes<T> / 2>(x, std::make_integer_sequence<int, kLanes<T>>())[0];
}

// Rounds to a 16-bit format, to nearest even.
template <class E>
LC_INLINE Simd<float>::Half narrow(Vec<float> x) {
  if constexpr (std::is_same_v<E, bf16>)
    return detail::narrow_bf16(x);
  else
    return detail::narrow_f16(x);
}

// Loads one vector of T from consecutive elements of storage type E, and stores one (rounded to
// nearest even).
template <class T, class E>
LC_INLINE Vec<T> load(const E* p) {
  if constexpr (std::is_same_v<T, E>) {
    return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
  } else {
    typename Simd<T>::Half h;
    std::memcpy(&h, p, sizeof h);
    if constexpr (std::is_same_v<E, bf16>)
      return detail::widen_bf16(h);
    else
      return detail::widen_f16(h);
  }
}
template <class T, class E>
LC_INLINE void store(E* p, Vec<T> x) {
  if constexpr (std::is_same_v<T, E>) {
    *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = x;
  } else {
    const typename Simd<T>::Half h = narrow<E>(x);
    std::memcpy(p, &h, sizeof h);
  }
}

// The same for the first n < kLanes elements. The other lanes are loaded as zero and are not
// stored.
template <class T, class E>
LC_INLINE Vec<T> load(const E* p, int n) {
  E part[kLanes<T>] = {};
  std::memcpy(part, p, size_t(n) * sizeof(E));
  return load<T>(part);
}
template <class T, class E>
LC_INLINE void store(E* p, Vec<T> x, int n) {
  E part[kLanes<T>];
  store<T>(part, x);
  std::memcpy(p, part, size_t(n) * sizeof(E));
}

// The same to memory past the caches, where the processor can: for results that are larger than the
// caches. p is aligned to the bytes that are stored. A worker that has used it calls finish_stores
// before other threads read the results.
template <class T, class E>
LC_INLINE void store_past_caches(E* p, Vec<T> x) {
#if defined(__AVX512F__) || defined(__F16C__)
  if constexpr (std::is_same_v<T, E>) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(x));
#else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(x));
#endif
  } else {
    const typename Simd<T>::Half h = narrow<E>(x);
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(h));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(h));
#endif
  }
#else
  store<T>(p, x);
#endif
}
LC_INLINE void finish_stores() {
#if defined(__AVX512F__) || defined(__F16C__)
  _mm_sfence();
#endif
}

namespace detail {

// Coefficients of 2^f for |f| <= 1/2: the Taylor series in float64, and in float32 the polynomial
// whose largest relative error is smallest, 2e-9.
template <class T>
struct Exp2Series {
  static constexpr int kDegree = 13;
  T c[kDegree + 1];
  constexpr Exp2Series() : c{} {
    T term = 1;
    for (int i = 0; i <= kDegree; ++i) {
      c[i] = term;
      term *= 0.693147180559945309417 / (i + 1);
    }
  }
};
template <>
struct Exp2Series<float> {
  static constexpr int kDegree = 6;
  float c[kDegree + 1] = {1, 0.6931472f, 0.24022648f, 0.055503325f, 0.00961844f, 0.001339887f, 0.00015353359f};
};

// A number that is added to |y| < 2^21 so that its low bits hold round(y).
template <class T>
constexpr T kRound = sizeof(T) == 8 ? T(0x1.8p52) : T(0x1.8p23);

// 2^(n + f) for |f| <= 1/2 and |n| <= 126 (float64: 1022), where shifted = n + kRound.
template <class T>
LC_INLINE Vec<T> exp2_of(Vec<T> shifted, Vec<T> f) {
  using Ivec = typename Simd<T>::Ivec;
  constexpr Exp2Series<T> series;
  Vec<T> e = broadcast<T>(series.c[series.kDegree]);
  for (int i = series.kDegree - 1; i >= 0; --i) e = e * f + series.c[i];
  const Ivec n = reinterpret_cast<Ivec>(shifted) << (sizeof(T) == 8 ? 52 : 23);
  return reinterpret_cast<Vec<T>>(reinterpret_cast<Ivec>(e) + n);
}

}  // namespace detail

// 2^x for x <= 0, with an error of about one unit in the last place. The result is exactly 1 at x =
// 0, and exactly 0 below the smallest normal number.
template <class T>
LC_INLINE Vec<T> exp2(Vec<T> x) {
  constexpr T kLowest = sizeof(T) == 8 ? -1022 : -126;
  const Vec<T> y = at_least<T>(x, kLowest), shifted = y + detail::kRound<T>;
  const Vec<T> e = detail::exp2_of<T>(shifted, y - (shifted - detail::kRound<T>));
  return x < kLowest ? Vec<T>{} : e;
}

// Transposes a kLanes x kLanes block in registers. At each distance d = kLanes/2, ..., 1, rows i
// and i + d exchange the blocks of d lanes off the diagonal.
template <class T>
LC_INLINE void transpose(Vec<T> (&r)[kLanes<T>]) {
  detail::transpose_steps<T, kLanes<T> / 2>(r, std::make_integer_sequence<int, kLanes<T>>{});
}

}  // namespace lc::LC_ISA
