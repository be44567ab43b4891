// recursive.cu - GPU: divide and conquer, down to leaves of 64 to 256 tokens. The right half of a
// sequence reads the state of its left half.
//
//   launches: the state of every leaf; log2 sums of decays; the tree, three levels per launch; the
//   state before every leaf; the outputs of every leaf, from the state before it
//   leaves: cuda/walk/walk.cuh; the tree: recursive.cuh; workspace: two states per leaf
//   about B N (H ((C+1)(K+V) + 4KV) + Hs KV (2 + (2 + log2(N/leaf)) / leaf)) flop
//   LeetDecoding, arXiv:2501.02573; Fenwick trees: log-linear attention, arXiv:2506.04761
#include "recursive.cuh"

#include "../../cuda/cost.h"
#include "../../cuda/launch.h"
#include "../../cuda/lengths.h"
#include "../../cuda/walk/walk.h"

namespace lc {
namespace {

using namespace cuda;

constexpr int64_t kLongest = 256;

// Long leaves write fewer states to memory; short leaves give more blocks.
Segments leaves(const Problem& p) {
  int64_t length = kLongest;
  while (length > kChunk && walk_blocks(p, {length}) < 2 * limits(p.device.id).processors) length /= 2;
  return {length};
}

bool one_leaf(const Problem& p, const Segments& cut) { return p.N <= cut.length; }

int64_t merges(const Problem& p, const Segments& cut) {
  int64_t n = 0;
  for (int64_t step = 1; 2 * step * cut.length < p.N; step *= Tree::kFanout) ++n;
  return n;
}

size_t state_bytes(const Problem& p, const Segments& cut) {
  return (size_t(cut.slots(p) * p.Hs * p.K * p.V) * sizeof(float) + 63) / 64 * 64;
}

size_t workspace(const Problem& p) {
  const Segments cut = leaves(p);
  if (one_leaf(p, cut)) return lengths_bytes(p);
  return lengths_bytes(p) + 2 * state_bytes(p, cut) + size_t(cut.slots(p) * p.Hs) * sizeof(double);
}

void run(const Problem& given) {
  const Problem p = with_lengths(given);
  const Segments cut = leaves(p);
  if (one_leaf(p, cut)) return walk(p, {cut.length});

  auto* memory = static_cast<unsigned char*>(p.workspace);
  Tree tree = {p,
               cut,
               reinterpret_cast<float*>(memory),
               reinterpret_cast<float*>(memory + state_bytes(p, cut)),
               reinterpret_cast<double*>(memory + 2 * state_bytes(p, cut)),
               1};
  const auto grid = [](int64_t blocks) { return dim3(unsigned(blocks)); };
  Walk up = {cut.length};
  up.states_only = true;
  up.after = tree.states;
  up.log2 = tree.sums;
  walk(p, up);
  start<RecursiveSums>(p, grid(p.B * p.Hs), Tree::kThreads, RecursiveSums::kSmem, tree);
  for (int64_t n = merges(p, cut); n > 0; --n, tree.step *= Tree::kFanout) {
    const int64_t groups = Segments{cut.length * tree.step * Tree::kFanout}.slots(p);
    start<RecursiveMerge>(p, grid(groups * p.Hs * tree.blocks_per_state()), Tree::kThreads, 0, tree);
  }
  start<RecursiveRead>(p, grid(cut.slots(p) * p.Hs * tree.blocks_per_state()), Tree::kThreads, 0, tree);
  Walk outputs = {cut.length};
  outputs.before = tree.before;
  walk(p, outputs);
}

Cost cost(const Problem& p) {
  const Segments cut = leaves(p);
  const double chunks = double(cut.length) / kChunk, count = std::max(1., mean_length(p) / double(cut.length));
  const double blocks = double(walk_blocks(p, {cut.length}));
  if (one_leaf(p, cut))
    return predict(p, {chunk_flop(p), 0, /*depth=*/chunks, /*launches=*/1, blocks, chunks, chunk_step_us(p)});
  const double numbers = double(cut.slots(p) * p.Hs) * double(p.K * p.V), levels = std::log2(count);
  const double again = double(tokens(p)) * type_bytes(p.type) * double(p.Hk * p.K + p.Hv * p.V);
  const double flop = chunk_flop(p) + 2 * double(tokens(p)) * double(p.Hs) * double(p.K * p.V) + numbers * (2 + levels);
  return predict(p, {flop, again + 4 * numbers * (4.5 + levels / 2), /*depth=*/2 * chunks + 2 * levels,
                     /*launches=*/4. + double(merges(p, cut)), blocks, /*steps=*/1.6 * chunks, chunk_step_us(p)});
}

}  // namespace

extern const Method recursive_cuda = {
    {"recursive", "cuda", "divide and conquer: leaves see the states of the left halves before them",
     "LeetDecoding, arXiv:2501.02573"},
    {Feature::forward | kMatrixUnitTypes | kAllDecays | kSequences | kMamba2},
    walk_refuses,
    cost,
    workspace,
    run};

}  // namespace lc
