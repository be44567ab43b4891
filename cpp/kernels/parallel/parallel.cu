// parallel.cu - GPU: launches the kernels of parallel.cuh.
//
//   outputs: one block for each (tile of 64 tokens, head, 128 columns). Then final states, which
//   may overwrite the initial states: one block for each (sequence, state, 64 ranks, 128 columns)
//   B H N (N+1)(K+V) flop; Katharopoulos et al. 2020, arXiv:2006.16236
#include "parallel.cuh"

#include "../../cuda/cost.h"
#include "../../cuda/launch.h"

namespace lc {
namespace {

using namespace cuda;

template <class Kernel>
void start_blocks(const Problem& p, int64_t blocks) {
  start<Kernel>(p, dim3(unsigned(blocks * Kernel::slices(p))), Kernel::kMaxThreads, Kernel::shared_bytes(), {p});
}

void run(const Problem& p) {
  with_type(p.type, [&](auto e) {
    using Outputs = Parallel<decltype(e), false>;
    using States = Parallel<decltype(e), true>;
    if (p.N) start_blocks<Outputs>(p, Outputs::token_tiles(p) * p.H);
    if (p.final_state) start_blocks<States>(p, p.B * p.Hs * States::tiles(p.K));
  });
}

Cost cost(const Problem& p) {
  using Kernel = Parallel<float, false>;
  const double n = mean_length(p), tiles = double(Kernel::tiles(int64_t(n))), slices = double(Kernel::slices(p));
  const double products = double(p.K) * slices + double(p.V);  // every slice of V computes the scores again
  const double states =
      2 * double(p.K * p.V) * ((p.initial_state ? double(p.H) : 0) + (p.final_state ? double(p.Hs) : 0));
  const double flop = double(p.B) * n * (double(p.H) * (n + 1) * products + states);
  const double rows = double(tokens(p)) * double(p.H) * std::max(0., (tiles - 1) / 2);
  const double again = rows * products * type_bytes(p.type);
  const Limits& l = limits(p.device.id);
  const double blocks = tiles * double(p.B * p.H) * slices, resident = p.type == Type::f64 ? 1 : Kernel::kMinBlocks;
  const double tile_flop = 2. * Kernel::kTile * Kernel::kTile * products / slices;
  const double rate = 0.5 * l.flop_per_us / l.processors / resident / (p.type == Type::f64 ? 2 : 1);
  return predict(p,
                 {flop, again, /*depth=*/1, /*launches=*/p.final_state ? 2. : 1., blocks, (tiles + 1) / 2,
                  /*step_us=*/1 + tile_flop / rate},
                 resident);
}

size_t workspace(const Problem&) { return 0; }

}  // namespace

extern const Method parallel_cuda = {
    {"parallel", "cuda", "every pair of tokens: masked scores times values, tile by tile",
     "Katharopoulos et al. 2020, arXiv:2006.16236"},
    {Feature::forward | kAllTypes | kAllDecays | kSequences},
    refuses_nothing,
    cost,
    workspace,
    run};

}  // namespace lc
