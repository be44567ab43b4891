// walk.cuh - GPU: the kernel of a walk. One block takes one segment of one head and 16 or 32
// columns of V per warp, in chunks of C = 64 tokens. Everything is transposed such that the state
// stays in float32 registers as a Strip:
//
//   A    = [j <= i] mask_ij q_i.k_j                   [C, C]   in shared memory
//   O^T  = scale (S^T Q^T diag(in) + V^T A^T)         [V, C]   in registers; then skip and gate
//   S^T  = total S^T + (rest S^T + V^T diag(out) K)   [V, K]   in registers; weights: decay.cuh
//
// The sum of a chunk starts from zero and is added to S outside of the matrix unit, which
// truncates. Computed operands (A, S) are rounded to X: bf16 for bf16; tf32 for f16, as they may
// exceed its range, and for float on request; else float, which takes three products of tf32.
#pragma once
#include "products.cuh"

namespace lc::cuda {

// The parameters are explained in shape.cuh.
template <class E, class X, int K, int kColumns, Aim kAim>
struct ChunkWalk {
  using Shape = WalkShape<E, X, K, kColumns, kAim>;
  using Block = WalkBlock<Shape>;
  using Extras = Products<Shape>;
  using Tiles = typename Block::Tiles;
  using State = Strip<kColumns, K>;
  static constexpr bool kGradient = Shape::kGradient;
  static constexpr const char* kName = kGradient ? "chunks of gradients" : "chunks forward";
  static constexpr int C = Shape::C, V = Shape::V;
  static constexpr int kMaxThreads = 32 * Shape::kWarps, kMinBlocks = Shape::kMinBlocks, kWalks = Shape::kWalks;

  struct Params {
    Task task[kWalks];
    int stages;  // chunks that the ring holds, 1 to 3
  };

  static SIMT_DEV void run(const Params& params) {
    const Task& task = params.task[kWalks > 1 ? unsigned(bid().x) % kWalks : 0];
    if (kGradient && Block::number() >= task.blocks) return;
    const Block block(task, params.stages);
    walk(block);
  }

 private:
  // ---- the loop ---------------------------------------------------------------------------------

  static SIMT_DEV void walk(const Block& b) {
    for (int i = 0; i + 1 < b.stages; ++i) fetch(b, i);
    TwoTokens ahead = first_weights(b);
    State S;
    load_initial(b, S);

    Extras::checkpoint(b, 0, S);
    for (int i = 0; b.exists(i); ++i) {
      arrive(b, i);
      if (Block::makes_weights() && b.exists(i + 1)) ahead = next_weights(b, i, ahead);
      const auto stage = b.stage(i);
      const Tiles chunk = Block::tiles(stage);
      const ChunkDecay decay = b.decay(i);
      if (i >= b.place().first_output) write_outputs(b, i, stage, chunk, decay, S);
      if (b.exists(i + 1) || b.place().after.p || b.backward()) advance(b, chunk, decay, S);
      Extras::checkpoint(b, i + 1, S);
    }
    cp_wait<0>();
    store_final(b, S);
  }

  // ---- copies -----------------------------------------------------------------------------------

  // Starts to copy chunk i to its stage of the ring.
  static SIMT_DEV void fetch(const Block& b, int i) {
    const Problem& p = b.task.p;
    const auto at = b.place();
    if (i < at.chunks) {
      const int n = b.tokens(at, i), c0 = b.block_column(), columns = b.columns_of_block();
      const int64_t t = b.first_token(at, i);
      const auto stage = b.stage(i);
      const Tiles chunk = Block::tiles(stage);
      if (i >= at.first_output)
        load_async(chunk.q, at.q.sub(t * p.q.stride[2]), p.q.stride[2], n, int(p.K), b.task.q_aligned);
      load_async(chunk.k, at.k.sub(t * p.k.stride[2]), p.k.stride[2], n, int(p.K), b.task.k_aligned);
      load_async(chunk.v, at.v.sub(t * p.v.stride[2] + c0), p.v.stride[2], n, columns, b.task.v_aligned,
                 kGradient ? V : b.task.columns);
      if (i >= at.first_output) Extras::fetch(b, at, t, n, stage);
    }
    cp_commit();
  }

