// segments.cuh - sequences cut into segments of so many tokens each, the last one shorter. Every segment has a slot: a
// number that tells where its state lies, and for which the lengths of packed sequences need not be known on the host.
#pragma once
#include "chunks.h"
#include "problem.cuh"

namespace lc::cuda {

struct Segments {
  int64_t length;
  // Of one sequence, where all are equally long; even an empty one has a segment.
  LC_INLINE int64_t each(const Problem& p) const { return p.N > length ? (p.N + length - 1) / length : 1; }
  // Of all sequences; where they are packed, an upper bound.
  LC_INLINE int64_t slots(const Problem& p) const { return p.cu_bits ? p.B + p.N / length : p.B * each(p); }

  SIMT_DEV int64_t count(const Sequence& s) const { return s.length > length ? (s.length + length - 1) / length : 1; }
  SIMT_DEV int64_t first_slot(const Problem& p, int64_t b) const {
    return p.cu_bits ? b + sequence_at(p, b).begin / length : b * each(p);
  }
  // The sequence of a slot.
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

// Tokens after which a constant decay leaves less than 2^-30 of a state, in whole chunks, where these are no more than
// a segment; else 0.
SIMT_DEV int64_t memory(const Problem& p, const Segments& cut, const Sequence& s, int64_t hs) {
  if (p.decay == Decay::per_token || !s.length) return 0;
  const double x = -log2_decay_at(p, s.row, hs, s.begin);
  return x * double(cut.length - kChunk) < 30 ? 0 : (int64_t(30 / x) / kChunk + 1) * kChunk;
}

}  // namespace lc::cuda
