// scan.cu - GPU: segments of a sequence in parallel, for few heads and long N. Three launches:
//
//   1. each segment i but the last, from zero: S_i+1 <- total S_i+1 + (diag(out) K)^T V
//   2. a scan over the segments:               S_i+1 <- 2^(sum L over segment i) S_i + S_i+1
//   3. each segment from the state before it:  O = scale (diag(in) Q S + A V), S as in 1
//
//   1, 3: cuda/walk/walk.cuh; 2: cuda/scan_states.cuh. A head whose constant decay leaves less than
//   2^-30 of a state after W tokens, within a segment, skips 1 and 2; in 3 its segments start from
//   zero, W tokens earlier. B H N ((C+1)(K+V) + 6KV) flop; workspace: K V numbers per segment
//   Mamba-2 (state passing), arXiv:2405.21060; scans: Martin and Cundy 2018, arXiv:1709.04057
#include "../../cuda/cost.h"
#include "../../cuda/lengths.h"
#include "../../cuda/scan_states.cuh"
#include "../../cuda/walk/walk.h"

namespace lc {
namespace {

using namespace cuda;

Segments segments(const Problem& p) { return {segment_chunks(p, batch(p) * p.H * ((p.V + 63) / 64)) * kChunk}; }

struct Workspace {
  float* states;
  double* log2;
  size_t bytes;
  explicit Workspace(const Problem& p) {
    const Segments cut = segments(p);
    const size_t pairs = cut.length < p.N ? size_t(cut.slots(p) * p.Hs) : 0;
    log2 = static_cast<double*>(p.workspace);
    states = reinterpret_cast<float*>(log2 + pairs);
    bytes = pairs * (sizeof(double) + size_t(p.K * p.V) * sizeof(float));
  }
};

void run(const Problem& given) {
  const Problem p = with_lengths(given);
  const Segments cut = segments(p);
  Walk w;
  w.length = cut.length;
  if (cut.length >= p.N) return walk(p, w);
  const Workspace space(p);
  w.warm_up = true;
  Walk first = w;
  first.states_only = true;
  first.after = space.states;
  first.log2 = space.log2;
  walk(p, first);
  scan_states(p, first);
  w.before = space.states;
  walk(p, w);
}

Cost cost(const Problem& p) {
  const Segments cut = segments(p);
  Walk w;
  w.length = cut.length;
  const bool one = cut.length >= p.N;
  const double chunks = double(std::min(cut.length, p.N)) / kChunk, n = double(tokens(p));
  const double again = one ? 0 : n * type_bytes(p.type) * double(p.Hk * p.K + p.Hv * p.V);
  const double states = one ? 0 : 4 * double(cut.slots(p) * p.Hs) * state_bytes(p);
  const double flop = chunk_flop(p) + (one ? 0 : 2 * n * double(p.Hs) * double(p.K * p.V));
  return predict(
      p, {flop, states + again, /*depth=*/2 * chunks + mean_length(p) / double(cut.length),
          /*launches=*/one ? 1. : 3., double(walk_blocks(p, w)), /*steps=*/(one ? 1 : 1.6) * chunks, chunk_step_us(p)});
}

size_t workspace(const Problem& p) { return lengths_bytes(p) + Workspace(p).bytes; }

}  // namespace

extern const Method scan_cuda = {
    {"scan", "cuda", "segments in parallel, a scan over their states, then the outputs", "Mamba-2, arXiv:2405.21060"},
    {Feature::forward | kMatrixUnitTypes | kAllDecays | kSequences | kMamba2},
    walk_refuses,
    cost,
    workspace,
    run};

}  // namespace lc