  // Waits until chunk i is in shared memory and all warps are done with chunk i - 1, and fetches a
  // later chunk.
  static SIMT_DEV void arrive(const Block& b, int i) {
    if (b.stages == 1) {
      sync_cta();
      fetch(b, i);
    }
    if (b.stages == 3)
      cp_wait<1>();
    else
      cp_wait<0>();
    sync_cta();
    if (b.stages > 1) fetch(b, i + b.stages - 1);
  }

  // ---- weights, by one warp ---------------------------------------------------------------------

  // What two tokens of a lane bring.
  struct TwoTokens {
    float2 log_decays, lengths;
    SIMT_DEV TwoTokens(const Block& b, int i) : log_decays(b.log_decays(i)), lengths(b.lengths(i)) {}
  };

  // Computes the weights of chunk i, and adds to the log2 of the decay up to its end.
  static SIMT_DEV void make_weights(const Block& b, const TwoTokens& ahead, int i) {
    const auto at = b.place();
    const ChunkDecay decay = b.decay(i);
    const float2 log_decays = Shape::kAhead || !i ? ahead.log_decays : b.log_decays(i);
    const double log2 = decay.set(b.task.p, log_decays, b.tokens(at, i), Block::skips_first_decay(at, i));
    if (decay.lengths != Lengths::none) decay.set_lengths(Shape::kAhead ? ahead.lengths : b.lengths(i));
    const auto sum = b.place().log2;
    if (sum.p && !lane() && !b.block_column()) sum.st(0, i ? sum.ld(0) + log2 : log2);
  }
  // Both return the tokens that were loaded ahead.
  static SIMT_DEV TwoTokens first_weights(const Block& b) {
    TwoTokens ahead(b, 0);
    if (Block::makes_weights()) {
      make_weights(b, ahead, 0);
      if (Shape::kAhead) ahead = TwoTokens(b, 1);
    }
    return ahead;
  }
  static SIMT_DEV TwoTokens next_weights(const Block& b, int i, const TwoTokens& ahead) {
    make_weights(b, ahead, i + 1);
    return Shape::kAhead ? TwoTokens(b, i + 2) : ahead;
  }

  // ---- outputs ----------------------------------------------------------------------------------

  static SIMT_DEV void write_outputs(const Block& b, int i, sptr<E> stage, const Tiles& chunk, const ChunkDecay& decay,
                                     const State& S) {
    const auto sums = Extras::clear(b);
    for (int strip = warp(); strip < C / 16; strip += nwarps()) {
      const int i0 = 16 * (strip ^ Block::flip());
      SIMT_UNROLL
      for (int j0 = 0; j0 < C; j0 += C / 2)
        if (j0 <= i0) score(b, stage, decay, i0, j0, sums);
    }
    Strip<kColumns, C> O;
    zero(O);
    Extras::read_state(b, O, S, chunk, decay, sums);
    map(O, [&](int, int j, float x) { return x * decay.in(j); });
    sync_cta();  // A is complete, and q is no longer needed
    Extras::write(b, i);
    if (!kGradient || b.task.p.o) {
      mma_nt</*kLower=*/true>(O, operand_t<X>(chunk.v, Block::warp_column()), b.A);
      const float scale = b.output_scale();
      map(O, [&](int, int, float x) { return x * scale; });
      finish(b, i, chunk, decay, O);
      store_t(chunk.o, Block::warp_column(), O);
      sync_warp();
      const auto at = b.place();
      const int64_t stride = b.task.p.o.stride[2];
      write_rows<kColumns>(at.o.sub(b.first_token(at, i) * stride + b.block_column() + Block::warp_column()), stride,
                           chunk.o, Block::warp_column(), b.tokens(at, i), b.columns_left(), b.task.o_aligned);
    }
  }

