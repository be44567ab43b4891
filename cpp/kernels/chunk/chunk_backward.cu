// chunk_backward.cu - GPU: gradients as three walks over chunks, side by side in one launch: they are outputs of the
// recurrence itself over other operands (gradient.h), and chunks.cuh computes them as it computes o.
//
//   dq: forward in time, with states S^T    dk, dv: backward in time, with states dS^T and dS    no states in memory,
//   but those between segments, where heads are few (as in scan), and at every 1024 tokens, for d log_decay:
//   chunk_backward.cuh. Gradients that heads share are written head by head and then summed
//
//   3 B H N ((C+1)(K+V) + 4KV) flop: 2KV more than with dk and dv from one dS, but nothing is summed between blocks
//   and all is one kernel; K C flop more for d log_decay; 4KV more where there are segments
//   Lightning Attention-2, arXiv:2401.04658; GLA, arXiv:2312.06635
#include "chunk_backward.cuh"

#include "../../cuda/chunks.h"
#include "../../cuda/cost.h"
#include "../../cuda/launch.h"
#include "../../cuda/scan_states.cuh"
#include "../../gradient.h"
#include "chunk_backward.h"

namespace lc::cuda::backward {
namespace {

// A call: its walks, and where in the workspace they find what.
struct Call {
  Problem p;
  bool decays;                 // d log_decay is asked for
  bool queries, keys, values;  // the walks that there are
  bool precise;                // a sum over all tokens has no digits left of what 16 bits have of states
  int slices = 0;              // of products
  bool is_cut;
  Segments cut;
  size_t bytes = 0;
  View zeros, d_q, d_k, d_v, d_initial_state;
  double *log2_before, *log2_after, *sums;
  float *before, *after, *states, *gradients, *x, *y;

  explicit Call(const Problem& problem) : p(problem) {
    decays = bool(p.d_log_decay), precise = decays && p.decay == Decay::constant;
    queries = p.d_q || decays, keys = p.d_k || decays, values = p.d_v || p.d_initial_state;
    if (decays) slices = decay_slices(p);

    // States are kept at the ends of some segments.
    const int64_t chunks = (p.N + kChunk - 1) / kChunk, every = kKept / kChunk;
    int64_t length = segment_chunks(p, batch(p) * p.H * passes() * ((std::max(p.K, p.V) + 63) / 64));
    if (length > 4) length = length <= 8 ? 8 : (length + every - 1) / every * every;
    is_cut = length < chunks;
    cut = {(is_cut ? length : chunks + 1) * kChunk};

    const int64_t size = p.K * p.V, ends = is_cut ? cut.slots(p) : 0, kept = decays ? Segments{kKept}.slots(p) : 0;
    char* base = static_cast<char*>(p.workspace);
    const auto take = [&](auto*& to, int64_t numbers) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(base + bytes);
      bytes += (size_t(numbers) * sizeof(*to) + 15) / 16 * 16;
    };
    take(sums, precise ? kept * p.Hs : 0);
    take(log2_before, queries ? ends * p.Hs : 0), take(before, queries ? ends * p.Hs * size : 0);
    take(log2_after, ends * p.H), take(after, ends * p.H * size);
    take(states, kept * p.Hs * size), take(gradients, kept * p.H * size);
    take(x, slices * p.H * tokens(p)), take(y, slices * p.H * tokens(p));
    // Gradients of every q head, dense, where fewer are asked for.
    const auto each = [&](const View& asked, int64_t b, int64_t own_heads, int64_t n, int64_t columns, int width) {
      if (!asked || own_heads == p.H) return asked;
      uint8_t* memory;
      take(memory, b * p.H * n * columns * width);
      return View{memory, {p.H * n * columns, n * columns, columns, 1}};
    };
    const int width = int(type_bytes(p.type));
    d_q = each(p.d_q, batch(p), p.Hq, p.N, p.K, width), d_k = each(p.d_k, batch(p), p.Hk, p.N, p.K, width);
    d_v = each(p.d_v, batch(p), p.Hv, p.N, p.V, width);
    d_initial_state = each(p.d_initial_state, p.B, p.Hs, p.K, p.V, 4);
    uint8_t* zero_row;
    take(zero_row, p.d_o ? 0 : p.V * width);
    zeros = {zero_row, {}};
  }

