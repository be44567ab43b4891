// launch.h - chooses the configuration of walk.cuh for a problem and a device, and launches walks
// for gradients.
#pragma once
#include "../launch.h"
#include "walk.cuh"

namespace lc::cuda {

inline constexpr int64_t kMostKeyDim = 256, kLeastSlice = 32;

// ---- the kernel ---------------------------------------------------------------------------------

// Whether a warp may have 32 columns of V if a state has K rows.
constexpr bool may_be_wide(Aim aim, bool is_bf16, int64_t K) {
  return aim != Aim::decays && K <= (is_bf16 && aim == Aim::outputs ? 128 : 64);
}

// Calls f(kernel) with the kernel for K rows of a state, and 32 (wide) or 16 columns of V per warp.
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

// The number of stages of the ring: the deepest ring that does not cost a resident block. 0: not
// even one stage fits.
template <class Kernel>
int stages(const Limits& l) {
  const auto blocks = [&](int n) {
    const int bytes = Kernel::Shape::shared_bytes(n);
    return bytes > l.shared_block ? 0 : std::min(Kernel::kMinBlocks, l.shared_processor / (bytes + 1024));
  };
  if (!blocks(1)) return 0;
  if (!blocks(2)) return 1;
  return blocks(3) == blocks(2) ? 3 : 2;
}

// ---- the division of work -----------------------------------------------------------------------

// The slices of V. A block has one slice and up to 4 warps, or 2 (two_warps).
struct Slices {
  int columns, count;
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

// Blocks of a walk for each slice of V.
inline int64_t heads_of(const Problem& p, const Walk& w) {
  const int64_t slots = w.segment < 0 ? Segments{w.length}.slots(p) : p.B;
  return slots * (w.states_only ? p.Hs : p.H / heads_per_block(p));
}

inline Task task_of(const Problem& p, const Walk& w, const Slices& slices, int parts, int part, bool writes) {
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
          aligned(p.gate, bytes),
          aligned(w.factor, bytes)};
}

// ---- gradients ----------------------------------------------------------------------------------

// Walks for gradients, with the same kernel for all walks of a launch. gradients.cu and
// decay_gradients.cu compile one Aim each, as the kernels take minutes to compile.
template <Aim kAim>
struct GradientLauncher {
  const Problem& p;
  const int64_t K = std::max(p.K, p.V);
  const Limits& device = limits(p.device.id);

  bool is_wide(int concurrent) const {
    const int64_t heads = batch(p) * p.H * concurrent;
    return p.type != Type::f32 && may_be_wide(kAim, p.type == Type::bf16, K) && std::min(p.K, p.V) > 32 &&
           heads >= device.processors;
  }
  Slices slices(int64_t V, bool wide) const {
    return slice(V, wide, /*two_warps=*/kAim == Aim::decays && p.type == Type::f32 && K > 64, /*heads=*/1,
                 /*processors=*/1);
  }
  const char* refuses() const {
    if (K > kMostKeyDim) return "its gradients are of K and V up to 256";
    bool fits = false;
    with_kernel<kAim>(p, K, false, [&](auto kernel) { fits = stages<decltype(kernel)>(device) > 0; });
    return fits ? nullptr : "K or V is too large for the shared memory of this device";
  }

  void run(int concurrent, const GradientWalks& walks) const {
    const bool wide = is_wide(concurrent);
    with_kernel<kAim>(p, K, wide, [&](auto kernel) {
      using Kernel = decltype(kernel);
      const int depth = stages<Kernel>(device);
      for (auto next = walks.begin(); next != walks.end();) {
        typename Kernel::Params params{};
        params.stages = depth;
        unsigned blocks = 0;
        Slices most{};
        for (int i = 0; i < Kernel::kWalks && next != walks.end(); ++i, ++next) {
          const Slices own = slices(next->p.V, wide);
          const int parts = next->walk.states_only ? 1 : int(group(next->p));
          params.task[i] = task_of(next->p, next->walk, own, parts, 0, /*writes=*/true);
          blocks = std::max(blocks, params.task[i].blocks);
          most.columns = std::max(most.columns, own.columns);
        }
        start<Kernel>(p, dim3(Kernel::kWalks * blocks), threads(most, wide), Kernel::Shape::shared_bytes(depth),
                      params);
      }
    });
  }
};

}  // namespace lc::cuda
