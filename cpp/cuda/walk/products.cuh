// products.cuh - the steps of a walk that only the gradients of decays and of lengths need
// (Aim::decays): one product per token, and checkpoints.
//
//   products_t = factor_t.o'_t                       o': the part of o that comes through the state
//              + sum_{j<t} w_tj - sum_{i>t} w_it     forward in time only; i, j, t in one chunk
//   w_ij       = mask_ij q_i.k_j factor_i.v_j
//   whole:       factor_t.o_t, without the length of token t, which is what the length multiplies
//
// The gradient is a sum of these products over chunks, plus products of states. Errors add up if
// the two disagree. So o' is computed from all digits of the state, and the factor is rounded
// exactly as it is where it becomes part of the states of the walk in the other direction.
#pragma once
#include "block.cuh"

namespace lc::cuda {

// S += the sum of a chunk, columns [j, j + 32) of S^T: see walk.cuh.
template <bool kRounded = false, class Shape, class Values>
SIMT_DEV void add_to_state(const WalkBlock<Shape>& b, Strip<Shape::kColumns, Shape::K>& S, const Values& values,
                           const Shared<typename Shape::E, Shape::C, Shape::K>& k, const ChunkDecay& decay, int j) {
  const float total = decay.total(), rest = decay.rest(), scale = b.sum_scale(decay);
  Strip<Shape::kColumns, 32> sum;
  zero(sum);
  mma<kRounded>(sum, values, k, j);
  merge(S, j, sum,
        [&](float x, float y) { return mul_add(x, total, mul_add(x, rest, Shape::kSumScale ? y * scale : y)); });
}

// Walks without products: only the plain O^T += S^T Q^T is left.
template <class Shape, bool = Shape::kDecays>
struct Products {
  using E = typename Shape::E;
  using Block = WalkBlock<Shape>;
  using Tiles = typename Block::Tiles;
  using State = Strip<Shape::kColumns, Shape::K>;
  using Outputs = Strip<Shape::kColumns, Shape::C>;

  static SIMT_DEV void fetch(const Block&, const typename Shape::At&, int64_t, int, sptr<E>) {}
  static SIMT_DEV sptr<float> clear(const Block& b) { return b.sums; }
  template <class Scores>
  static SIMT_DEV void add_scores(const Block&, sptr<E>, const Scores&, int, int, sptr<float>) {}
  static SIMT_DEV void read_state(const Block&, Outputs& O, const State& S, const Tiles& chunk, const ChunkDecay&,
                                  sptr<float>) {
    mma_nt(O, operand<typename Shape::X>(S), chunk.q);
  }
  static SIMT_DEV void write(const Block&, int) {}
  static SIMT_DEV bool advance(const Block&, State&, const Tiles&, const ChunkDecay&) { return false; }
  static SIMT_DEV void checkpoint(const Block&, int, const State&) {}
};

template <class Shape>
struct Products<Shape, true> {
  using E = typename Shape::E;
  using X = typename Shape::X;
  using Own = typename Shape::Own;
  using At = typename Shape::At;
  using Block = WalkBlock<Shape>;
  using Tiles = typename Block::Tiles;
  using State = Strip<Shape::kColumns, Shape::K>;
  using Outputs = Strip<Shape::kColumns, Shape::C>;
  static constexpr int C = Shape::C, K = Shape::K;

  // Copies the factor of n tokens from token t on to a stage.
  static SIMT_DEV void fetch(const Block& b, const At& at, int64_t t, int n, sptr<E> stage) {
    const Tiles chunk = Block::tiles(stage);
    const int64_t stride = b.task.walk.factor.stride[2];
    load_async(chunk.factor, at.factor.sub(t * stride + b.block_column()), stride, n, b.columns_of_block(),
               b.task.factor_aligned);
  }

  // The sums of this warp, set to 0.
  static SIMT_DEV sptr<float> clear(const Block& b) {
    const auto sums = b.sums.sub(warp() * C, C);
    sums.stv(2 * lane(), float2{0, 0});
    sync_warp();
    return sums;
  }

