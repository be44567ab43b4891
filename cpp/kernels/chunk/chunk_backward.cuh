// chunk_backward.cuh - GPU: kernels of gradients besides walks: sums over heads, d log_decay, d dt.
// The gradient of token t's decay is the part of the loss that crosses from before t to t or later:
//
//   dg_t = M + sum_{j<t} y_j + sum_{i>=t} x_i    M = total <S, dS>: S before, dS after the chunk
//
//   x, y: products of the walks for dq and dk (cuda/walk/products.cuh). M = (crossing into the
//   chunk) - sum x, and M + sum y crosses into the next chunk. As rounding errors would add up,
//   this restarts at every kCheckpoint tokens from <S, dS> of two stored states
//   d length_t = log_decay dg_t + u_t, and log_decay gets length_t dg_t      u: the walk for dv
//   grid: (kCheckpoint tokens, state); 2 K V flop and a few per token; Mamba-2, arXiv:2405.21060
#pragma once
#include "../../cuda/lengths.cuh"
#include "../../cuda/segments.cuh"

namespace lc::cuda {

// to[b, h, n, j] = the sum of from[b, share h + i, n, j] over i < share, in order.
template <class E>
struct SumHeads {
  static constexpr const char* kName = "sum of heads";
  static constexpr int kMaxThreads = 256, kMinBlocks = 4;
  struct Params {
    View from, to;
    int64_t heads, rows, columns;  // of `to`
    int64_t share;
    int64_t numbers;  // all numbers of `to`
  };

  static SIMT_DEV void run(const Params& a) {
    const int64_t at = int64_t(bid().x) * kMaxThreads + tid();
    if (at >= a.numbers) return;
    const int64_t j = at % a.columns, n = at / a.columns % a.rows, head = at / a.columns / a.rows;
    const int64_t b = head / a.heads, h = head % a.heads;
    Accumulator<E> sum = 0;
    for (int64_t i = 0; i < a.share; ++i) sum += widen(row<const E>(a.from, b, a.share * h + i, n).ld(j));
    row<E>(a.to, b, h, n).st(j * a.to.stride[3], narrow<E>(sum));
  }
};

struct DecayGradient {
  static constexpr const char* kName = "gradient of decays";
  static constexpr int kMaxThreads = 256, kMinBlocks = 2, kWarps = kMaxThreads / 32, kChunks = kCheckpoint / kChunk;
  static constexpr int kSharedBytes = 2 * kCheckpoint * 4 + (2 * kWarps + 3 * kChunks) * 8;
  struct Params {
    Problem p, given;                 // with lengths in the place of dt, and as given
    const float *states, *gradients;  // S [slot, Hs, V, K], dS [slot, H, V, K] at checkpoints
    const float *x, *y, *u;           // [slice, H, token]
    int slices, value_slices;         // of x and y; of u
    double* sums;                     // [slot, Hs]: sums over tokens, if tokens share their log-decay
  };

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    const Segments cut{kCheckpoint};
    const int64_t hs = int64_t(bid().x) % p.Hs, slot = int64_t(bid().x) / p.Hs, b = cut.owner(p, slot);
    const Sequence s = sequence_at(p, b);
    const int64_t first = (slot - cut.first_slot(p, b)) * kCheckpoint;
    const int n = int(first >= s.length ? 0 : s.length - first < kCheckpoint ? s.length - first : kCheckpoint);
    const int chunks = (n + kChunk - 1) / kChunk;
    Smem smem;
    const auto x = smem.alloc<float>(kCheckpoint), y = smem.alloc<float>(kCheckpoint);
    const auto of_warp = smem.alloc<double>(kWarps), total = smem.alloc<double>(kWarps);
    const auto xs = smem.alloc<double>(kChunks), ys = smem.alloc<double>(kChunks),
               through = smem.alloc<double>(kChunks);

