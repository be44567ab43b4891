// fleet.cu - GPU: launches the kernel of fleet.cuh.
//
//   one block for each (sequence, state, part of its q heads, slice of V); B N H 5 K V flop
//   Wang et al. 2025 (LeetDecoding), arXiv:2501.02573
#include "fleet.cuh"

#include "../../cuda/cost.h"
#include "../../cuda/launch.h"

namespace lc {
namespace {

using namespace cuda;

constexpr int64_t kMostKeyDim = 256;
constexpr int kTileTokens = 16;

int64_t blocks(const Problem& p, int columns) { return p.B * p.H * ((p.V + columns - 1) / columns); }

// Columns of a lane. With two columns each number of q and k is used twice per read; with one there
// are more blocks.
int lane_columns(const Problem& p) {
  return p.type != Type::f64 && blocks(p, 64) >= limits(p.device.id).processors ? 2 : 1;
}

template <class E, int C>
void run(const Problem& p) {
  using Kernel = FleetForward<E, C>;
  int tile = kTileTokens;
  while (Kernel::shared_bytes(p, tile) > limits(p.device.id).shared_block) tile /= 2;
  const auto launch_heads = [&](int first, int last) {
    const int64_t grid = blocks(p, Kernel::kColumns) / group(p) * (last - first);
    start<Kernel>(p, dim3(unsigned(grid)), 32 * Kernel::warps(p), Kernel::shared_bytes(p, tile),
                  {p, first, last - first, tile});
  };
  // If the state is updated in place, the head that writes it runs after all other heads have read
  // it.
  const int G = int(group(p));
  const bool in_place = heads_per_block(p) > 1;
  if (in_place) launch_heads(1, G);
  launch_heads(0, in_place ? 1 : G);
}

void run(const Problem& p) {
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    if constexpr (!std::is_same_v<E, double>)
      if (lane_columns(p) == 2) return run<E, 2>(p);
    run<E, 1>(p);
  });
}

const char* refuses(const Problem& p) { return p.K > kMostKeyDim ? "K is over 256" : nullptr; }

Cost cost(const Problem& p) {
  const int C = lane_columns(p);
  const double n = double(blocks(p, 32 * C)), flop = 5. * double(tokens(p)) * double(p.H) * double(p.K * p.V);
  // Estimated: the FMAs of 16 ranks per warp, with one block per processor.
  const double token_us = std::max(0.05, 0.01 * C * double(p.K) / 16);
  return predict(
      p, {flop, /*extra_bytes=*/0, /*depth=*/mean_length(p), /*launches=*/1, n, /*steps=*/mean_length(p), token_us},
      /*resident=*/1);
}

size_t workspace(const Problem&) { return 0; }

}  // namespace

extern const Method fleet_cuda = {{"fleet", "cuda", "rank by rank: decayed cumulative sums, a warp for 16 ranks",
                                   "Wang et al. 2025 (LeetDecoding), arXiv:2501.02573"},
                                  {Feature::forward | kAllTypes | kAllDecays | kSequences},
                                  refuses,
                                  cost,
                                  workspace,
                                  run};

}  // namespace lc
