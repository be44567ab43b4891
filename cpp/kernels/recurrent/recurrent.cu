// recurrent.cu - GPU: launches recurrent.cuh, whose head says what it computes.
//
//   grid: (sequence, state, part of its q heads, 32 columns), one block each; B N H 14 K V flop
//   Katharopoulos et al. 2020, arXiv:2006.16236
#include "recurrent.cuh"

#include "../../cuda/cost.h"
#include "../../cuda/launch.h"

namespace lc {
namespace {

using namespace cuda;

constexpr int64_t kMostKeyDim = 256;

int64_t pieces(const Problem& p) { return (p.V + 31) / 32; }

double flop(const Problem& p) { return 14. * double(tokens(p)) * double(p.H) * double(p.K * p.V); }

void run(const Problem& p) {
  const int heads = heads_per_block(p);
  with_type(p.type, [&](auto e) {
    using Kernel = RecurrentForward<decltype(e)>;
    const int64_t blocks = p.B * p.Hs * (group(p) / heads) * pieces(p);
    start<Kernel>(p, dim3(unsigned(blocks)), Kernel::kMaxThreads, Kernel::shared_bytes(p), {p, heads});
  });
}

const char* refuses(const Problem& p) {
  if (p.op == LC_DECODE) return "does not decode on a GPU";
  if (p.op == LC_BACKWARD) return "has no gradients on a GPU";
  if (p.K > kMostKeyDim) return "K is over 256";
  return nullptr;
}

Cost cost(const Problem& p) {
  const double tiles = mean_length(p) / 32, blocks = double(p.B * p.H * pieces(p));
  return predict(p, {flop(p), /*extra_bytes=*/0, /*depth=*/mean_length(p), /*launches=*/1, blocks, tiles,
                     /*step_us=*/0.05 * double(p.K)});
}

size_t workspace(const Problem&) { return 0; }

}  // namespace

extern const Method recurrent_cuda = {
    {"recurrent", "cuda", "32 tokens at a time, each number of the state by a scan over a warp",
     "Katharopoulos et al. 2020, arXiv:2006.16236"},
    refuses,
    cost,
    workspace,
    run};

}  // namespace lc