    gather(a, s, hs, first, n, x, y);
    double product = 0;
    if (n && (first || p.initial_state)) product = states_product(a, slot, hs);
    product = warp_sum(product);
    if (!lane()) {
      of_warp.st(warp(), product);
      total.st(warp(), 0);
    }
    sync_cta();
    for (int c = warp(); c < chunks; c += kWarps) {
      const int i = c * kChunk + 2 * lane();
      const double of_x = warp_sum(double(x.ld(i)) + double(x.ld(i + 1)));
      const double of_y = warp_sum(double(y.ld(i)) + double(y.ld(i + 1)));
      const double log2 =
          warp_sum(log2_at(p, s, hs, first + i, first + n) + log2_at(p, s, hs, first + i + 1, first + n));
      if (!lane()) {
        xs.st(c, of_x);
        ys.st(c, of_y);
        through.st(c, log2);
      }
    }
    sync_cta();
    if (!tid() && n) {
      double before = 0;
      for (int i = 0; i < kWarps; ++i) before += of_warp.ld(i);
      before *= ex2(log2_at(p, s, hs, first, first + n));
      for (int c = 0; c < chunks; ++c) {
        // Below 2^-40 the difference would be a rounding error.
        const double M = through.ld(c) < -40 ? 0 : before - xs.ld(c);
        before = M + ys.ld(c);
        through.st(c, M);
      }
    }
    sync_cta();
    for (int c = warp(); c < chunks; c += kWarps) {
      const double of_chunk = write(a, s, hs, first, n, c, through.ld(c), x, y);
      if (!lane()) total.st(warp(), total.ld(warp()) + of_chunk);
    }
    sync_cta();
    if (tid() || !a.sums) return;
    double sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += total.ld(i);
    gptr<double>{a.sums}.st(slot * p.Hs + hs, sum);
  }

 private:
  // Log2 of the decay of token t of a sequence; 0 from token `end` on.
  static SIMT_DEV double log2_at(const Problem& p, const Sequence& s, int64_t hs, int64_t t, int64_t end) {
    return t < end ? log2_decay_at(p, s.row, hs, s.begin + t) : 0;
  }

  // Sums x and y over slices and over the q heads of the state; writes zeros after the last token.
  static SIMT_DEV void gather(const Params& a, const Sequence& s, int64_t hs, int64_t first, int n, sptr<float> x,
                              sptr<float> y) {
    const Problem& p = a.p;
    const int64_t all = tokens(p), t0 = s.row * p.N + s.begin + first;
    for (int i = tid(); i < kCheckpoint; i += kMaxThreads) {
      float of_x = 0, of_y = 0;
      for (int64_t slice = 0; i < n && slice < a.slices; ++slice)
        for (int64_t h = hs * group(p); h < (hs + 1) * group(p); ++h) {
          const int64_t at = (slice * p.H + h) * all + t0 + i;
          of_x += gptr<const float>{a.x}.ld(at);
          of_y += gptr<const float>{a.y}.ld(at);
        }
      x.st(i, of_x);
      y.st(i, of_y);
    }
  }

  // This thread's part of <S, dS>.
  static SIMT_DEV double states_product(const Params& a, int64_t slot, int64_t hs) {
    const Problem& p = a.p;
    const int64_t size = p.K * p.V;
    const gptr<const float> S{a.states + (slot * p.Hs + hs) * size}, dS{a.gradients + slot * p.H * size};
    double sum = 0;
    for (int64_t h = hs * group(p); h < (hs + 1) * group(p); ++h)
      for (int64_t i = tid(); i < size; i += kMaxThreads) sum += double(S.ld(i) * dS.ld(h * size + i));
    return sum;
  }