  // Adds w of the scores from (i0, j0) on, given mask_ij q_i.k_j.
  static SIMT_DEV void add_scores(const Block& b, sptr<E> stage, const Strip<16, C / 2>& scores, int i0, int j0,
                                  sptr<float> sums) {
    const bool whole = b.task.walk.whole;
    if (b.backward() && !whole) return;
    const Tiles chunk = Block::tiles(stage);
    Strip<16, C / 2> w;
    zero(w);
    mma_nt(w, operand<Own>(chunk.factor, i0), chunk.v.template rows<C / 2>(j0));
    const float scale = b.key_scale();
    merge(w, 0, scores, [&](float x, float y) { return x * y * scale; });
    map(w, [&](int i, int j, float x) { return j0 + j < i0 + i + whole ? x : 0.f; });
    add_rows(sums, i0, w);
    if (!whole) add_columns(sums, j0, w, -1);
  }

  // O^T += S^T Q^T from all digits of S, and the products of O with the factor.
  static SIMT_DEV void read_state(const Block& b, Outputs& O, const State& S, const Tiles& chunk,
                                  const ChunkDecay& decay, sptr<float> sums) {
    if constexpr (std::is_same_v<X, float>)
      mma_nt</*kLower=*/false, /*kRounded=*/true>(O, operand<float>(S), chunk.q);
    else
      mma_nt(O, in_two<X>(operand<float>(S)), chunk.q);
    const auto columns = operand_t<E>(chunk.factor, Block::warp_column());
    const ChunkDecay::SinceFirst weights{decay, decay.lengths == Lengths::of_outputs && !b.task.walk.whole};
    if (is_precise(b))
      add_products(sums, O, weighted<float>(columns, weights), decay.in(0));
    else
      add_products(sums, O, weighted<Own>(columns, weights), decay.in(0));
  }

  // Adds the sums of all warps and writes the products of chunk i.
  static SIMT_DEV void write(const Block& b, int i) {
    const At at = b.place();
    const int64_t t = b.first_token(at, i), of_slice = b.slice() * b.task.p.H * lc::tokens(b.task.p);
    const int n = b.tokens(at, i);
    const float scale = b.output_scale();
    for (int j = tid(); j < n; j += nthreads()) {
      float sum = 0;
      for (int m = 0; m < nwarps(); ++m) sum += b.sums.ld(m * C + j);
      at.products.st(of_slice + (b.backward() ? -(t + j) : t + j), scale * sum);
    }
  }

  // Updates the state to full float32 precision where the walk asks for it. Returns whether it did.
  static SIMT_DEV bool advance(const Block& b, State& S, const Tiles& chunk, const ChunkDecay& decay) {
    if (!is_precise(b)) return false;
    SIMT_UNROLL
    for (int j = 0; j < K; j += 32) {
      const auto values = weighted<float>(operand_t<E>(chunk.v, Block::warp_column()), decay.out);
      if constexpr (std::is_same_v<Own, float>)
        add_to_state<true>(b, S, values, chunk.k, decay, j);
      else
        add_to_state(b, S, in_two<Own>(values), chunk.k, decay, j);
    }
    return true;
  }

  // Writes the state before chunk i of the walk if that is a checkpoint. A checkpoint between two
  // segments is written by the walk of the later segment in time.
  static SIMT_DEV void checkpoint(const Block& b, int i, const State& S) {
    const At at = b.place();
    constexpr int kEvery = kCheckpoint / kChunk;
    const int chunk = b.backward() ? at.first_chunk - i + 1 : at.first_chunk + i;
    if (!at.checkpoints.p || chunk % kEvery) return;
    if (b.backward() ? i <= at.first_output : i < at.first_output || i >= at.chunks) return;
    const Problem& p = b.task.p;
    b.store_state(at.checkpoints.sub(chunk / kEvery * p.Hs * (p.K * p.V)), dense_steps(p, b.task.walk), S, 1);
  }

 private:
  static SIMT_DEV bool is_precise(const Block& b) {
    return K > 128 || std::is_same_v<Own, float> || b.task.walk.precise;
  }
};

}  // namespace lc::cuda
