// block.cuh - one block of a walk: its task, its shared memory, and what follows from them.
#pragma once
#include "shape.cuh"

namespace lc::cuda {

template <class Shape>
struct WalkBlock {
  using E = typename Shape::E;
  using At = typename Shape::At;
  using Score = typename Shape::Score;
  static constexpr int C = Shape::C, K = Shape::K, V = Shape::V, kColumns = Shape::kColumns;
  static constexpr bool kGradient = Shape::kGradient;

  const Task& task;
  const int stages;             // chunks that the ring holds, 1 to 3
  const Shared<Score, C, C> A;  // masked and weighted scores of the chunk
  const sptr<float> weights;    // two ChunkDecays: of this chunk and of the next
  const sptr<float> sums;       // [warp, C]: sums of products, only for Aim::decays
  const sptr<At> memory_of_place;
  const sptr<E> ring;  // [stages]: q, k, v and the factor of a chunk

  SIMT_DEV WalkBlock(const Task& t, int n, Smem smem = {})
      : task(t),
        stages(n),
        A{smem.alloc<Score>(C * C, 128)},
        weights(smem.alloc<float>(2 * ChunkDecay::kNumbers)),
        sums(smem.alloc<float>(Shape::kSums)),
        memory_of_place(smem.alloc<At>(1)),
        ring(smem.alloc<E>(n * Shape::kStage, 128)) {
    if (!tid()) memory_of_place.st(0, At(t.p, t.walk, number() / unsigned(t.slices), t.parts, t.part, t.writes));
    sync_cta();
  }

  // The number of the block among those of its task.
  static SIMT_DEV unsigned number() { return unsigned(bid().x) / Shape::kWalks; }
  SIMT_DEV At place() const { return memory_of_place.ld(0); }
  SIMT_DEV bool backward() const { return kGradient && task.walk.backward; }
  SIMT_DEV float output_scale() const { return backward() ? 1 : float(task.p.scale); }
  SIMT_DEV float key_scale() const { return backward() ? float(task.p.scale) : 1; }

  SIMT_DEV float sum_scale(const ChunkDecay& decay) const {
    return Shape::kUnits ? key_scale() * decay.unit() : key_scale();
  }

  // ---- chunk i ----------------------------------------------------------------------------------

  SIMT_DEV bool exists(int i) const { return i < place().chunks; }
  SIMT_DEV int tokens(const At& at, int i) const {
    if (backward()) return i >= at.chunks ? 0 : i ? C : at.tail;
    return i + 1 < at.chunks ? C : i < at.chunks ? at.tail : 0;
  }
  // Its first token, relative to the first one of the walk.
  SIMT_DEV int64_t first_token(const At& at, int i) const {
    return fresh(int64_t(i) * C - (backward() && i ? C - at.tail : 0));
  }
  static SIMT_DEV bool skips_first_decay(const At& at, int i) {
    if constexpr (kGradient) return at.skip_first_decay && !i;
    return false;
  }

  // The stage of the ring that holds it, and the tiles of a stage. o takes the memory of q.
  SIMT_DEV sptr<E> stage(int i) const {
    return ring.sub(Shape::kOneStage ? 0 : i % stages * Shape::kStage, Shape::kStage);
  }
  struct Tiles {
    Shared<E, C, K> q, k;
    Shared<E, C, V> v, o, factor;
  };
  static SIMT_DEV Tiles tiles(sptr<E> stage) {
    return {{stage.sub(0, C * K)},
            {stage.sub(Shape::kKeys, C * K)},
            {stage.sub(Shape::kValues, C * V)},
            {stage.sub(0, C * V)},
            {stage.sub(Shape::kDecays ? Shape::kFactor : 0, C * V)}};
  }

  // The log-decays or lengths of two of its tokens per lane.
  SIMT_DEV float2 log_decays(int i) const {
    const At at = place();
    const Problem& p = task.p;
    return p.log_decay ? load_two(at, i, at.log_decay, p.log_decay, skips_first_decay(at, i)) : float2{0, 0};
  }
  SIMT_DEV float2 lengths(int i) const {
    const At at = place();
    const Problem& p = task.p;
    return p.dt ? load_two(at, i, at.length, p.dt, false) : float2{0, 0};
  }
  SIMT_DEV ChunkDecay decay(int i) const {
    return ChunkDecay(weights.sub((i & 1) * ChunkDecay::kNumbers, ChunkDecay::kNumbers), which_lengths(),
                      Shape::kUnits);
  }
  SIMT_DEV Lengths which_lengths() const {
    if (!task.p.dt) return Lengths::none;
    return backward() ? Lengths::of_outputs : Lengths::of_inputs;
  }

  // ---- columns of V -----------------------------------------------------------------------------

  SIMT_DEV int slice() const { return int(number() % unsigned(task.slices)); }
  // The first column of the block, and the first one of this warp relative to it.
  SIMT_DEV int block_column() const { return slice() * task.columns; }
  static SIMT_DEV int warp_column() { return fresh(tid()) / 32 * kColumns; }
  // A task may have fewer columns per block than the launch has warps for.
  SIMT_DEV int columns_of_block() const {
    const int rest = int(task.p.V) - block_column();
    return kGradient && rest > task.columns ? task.columns : rest;
  }
  SIMT_DEV int columns_left() const { return columns_of_block() - warp_column(); }

  // ---- division of work among warps -------------------------------------------------------------

  // Every second block assigns the strips of A to its warps in reverse order, such that the warps
  // of two blocks on one processor have equal work. The warp with the shortest strip computes the
  // weights of the next chunk.
  static SIMT_DEV int flip() { return bid().x & 1 ? C / 16 - 1 : 0; }
  static SIMT_DEV bool makes_weights() { return fresh(tid()) / 32 == (flip() ? nwarps() - 1 : 0); }

  // ---- states in memory -------------------------------------------------------------------------

  SIMT_DEV Steps before_steps() const {
    const Walk& w = task.walk;
    return w.before ? dense_steps(task.p, w) : steps(task.p.initial_state, w.transposed);
  }
  SIMT_DEV Steps after_steps() const {
    const Walk& w = task.walk;
    return place().after_is_final ? steps(task.p.final_state, w.transposed) : dense_steps(task.p, w);
  }
  SIMT_DEV void load_state(Strip<kColumns, K>& S, gptr<const float> from, const Steps& step) const {
    const auto own = from.sub((block_column() + warp_column()) * step.column);
    const int columns = columns_left(), rows = int(task.p.K);
    map(S, [&](int c, int r, float) { return c < columns && r < rows ? own.ld(r * step.row + c * step.column) : 0.f; });
  }
  SIMT_DEV void store_state(gptr<float> to, const Steps& step, const Strip<kColumns, K>& S, float weight) const {
    const auto own = to.sub((block_column() + warp_column()) * step.column);
    const int columns = columns_left(), rows = int(task.p.K);
    each(S, [&](int c, int r, float x) {
      if (c < columns && r < rows) own.st(r * step.row + c * step.column, kGradient ? x * weight : x);
    });
  }

 private:
  SIMT_DEV float2 load_two(const At& at, int i, gptr<const float> from, const View& w, bool skip_first) const {
    return load_pair(from, w.stride[2], first_token(at, i), tokens(at, i), Shape::kAhead ? lane() : fresh(lane()),
                     skip_first);
  }
};

}  // namespace lc::cuda