  // Writes dg and d dt of the tokens of chunk c, by one warp. Returns the sum of dg, times lengths.
  static SIMT_DEV double write(const Params& a, const Sequence& s, int64_t hs, int64_t first, int n, int c, double M,
                               sptr<float> x, sptr<float> y) {
    const Problem& p = a.p;
    const int i = c * kChunk + 2 * lane();
    const double x0 = x.ld(i), x1 = x.ld(i + 1), y0 = y.ld(i), y1 = y.ld(i + 1);
    const double before = cumulative(y0 + y1) - y1 - y0;
    double after = x0 + x1;  // summed from the end: total minus prefix would cancel
    for (int d = 1; d < 32; d *= 2) {
      const double z = shfl_down(after, d);
      if (lane() + d < 32) after += z;
    }
    const double next = shfl_down(after, 1);
    const double dg[2] = {M + before + after, M + before + y0 + x1 + (lane() < 31 ? next : 0)};
    double sum = 0;
    SIMT_UNROLL
    for (int e = 0; e < 2; ++e) {
      if (i + e >= n) continue;
      const int64_t t = first + i + e;
      // Nothing crosses a token whose decay leaves nothing of a state.
      const double gradient = log2_at(p, s, hs, t, first + n) > log2_decay(p, -1e300) ? dg[e] : 0;
      if (p.dt) {
        sum += gradient * row<const float>(p.dt, s.row, hs, s.begin + t).ld(0);
        if (p.d_dt) write_length(a, s.row, hs, s.begin + t, gradient);
      } else {
        sum += gradient;
        if (p.decay == Decay::per_token) row<float>(p.d_log_decay, s.row, hs, s.begin + t).st(0, float(gradient));
      }
    }
    return warp_sum(sum);
  }

  // Writes d dt of token n, given its dg.
  static SIMT_DEV void write_length(const Params& a, int64_t b, int64_t hs, int64_t n, double dg) {
    const Problem& p = a.given;
    const double rate = rate_at(p, b, hs);
    double gradient = rate > kLeastRate ? rate * dg : 0;
    for (int64_t slice = 0; slice < a.value_slices; ++slice)
      for (int64_t h = hs * group(p); h < (hs + 1) * group(p); ++h)
        gradient += double(gptr<const float>{a.u}.ld((slice * p.H + h) * tokens(p) + b * p.N + n));
    set_number(p.dt_type, p.d_dt.data, offset(p.d_dt, b, hs, n), gradient * double(Length<float>(p, b, hs, n).slope));
  }
};

// d log_decay where tokens share a decay: sums over tokens, and over heads and sequences where its
// strides are 0.
struct SumDecays {
  static constexpr const char* kName = "sum of decays";
  static constexpr int kMaxThreads = 128, kMinBlocks = 4, kSharedBytes = kMaxThreads * int(sizeof(double));
  struct Params {
    Problem p;
    const double* sums;  // [slot, Hs]
  };

  static SIMT_DEV void run(const Params& a) {
    const Problem& p = a.p;
    const Segments cut{kCheckpoint};
    const bool by_row = p.d_log_decay.stride[0], by_head = p.d_log_decay.stride[1];
    const int64_t b = by_row ? int64_t(bid().x) : 0, hs = by_head ? int64_t(bid().y) : 0;
    const int64_t slots = cut.slots(p), first = by_row ? b * cut.each(p) : 0,
                  end = by_row ? first + cut.each(p) : slots;
    const int64_t heads = by_head ? 1 : p.Hs;
    const gptr<const double> sums{a.sums};
    Smem smem;
    const auto parts = smem.alloc<double>(kMaxThreads);
    double sum = 0;
    for (int64_t i = tid(); i < (end - first) * heads; i += kMaxThreads)
      sum += sums.ld((first + i / heads) * p.Hs + hs + i % heads);
    parts.st(tid(), sum);
    sync_cta();
    if (tid()) return;
    for (int i = 1; i < kMaxThreads; ++i) sum += parts.ld(i);
    row<float>(p.d_log_decay, b, hs, 0).st(0, float(sum));
  }
};

}  // namespace lc::cuda
