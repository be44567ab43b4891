// segments.cuh - sequences cut into segments of `length` tokens; the last segment of a sequence may
// be shorter. Every segment has a slot: the number of its state in memory. Slots can be computed
// without the lengths of packed sequences, which the host does not know.
#pragma once
#include "problem.cuh"
#include "walk/walk.h"

namespace lc::cuda {

struct Segments {
  int64_t length;
  // Segments of one sequence if all sequences have N tokens. Even an empty sequence has a segment.
  LC_INLINE int64_t each(const Problem& p) const { return p.N > length ? (p.N + length - 1) / length : 1; }
  // Segments of all sequences. For packed sequences this is an upper bound.
  LC_INLINE int64_t slots(const Problem& p) const { return p.cu_bits ? p.B + p.N / length : p.B * each(p); }

  SIMT_DEV int64_t count(const Sequence& s) const { return s.length > length ? (s.length + length - 1) / length : 1; }
  SIMT_DEV int64_t first_slot(const Problem& p, int64_t b) const {
    return p.cu_bits ? b + sequence_at(p, b).begin / length : b * each(p);
  }
  // The sequence that a slot belongs to.
  SIMT_DEV int64_t owner(const Problem& p, int64_t slot) const {
    if (!p.cu_bits) return slot / each(p);
    int64_t low = 0, high = p.B;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_slot(p, middle) <= slot ? low : high) = middle;
    }
    return low;
  }
};

// The number of tokens, in whole chunks, after which a constant decay leaves less than 2^-30 of a
// state. 0 if this is more than a segment, or if every token has its own decay.
SIMT_DEV int64_t horizon(const Problem& p, const Segments& cut, const Sequence& s, int64_t hs) {
  if (p.decay == Decay::per_token || !s.length) return 0;
  const double x = -log2_decay_at(p, s.row, hs, s.begin);
  return x * double(cut.length - kChunk) < 30 ? 0 : (int64_t(30 / x) / kChunk + 1) * kChunk;
}

}  // namespace lc::cuda
