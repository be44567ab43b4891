// chunk.cu - GPU: walks every sequence in chunks of C = 64 tokens and keeps the state in registers.
//
//   O = scale (diag(in) Q S + A V),   A_ij = [j <= i] mask_ij q_i.k_j
//   S = total S + (diag(out) K)^T V                    weights in, mask, out, total: cuda/decay.cuh
//
//   kernel: cuda/walk/walk.cuh, one launch; cuda/lengths.cuh before it if tokens have lengths
//   grid: (sequence, head, slice of V of up to 128 columns)
//   B H N ((C+1)(K+V) + 4KV) flop; no workspace; reads the operands once, q and k once per slice
//   Lightning Attention-2, arXiv:2401.04658; GLA, arXiv:2312.06635
#include "../../cuda/cost.h"
#include "../../cuda/lengths.h"
#include "../../cuda/walk/walk.h"
#include "chunk_backward.h"

namespace lc {
namespace {

using namespace cuda;

// Every sequence is one segment.
Walk whole(const Problem& p) { return {(p.N / kChunk + 1) * kChunk}; }

const char* refuses(const Problem& p) { return p.op == LC_BACKWARD ? backward::refuses(p) : walk_refuses(p); }

void run(const Problem& p) {
  if (p.op == LC_BACKWARD) return backward::run(p);
  walk(with_lengths(p), whole(p));
}

Cost cost(const Problem& p) {
  if (p.op == LC_BACKWARD) return backward::cost(p);
  const double chunks = mean_length(p) / kChunk;
  return predict(p, {chunk_flop(p), /*extra_bytes=*/0, /*depth=*/chunks, /*launches=*/1,
                     double(walk_blocks(p, whole(p))), /*steps=*/chunks, chunk_step_us(p)});
}

size_t workspace(const Problem& p) { return lengths_bytes(p) + (p.op == LC_BACKWARD ? backward::workspace(p) : 0); }

}  // namespace

extern const Method chunk_cuda = {
    {"chunk", "cuda", "chunks of 64 tokens: matrix products inside, one state in registers between",
     "Lightning Attention-2, arXiv:2401.04658"},
    {Feature::forward | Feature::backward | Feature::decay_gradients | kMatrixUnitTypes | kAllDecays | kSequences |
         kMamba2,
     {Feature::float64, "does not compute in float64 on a GPU; on the CPU it does"}},
    refuses,
    cost,
    workspace,
    run,
    "lightning"};

}  // namespace lc