  // Takes outputs through the skip and the gate; multiplies gradients by the lengths of tokens.
  static SIMT_DEV void finish(const Block& b, int i, const Tiles& chunk, const ChunkDecay& decay,
                              Strip<kColumns, C>& O) {
    if constexpr (kGradient) {
      if (decay.lengths == Lengths::of_outputs) map(O, [&](int, int j, float x) { return x * decay.length.ld(j); });
    } else {
      const Problem& p = b.task.p;
      const auto at = b.place();
      const int own = Block::warp_column(), columns = b.columns_left();
      if (p.skip) {
        const auto skip = [&](int c) {
          return c < columns ? skip_at<float>(p, at.head, b.block_column() + own + c) : 0.f;
        };
        merge_operand(O, operand_t<E>(chunk.v, own), skip, [](float x, float v, float d) { return mul_add(d, v, x); });
      }
      if (p.gate) {
        const int64_t stride = p.gate.stride[2];
        read_rows<kColumns>(chunk.o, own, at.gate.sub(b.first_token(at, i) * stride + b.block_column() + own), stride,
                            b.tokens(at, i), columns, b.task.gate_aligned);
        sync_warp();
        const auto nothing = [](int) { return 0.f; };
        merge_operand(O, operand_t<E>(chunk.o, own), nothing, [](float x, float z, float) { return x * silu(z); });
        sync_warp();
      }
    }
  }

  // Computes half of 16 rows of A, from (i0, j0) on. The tiles are derived from the stage again,
  // since keeping their addresses from strip to strip takes registers.
  static SIMT_DEV void score(const Block& b, sptr<E> stage, const ChunkDecay& decay, int i0, int j0, sptr<float> sums) {
    using Own = typename Shape::Own;
    const Tiles chunk = Block::tiles(stage);
    Strip<16, C / 2> strip;
    zero(strip);
    mma_nt(strip, operand<Own>(chunk.q, i0), chunk.k.template rows<C / 2>(j0));
    map(strip, [&](int i, int j, float x) { return j0 + j <= i0 + i ? x * decay.mask(i0 + i, j0 + j) : 0.f; });
    Extras::add_scores(b, stage, strip, i0, j0, sums);
    if constexpr (kGradient) {
      const float scale = b.key_scale();
      map(strip, [&](int, int, float x) { return x * scale; });
    }
    store<X>(b.A, i0, j0, strip);
  }

  // ---- states -----------------------------------------------------------------------------------

  static SIMT_DEV void advance(const Block& b, const Tiles& chunk, const ChunkDecay& decay, State& S) {
    using Own = typename Shape::Own;
    if (Extras::advance(b, S, chunk, decay)) return;
    const auto values = [&] { return weighted<Own>(operand_t<E>(chunk.v, Block::warp_column()), decay.out); };
    if constexpr (Shape::kHolds) {
      const auto held = hold<kColumns, C>(values());
      SIMT_UNROLL
      for (int j = 0; j < K; j += 32) add_to_state(b, S, held, chunk.k, decay, j);
    } else {
      SIMT_UNROLL
      for (int j = 0; j < K; j += 32) add_to_state(b, S, values(), chunk.k, decay, j);
    }
  }

  static SIMT_DEV void load_initial(const Block& b, State& S) {
    zero(S);
    if (const auto before = b.place().before; before.p) b.load_state(S, before, b.before_steps());
  }
  static SIMT_DEV void store_final(const Block& b, const State& S) {
    const auto after = b.place().after;
    if (!after.p) return;
    float weight = 1;
    if constexpr (kGradient) weight = b.place().after_weight;
    b.store_state(after, b.after_steps(), S, weight);
  }
};

}  // namespace lc::cuda
