// walks.h - launches chunks.cuh with the configuration that suits the problem and the device: of forward walks
// (chunks.cu) and of those of gradients (kernels/chunk/chunk_backward.cu).
#pragma once
#include "chunks.cuh"
#include "launch.h"

namespace lc::cuda {

inline constexpr int64_t kMostKeyDim = 256, kLeastSlice = 32;

// f(kernel) with the one for this many rows of a state (K) and for so many columns of V a warp.
template <bool kGradient, class E, class X, class F>
void with_size(int64_t K, bool wide, F&& f) {
  if constexpr (is_16_bit<E>) {
    if (wide && K <= 64) return f(ChunkWalk<E, X, 64, 32, kGradient>());
    if constexpr (is_16_bit<X>)
      if (wide && K <= 128) return f(ChunkWalk<E, X, 128, 32, kGradient>());
  }
  if (K <= 64) return f(ChunkWalk<E, X, 64, 16, kGradient>());
  if (K <= 128) return f(ChunkWalk<E, X, 128, 16, kGradient>());
  f(ChunkWalk<E, X, 256, 16, kGradient>());
}
template <bool kGradient, class F>
void with_kernel(const Problem& p, int64_t K, bool wide, F&& f) {
  if (p.type == Type::bf16) return with_size<kGradient, bf16, bf16>(K, wide, f);
  if (p.type == Type::f16) return with_size<kGradient, f16, tf32>(K, wide, f);
  if (p.tf32) return with_size<kGradient, float, tf32>(K, wide, f);
  with_size<kGradient, float, float>(K, wide, f);
}
inline bool may_be_wide(Type type, int64_t K) { return type != Type::f32 && K <= (type == Type::bf16 ? 128 : 64); }

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
