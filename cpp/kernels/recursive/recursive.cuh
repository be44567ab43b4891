// recursive.cuh - GPU: the tree of states over the leaves, which are segments (cuda/segments.cuh).
//
//   S(node) = 2^(sum L over right half) S(left) + S(right)
//
//   states [slots, Hs, K, V]: first of leaves, then of the tree, a Fenwick tree: slot i - 1 has the
//   node of leaves (i - 2^l, i], where 2^l is the lowest bit of i. Leaf i reads left halves, which
//   are the bits of i, highest bit first; right halves are not stored. sums [slots, Hs]: log2 of
//   the decay from the sequence's start to the leaf, float64
//   blocks of 256 threads: a sequence and state; 1024 numbers of 8 nodes; 1024 numbers of a leaf
//   about B Hs N/leaf K V (2 + log2(N/leaf)) flop besides those of the leaves
//   LeetDecoding, arXiv:2501.02573; Fenwick trees: log-linear attention, arXiv:2506.04761
#pragma once
#include "../../cuda/segments.cuh"

namespace lc::cuda {

struct Tree {
  Problem p;
  Segments leaves;
  float *states, *before;
  double* sums;
  int64_t step;  // leaves of each of the 8 nodes that one block merges

  static constexpr int kFanout = 8, kThreads = 256, kOwn = 4;
  LC_INLINE int64_t blocks_per_state() const { return (p.K * p.V + kThreads * kOwn - 1) / (kThreads * kOwn); }
};

// Replaces the decay of each leaf by the sum of the decays before the leaf.
struct RecursiveSums {
  static constexpr const char* kName = "recursive sums";
  static constexpr int kMaxThreads = Tree::kThreads, kMinBlocks = 1, kSmem = kMaxThreads / 32 * int(sizeof(double));
  using Params = Tree;

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    Smem smem;
    const auto warps = smem.alloc<double>(kMaxThreads / 32);
    const int64_t b = bid().x / p.Hs, hs = bid().x % p.Hs, count = a.leaves.count(sequence_at(p, b));
    const int64_t first = a.leaves.first_slot(p, b);
    const gptr<double> sums{a.sums + first * p.Hs + hs};
    double before = 0;
    for (int64_t i0 = 0; i0 < count; i0 += kMaxThreads) {
      const int64_t i = i0 + tid();
      const bool own = i < count && a.leaves.owner(p, first + i) == b;  // false only if cu_seqlens decrease
      const double x = own && i + 1 < count ? sums.ld(i * p.Hs) : 0,
                   upto = cumulative(x);  // the last leaf has no stored decay
      if (lane() == 31) warps.st(warp(), upto);
      sync_cta();
      double here = before;
      for (int w = 0; w < nwarps(); ++w) {
        if (w < warp()) here += warps.ld(w);
        before += warps.ld(w);
      }
      if (own) sums.st(i * p.Hs, here + upto - x);
      sync_cta();
    }
  }
};

// Three levels of the tree: among 8 adjacent nodes, every second node takes in the node before it,
// and so on.
struct RecursiveMerge {
  static constexpr const char* kName = "recursive merge";
  static constexpr int kMaxThreads = Tree::kThreads, kMinBlocks = 2;
  using Params = Tree;

  static SIMT_DEV void run(const Params& a) {
    constexpr int n = Tree::kFanout;
    const Problem& p = a.p;
    const Segments groups{a.leaves.length * a.step * n};
    const int64_t blocks = a.blocks_per_state(), part = bid().x % blocks;
    const int64_t hs = bid().x / blocks % p.Hs, slot = bid().x / blocks / p.Hs;
    const int64_t b = groups.owner(p, slot), first = (slot - groups.first_slot(p, b)) * a.step * n;
    const int64_t seen =
        a.leaves.count(sequence_at(p, b)) - 1 - first;  // leaves from `first` on that later leaves read
    const int live = int(seen < 0 ? 0 : seen / a.step < n ? seen / a.step : n);
    const int64_t base = (a.leaves.first_slot(p, b) + first) * p.Hs + hs;
    const gptr<const double> sums{a.sums + base};
    const auto factor = [&](int from, int to) {  // decay over nodes [from, to)
      return ex2(float(sums.ld(to * a.step * p.Hs) - sums.ld(from * a.step * p.Hs)));
    };
    for (int j = 0; j < Tree::kOwn; ++j) {
      const int64_t i = (part * Tree::kOwn + j) * kMaxThreads + tid();
      if (i >= p.K * p.V) continue;
      const gptr<float> states{a.states + base * p.K * p.V + i};
      const auto at = [&](int node) { return ((node + 1) * a.step - 1) * p.Hs * p.K * p.V; };
      float x[n];
      SIMT_UNROLL
      for (int m = 0; m < n; ++m) x[m] = m < live ? states.ld(at(m)) : 0.f;
      SIMT_UNROLL
      for (int half = 1; half < n; half *= 2) SIMT_UNROLL
      for (int m = 2 * half - 1; m < n; m += 2 * half)
        if (m < live) x[m] = mul_add(factor(m + 1 - half, m + 1), x[m - half], x[m]);
      SIMT_UNROLL
      for (int m = 1; m < n; m += 2)
        if (m < live) states.st(at(m), x[m]);
    }
  }
};

// The state before each leaf: the sum of the left halves that it reads, the largest and oldest half
// first.
struct RecursiveRead {
  static constexpr const char* kName = "recursive read";
  static constexpr int kMaxThreads = Tree::kThreads, kMinBlocks = 2;
  using Params = Tree;

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    const int64_t blocks = a.blocks_per_state(), part = bid().x % blocks;
    const int64_t hs = bid().x / blocks % p.Hs, slot = bid().x / blocks / p.Hs;
    const int64_t b = a.leaves.owner(p, slot), first = a.leaves.first_slot(p, b), leaf = slot - first;
    const int64_t size = p.K * p.V, i0 = part * Tree::kOwn * kMaxThreads + tid();
    if (leaf >= a.leaves.count(sequence_at(p, b)) || !(leaf || p.initial_state)) return;
    const gptr<const double> sums{a.sums + first * p.Hs + hs};
    const gptr<float> before{a.before + (slot * p.Hs + hs) * size};

    float x[Tree::kOwn];
    SIMT_UNROLL
    for (int j = 0; j < Tree::kOwn; ++j) {
      const int64_t i = i0 + j * kMaxThreads;
      x[j] = p.initial_state && i < size
                 ? row<const float>(p.initial_state, b, hs, i / p.V).ld(i % p.V * p.initial_state.stride[3])
                 : 0.f;
    }
    int64_t seen = 0, bit = 1;
    while (2 * bit <= leaf) bit *= 2;
    for (; bit && leaf; bit /= 2) {
      if (!(leaf & bit)) continue;
      const float factor = ex2(float(sums.ld((seen + bit) * p.Hs) - sums.ld(seen * p.Hs)));
      seen += bit;
      const gptr<const float> node{a.states + ((first + seen - 1) * p.Hs + hs) * size};
      SIMT_UNROLL
      for (int j = 0; j < Tree::kOwn; ++j)
        if (i0 + j * kMaxThreads < size) x[j] = mul_add(factor, x[j], node.ld(i0 + j * kMaxThreads));
    }
    SIMT_UNROLL
    for (int j = 0; j < Tree::kOwn; ++j)
      if (i0 + j * kMaxThreads < size) before.st(i0 + j * kMaxThreads, x[j]);
  }
};

}  // namespace lc::cuda
