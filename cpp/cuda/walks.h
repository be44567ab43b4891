// walks.h - the configuration of chunks.cuh that suits the problem and the device, for chunks.cu and gradient_walks.h.
#pragma once
#include "chunks.cuh"
#include "launch.h"

namespace lc::cuda {

inline constexpr int64_t kMostKeyDim = 256, kLeastSlice = 32;

// Whether a warp may take 32 columns of V, for this many rows of a state (K).
constexpr bool may_be_wide(Aim aim, bool is_bf16, int64_t K) {
  return aim != Aim::decays && K <= (is_bf16 && aim == Aim::outputs ? 128 : 64);
}

// f(kernel) with the one for this many rows of a state and for so many columns of V a warp.
template <Aim kAim, class E, class X, class F>
void with_size(int64_t K, bool wide, F&& f) {
  constexpr bool kBf16 = std::is_same_v<E, bf16>;
  if constexpr (is_16_bit<E> && may_be_wide(kAim, kBf16, 64))
    if (wide && K <= 64) return f(ChunkWalk<E, X, 64, 32, kAim>());
  if constexpr (is_16_bit<E> && may_be_wide(kAim, kBf16, 128))
    if (wide && K <= 128) return f(ChunkWalk<E, X, 128, 32, kAim>());
  if (K <= 64) return f(ChunkWalk<E, X, 64, 16, kAim>());
  if (K <= 128) return f(ChunkWalk<E, X, 128, 16, kAim>());
  f(ChunkWalk<E, X, 256, 16, kAim>());
}
template <Aim kAim, class F>
void with_kernel(const Problem& p, int64_t K, bool wide, F&& f) {
  if (p.type == Type::bf16) return with_size<kAim, bf16, bf16>(K, wide, f);
  if (p.type == Type::f16) return with_size<kAim, f16, tf32>(K, wide, f);
  if (p.tf32) return with_size<kAim, float, tf32>(K, wide, f);
  with_size<kAim, float, float>(K, wide, f);
}

// How the columns of V are dealt out to blocks of up to 4 or (two_warps) 2 warps.
struct Slices {
  int columns, count;  // of one slice; slices
};
inline Slices slice(int64_t V, bool wide, bool two_warps, int64_t heads, int64_t processors) {
  const int64_t unit = wide ? 32 : 16, most = (two_warps ? 2 : 4) * unit;
  int64_t count = (V + most - 1) / most;
  while (!wide && heads * count < processors && V > count * kLeastSlice) ++count;
  const int64_t columns = ((V + count - 1) / count + unit - 1) / unit * unit;
  return {int(columns), int((V + columns - 1) / columns)};
}

inline int threads(const Slices& slices, bool wide) { return slices.columns / (wide ? 32 : 16) * 32; }

inline bool aligned(const View& w, int bytes) {
  const auto multiple = [&](int64_t x) { return x * bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(w.data) % 16 == 0 && multiple(w.stride[0]) && multiple(w.stride[1]) &&
         multiple(w.stride[2]);
}

// The deepest ring that leaves room for as many blocks as a shallow one; 0: there is no room for one.
template <class Kernel>
int stages(const Limits& l) {
  const auto blocks = [&](int n) {
    const int bytes = Kernel::shared_bytes(n);
    return bytes > l.shared_block ? 0 : std::min(Kernel::kMinBlocks, l.shared_processor / (bytes + 1024));
  };
  if (!blocks(1)) return 0;
  if (!blocks(2)) return 1;
  return blocks(3) == blocks(2) ? 3 : 2;
}

// Blocks of a walk, but for their slices.
inline int64_t heads_of(const Problem& p, const Walk& w) {
  const int64_t slots = w.segment < 0 ? Segments{w.length}.slots(p) : p.B;
  return slots * (w.alone ? p.Hs : p.H / heads_per_block(p));
}

// Of pass i of one q head of a state or of all.
inline Pass pass_of(const Problem& p, const Walk& w, const Slices& slices, int parts, int part, bool writes) {
  const int bytes = p.type == Type::f32 ? 4 : 2;
  return {p,
          w,
          parts,
          part,
          writes,
          slices.columns,
          slices.count,
          unsigned(heads_of(p, w) * slices.count),
          aligned(p.q, bytes),
          aligned(p.k, bytes),
          aligned(p.v, bytes),
          aligned(p.o, bytes),
          aligned(w.factor, bytes)};
}

}  // namespace lc::cuda