  int passes() const { return int(queries) + int(keys) + int(values); }
};

// The three walks: what they read and write, of whole sequences.
Walk walk_of(const Call& c) {
  Walk w;
  w.length = c.cut.length, w.share = group(c.p), w.precise = c.precise;
  return w;
}
void backward_in_time(GradientWalk& r) {
  for (View* view : {&r.p.q, &r.p.k, &r.p.v, &r.p.o, &r.p.log_decay, &r.walk.factor})
    view->stride[2] = -view->stride[2];
  r.p.initial_state = r.p.d_final_state, r.walk.backward = true;
}
GradientWalk queries_of(const Call& c) {
  GradientWalk r{of_queries(c.p), walk_of(c)};
  r.p.o = c.d_q, r.walk.turned = true, r.walk.share = 1;
  if (c.decays) r.walk.factor = c.p.q, r.walk.factor_heads = c.p.Hq, r.walk.products = c.x, r.walk.kept = c.states;
  return r;
}
GradientWalk keys_of(const Call& c) {
  GradientWalk r{of_keys(c.p), walk_of(c)};
  r.p.o = c.d_k, r.walk.turned = true;
  if (c.decays) r.walk.factor = c.p.k, r.walk.factor_heads = c.p.Hk, r.walk.products = c.y, r.walk.kept = c.gradients;
  backward_in_time(r);
  return r;
}
GradientWalk values_of(const Call& c) {
  GradientWalk r{of_values(c.p), walk_of(c)};
  r.p.o = c.d_v, r.p.final_state = c.d_initial_state;
  backward_in_time(r);
  return r;
}

void walk(const Call& c, const GradientWalks& walks) {
  (c.decays ? walk_decays : walk_gradients)(c.p, c.passes(), walks);
}

// S before and dS after every segment but the first, and but the last: c.before, c.after.
void make_states(const Call& c, GradientWalk states, GradientWalk gradients) {
  for (GradientWalk* w : {&states, &gradients}) w->walk.alone = w->walk.warm_up = true, w->walk.kept = nullptr;
  states.walk.after = c.before, states.walk.log2 = c.log2_before;
  gradients.walk.after = c.after, gradients.walk.log2 = c.log2_after;
  GradientWalks alone;
  if (c.queries) alone.push_back(states);
  if (c.keys || c.values) alone.push_back(gradients);
  walk(c, alone);
  for (const GradientWalk& w : alone) scan_states(w.p, w.walk);
}

template <class E>
void sum_heads(const Problem& p, const View& from, const View& to, int64_t b, int64_t heads, int64_t share, int64_t n,
               int64_t columns) {
  const int64_t numbers = b * heads * n * columns, threads = SumHeads<E>::kMaxThreads;
  start<SumHeads<E>>(p, dim3(unsigned((numbers + threads - 1) / threads)), int(threads), 0,
                     {from, to, heads, n, columns, share, numbers});
}

}  // namespace

const char* refuses(const Problem& p) {
  const char* why = gradients_refuse(p);
  return why || !p.d_log_decay ? why : decays_refuse(p);
}

size_t workspace(const Problem& p) { return Call(p).bytes; }

void run(const Problem& problem) {
  Call c(problem);
  Problem& p = c.p;
  if (!p.d_o) {
    p.d_o = c.zeros;
    with_type(p.type, [&](auto e) { sum_heads<decltype(e)>(p, c.zeros, c.zeros, 1, 1, /*share=*/0, 1, p.V); });
  }
  GradientWalk of_q = queries_of(c), of_k = keys_of(c), of_v = values_of(c);
  if (c.is_cut) {
    make_states(c, of_q, of_v);
    for (GradientWalk* w : {&of_q, &of_k, &of_v}) w->walk.warm_up = true, w->walk.before = c.after;
    of_q.walk.before = c.before;
  }
  GradientWalks walks;
  if (c.queries) walks.push_back(of_q);
  if (c.keys) walks.push_back(of_k);
  if (c.values && !c.decays) walks.push_back(of_v);
  walk(c, walks);
  if (c.values && c.decays) walk_gradients(p, c.passes(), {of_v});

  if (c.decays) {
    start<DecayGradient>(p, dim3(unsigned(Segments{kKept}.slots(p) * p.Hs)), DecayGradient::kMaxThreads,
                         DecayGradient::kSharedBytes,
                         {p, c.states, c.gradients, c.x, c.y, c.slices, c.precise ? c.sums : nullptr});
    const bool by_row = p.d_log_decay.stride[0], by_head = p.d_log_decay.stride[1];
    if (c.precise)
      start<SumDecays>(p, dim3(by_row ? unsigned(p.B) : 1, by_head ? unsigned(p.Hs) : 1), SumDecays::kMaxThreads,
                       SumDecays::kSharedBytes, {p, c.sums});
  }
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    if (p.d_q && p.Hq < p.H) sum_heads<E>(p, c.d_q, p.d_q, batch(p), p.Hq, p.H / p.Hq, p.N, p.K);
    if (p.d_k && p.Hk < p.H) sum_heads<E>(p, c.d_k, p.d_k, batch(p), p.Hk, p.H / p.Hk, p.N, p.K);
    if (p.d_v && p.Hv < p.H) sum_heads<E>(p, c.d_v, p.d_v, batch(p), p.Hv, p.H / p.Hv, p.N, p.V);
  });
  if (p.d_initial_state && p.Hs < p.H)
    sum_heads<float>(p, c.d_initial_state, p.d_initial_state, p.B, p.Hs, group(p), p.K, p.V);
}

Cost cost(const Problem& p) {
  const Call c(p);
  const double chunks = double(std::min(c.cut.length, p.N)) / kChunk, n = double(tokens(p)), H = double(p.H);
  const double KV = double(p.K * p.V), passes = double(c.passes());
  const double again = n * H * type_bytes(p.type) * double(2 * p.K + 2 * p.V);  // dk's and dv's operands once more
  const double flop = passes * chunk_flop(p) + (c.decays ? 2 * n * H * double(kChunk * p.K) + 4 * n * H * KV : 0) +
                      (c.precise ? 4 * n * H * KV : 0) + (c.is_cut ? 4 * n * H * KV : 0);
  const double blocks = double(Segments{c.cut.length}.slots(p)) * H * passes * double((std::max(p.K, p.V) + 63) / 64);
  return predict(p, {flop, again + double(c.bytes), /*depth=*/2 * chunks, /*launches=*/c.is_cut ? 6. : 3., blocks,
                     /*steps=*/(c.is_cut ? 1.6 : 1) * chunks, chunk_step_us(p)});
}

}  // namespace lc::cuda::backward
