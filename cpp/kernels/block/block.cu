// block.cu - GPU: one launch for every 256 tokens of all heads, with the states in memory between.
//
//   O = scale (diag(in) Q S + A V),  A_ij = [j <= i] mask_ij q_i.k_j      for each chunk of a block
//   S = total S + (diag(out) K)^T V                weights in, mask, out, total: cuda/decay.cuh
//
//   kernel: cuda/walk/walk.cuh. Two sets of states [B, Hs, K, V] in the workspace are read and
//   written in turn, since the q heads of a state are different blocks. Packed sequences take as
//   many launches as the longest sequence may need
//   B H N ((C+1)(K+V) + 4KV) flop, as chunk; reads and writes every state once per launch
//   LeetDecoding (block-based), arXiv:2501.02573; TransNormerLLM, arXiv:2307.14995
#include <utility>

#include "../../cuda/cost.h"
#include "../../cuda/lengths.h"
#include "../../cuda/walk/walk.h"

namespace lc {
namespace {

using namespace cuda;

constexpr int64_t kTokens = 4 * kChunk;

int64_t blocks(const Problem& p) { return std::max<int64_t>(1, (p.N + kTokens - 1) / kTokens); }

int64_t numbers(const Problem& p) { return p.B * p.Hs * p.K * p.V; }

void run(const Problem& given) {
  const Problem p = with_lengths(given);
  Walk w;
  w.length = kTokens;
  float* before = static_cast<float*>(p.workspace);
  float* after = before + numbers(p);
  for (w.segment = 0; w.segment < blocks(p); ++w.segment) {
    w.before = w.segment ? before : nullptr;
    w.after = after;
    walk(p, w);
    std::swap(before, after);
  }
}

Cost cost(const Problem& p) {
  Walk w;
  w.length = kTokens;
  w.segment = 0;
  const double count = double(blocks(p)), chunks = mean_length(p) / kChunk;
  return predict(p, {chunk_flop(p), 2 * (count - 1) * double(p.B * p.Hs) * state_bytes(p), /*depth=*/chunks,
                     /*launches=*/count, double(walk_blocks(p, w)), /*steps=*/chunks, chunk_step_us(p)});
}

size_t workspace(const Problem& p) {
  return lengths_bytes(p) + (blocks(p) > 1 ? size_t(2 * numbers(p)) * sizeof(float) : 0);
}

}  // namespace

extern const Method block_cuda = {
    {"block", "cuda", "blocks of 256 tokens, all heads in each; states in memory", "LeetDecoding, arXiv:2501.02573"},
    {Feature::forward | kMatrixUnitTypes | kAllDecays | kSequences | kMamba2},
    walk_refuses,
    cost,
    workspace,
    run};

}  // namespace lc
