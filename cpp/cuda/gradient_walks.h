// gradient_walks.h - launches walks for gradients: gradient_walks.cu, decay_walks.cu.
#pragma once
#include "walks.h"

namespace lc::cuda {

template <Aim kAim>
struct GradientLauncher {
  const Problem& p;
  const int64_t K = std::max(p.K, p.V);  // of all walks of a launch there is one kernel
  const Limits& device = limits(p.device.id);

  bool is_wide(int passes) const {
    const int64_t heads = batch(p) * p.H * passes;
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

  void run(int passes, const GradientWalks& walks) const {
    const bool wide = is_wide(passes);
    with_kernel<kAim>(p, K, wide, [&](auto kernel) {
      using Kernel = decltype(kernel);
      const int depth = stages<Kernel>(device);
      for (auto next = walks.begin(); next != walks.end();) {
        typename Kernel::Params params{};
        params.stages = depth;
        unsigned blocks = 0;
        Slices most{};
        for (int i = 0; i < Kernel::kPasses && next != walks.end(); ++i, ++next) {
          const Slices own = slices(next->p.V, wide);
          const int parts = next->walk.alone ? 1 : int(group(next->p));
          params.pass[i] = pass_of(next->p, next->walk, own, parts, 0, /*writes=*/true);
          blocks = std::max(blocks, params.pass[i].blocks), most.columns = std::max(most.columns, own.columns);
        }
        start<Kernel>(p, dim3(Kernel::kPasses * blocks), threads(most, wide), Kernel::shared_bytes(depth), params);
      }
    });
  }
};

}  // namespace lc::cuda
