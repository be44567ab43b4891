// chunk_backward.cu - GPU: gradients as up to three walks in one launch. They are outputs of the
// recurrence itself over other operands (gradient.h), computed by cuda/walk/walk.cuh.
//
//   dq: forward in time, with states S^T    dk, dv: backward in time, with states dS^T and dS
//   Lengths of tokens are weights of keys forward in time, and of outputs backward in time
//
//   States are in memory between segments, where heads are few (as in scan), and at every 1024
//   tokens for d log_decay (chunk_backward.cuh). Gradients that heads share are written per head,
//   then summed
//   3 B H N ((C+1)(K+V) + 4KV) flop: 2KV more than with dk and dv from one dS, but no sums between
//   blocks, and one kernel; K C flop more for d log_decay; 4KV more where there are segments
//   Lightning Attention-2, arXiv:2401.04658; GLA, arXiv:2312.06635
#include "chunk_backward.cuh"

#include "../../cuda/cost.h"
#include "../../cuda/launch.h"
#include "../../cuda/lengths.h"
#include "../../cuda/scan_states.cuh"
#include "../../cuda/walk/walk.h"
#include "../../gradient.h"
#include "chunk_backward.h"

namespace lc::cuda::backward {
namespace {

// The walks of a call, and their memory in the workspace.
struct BackwardCall {
  Problem p;
  bool decays;                 // whether d log_decay or d dt is asked for
  bool queries, keys, values;  // whether the call has the walk for dq, dk, dv
  bool precise;                // walks need states to full precision: d log_decay is a sum over all tokens
  int slices = 0;              // slices of the products
  bool is_cut;                 // whether sequences are cut into segments
  Segments cut;
  size_t bytes = 0;  // of the workspace
  View zeros, d_q, d_k, d_v, d_initial_state;
  double *log2_before, *log2_after, *sums;
  float *before, *after, *states, *gradients, *x, *y, *u;

  // The problem has lengths of tokens in the place of dt: cuda/lengths.h.
  explicit BackwardCall(const Problem& problem) : p(problem) {
    decays = p.d_log_decay || p.d_dt;
    precise = p.d_log_decay && (p.decay == Decay::constant || p.dt);
    queries = p.d_q || decays;
    keys = p.d_k || decays;
    values = p.d_v || p.d_initial_state || p.d_dt;
    if (decays) slices = decay_slices(p, p.K);
    cut_sequences();

    const int64_t size = p.K * p.V, ends = is_cut ? cut.slots(p) : 0;
    const int64_t checkpoints = decays ? Segments{kCheckpoint}.slots(p) : 0;
    take(sums, precise ? checkpoints * p.Hs : 0);
    take(log2_before, queries ? ends * p.Hs : 0);
    take(before, queries ? ends * p.Hs * size : 0);
    take(log2_after, ends * p.H);
    take(after, ends * p.H * size);
    take(states, checkpoints * p.Hs * size);
    take(gradients, checkpoints * p.H * size);
    take(x, slices * p.H * tokens(p));
    take(y, slices * p.H * tokens(p));
    take(u, p.d_dt ? value_slices() * p.H * tokens(p) : 0);
    const int width = int(type_bytes(p.type));
    d_q = per_head(p.d_q, batch(p), p.Hq, p.N, p.K, width);
    d_k = per_head(p.d_k, batch(p), p.Hk, p.N, p.K, width);
    d_v = per_head(p.d_v, batch(p), p.Hv, p.N, p.V, width);
    d_initial_state = per_head(p.d_initial_state, p.B, p.Hs, p.K, p.V, 4);
    uint8_t* zero_row;
    take(zero_row, p.d_o ? 0 : p.V * width);
    zeros = {zero_row, {0, 0, 0, 1}};
  }

  int walks() const { return int(queries) + int(keys) + int(values); }
  int value_slices() const { return decay_slices(p, p.V); }  // of u

 private:
  // Chooses the length of segments. Their ends are checkpoints, or divide the tokens between two
  // checkpoints.
  void cut_sequences() {
    const int64_t chunks = (p.N + kChunk - 1) / kChunk, every = kCheckpoint / kChunk;
    int64_t length = segment_chunks(p, batch(p) * p.H * walks() * ((std::max(p.K, p.V) + 63) / 64));
    if (length > 4) length = length <= 8 ? 8 : (length + every - 1) / every * every;
    is_cut = length < chunks;
    cut = {(is_cut ? length : chunks + 1) * kChunk};
  }

  // Takes memory from the workspace.
  template <class T>
  void take(T*& to, int64_t numbers) {
    to = reinterpret_cast<T*>(static_cast<char*>(p.workspace) + bytes);
    bytes += (size_t(numbers) * sizeof(T) + 15) / 16 * 16;
  }

  // Dense memory for the gradients of all q heads if the caller asks for fewer heads; else the
  // caller's tensor.
  View per_head(const View& asked, int64_t b, int64_t own_heads, int64_t n, int64_t columns, int width) {
    if (!asked || own_heads == p.H) return asked;
    uint8_t* memory;
    take(memory, b * p.H * n * columns * width);
    return View{memory, {p.H * n * columns, n * columns, columns, 1}};
  }
};

// ---- the three walks, over whole sequences ------------------------------------------------------

Walk walk_of(const BackwardCall& c) {
  Walk w;
  w.length = c.cut.length;
  w.share = group(c.p);
  w.precise = c.precise;
  return w;
}
void backward_in_time(GradientWalk& r) {
  for (View* view : {&r.p.q, &r.p.k, &r.p.v, &r.p.o, &r.p.log_decay, &r.p.dt, &r.walk.factor})
    view->stride[2] = -view->stride[2];
  r.p.initial_state = r.p.d_final_state;
  r.walk.backward = true;
}
void with_products(GradientWalk& r, const View& factor, int64_t factor_heads, float* products, float* checkpoints) {
  r.walk.factor = factor;
  r.walk.factor_heads = factor_heads;
  r.walk.products = products;
  r.walk.checkpoints = checkpoints;
}
GradientWalk queries_of(const BackwardCall& c) {
  GradientWalk r{of_queries(c.p), walk_of(c)};
  r.p.o = c.d_q;
  r.walk.transposed = true;
  r.walk.share = 1;
  if (c.decays) with_products(r, c.p.q, c.p.Hq, c.x, c.states);
  return r;
}
GradientWalk keys_of(const BackwardCall& c) {
  GradientWalk r{of_keys(c.p), walk_of(c)};
  r.p.o = c.d_k;
  r.walk.transposed = true;
  if (c.decays) with_products(r, c.p.k, c.p.Hk, c.y, c.gradients);
  backward_in_time(r);
  return r;
}
GradientWalk values_of(const BackwardCall& c) {
  GradientWalk r{of_values(c.p), walk_of(c)};
  r.p.o = c.d_v;
  r.p.final_state = c.d_initial_state;
  if (c.p.d_dt) with_products(r, c.p.v, c.p.Hv, c.u, /*checkpoints=*/nullptr);
  r.walk.whole = bool(c.p.d_dt);
  backward_in_time(r);
  return r;
}

void walk(const BackwardCall& c, const GradientWalks& walks) {
  (c.decays ? walk_decays : walk_gradients)(c.p, c.walks(), walks);
}

// Computes c.before, S before every segment except the first, and c.after, dS after every segment
// except the last.
void make_states(const BackwardCall& c, GradientWalk states, GradientWalk gradients) {
  for (GradientWalk* w : {&states, &gradients}) {
    w->walk.states_only = true;
    w->walk.warm_up = true;
    w->walk.checkpoints = nullptr;
  }
  states.walk.after = c.before;
  states.walk.log2 = c.log2_before;
  gradients.walk.after = c.after;
  gradients.walk.log2 = c.log2_after;
  GradientWalks walks;
  if (c.queries) walks.push_back(states);
  if (c.keys || c.values) walks.push_back(gradients);
  walk(c, walks);
  for (const GradientWalk& w : walks) scan_states(w.p, w.walk);
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
  return why || !(p.d_log_decay || p.d_dt) ? why : decays_refuse(p);
}

size_t workspace(const Problem& p) { return BackwardCall(p).bytes; }

void run(const Problem& given) {
  BackwardCall c(with_lengths(given));
  Problem& p = c.p;
  if (!p.d_o) {
    p.d_o = c.zeros;
    with_type(p.type, [&](auto e) { sum_heads<decltype(e)>(p, c.zeros, c.zeros, 1, 1, /*share=*/0, 1, p.V); });
  }
  GradientWalk of_q = queries_of(c), of_k = keys_of(c), of_v = values_of(c);
  if (c.is_cut) {
    make_states(c, of_q, of_v);
    for (GradientWalk* w : {&of_q, &of_k, &of_v}) {
      w->walk.warm_up = true;
      w->walk.before = c.after;
    }
    of_q.walk.before = c.before;
  }
  GradientWalks walks;
  if (c.queries) walks.push_back(of_q);
  if (c.keys) walks.push_back(of_k);
  const bool apart = c.values && c.decays && !p.d_dt;  // the walk for dv has no products
  if (c.values && !apart) walks.push_back(of_v);
  walk(c, walks);
  if (apart) walk_gradients(p, c.walks(), {of_v});

  if (c.decays) {
    start<DecayGradient>(
        p, dim3(unsigned(Segments{kCheckpoint}.slots(p) * p.Hs)), DecayGradient::kMaxThreads,
        DecayGradient::kSharedBytes,
        {p, given, c.states, c.gradients, c.x, c.y, c.u, c.slices, c.value_slices(), c.precise ? c.sums : nullptr});
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
  const BackwardCall c(p);
  const double chunks = double(std::min(c.cut.length, p.N)) / kChunk, n = double(tokens(p)), H = double(p.H);
  const double KV = double(p.K * p.V), walks = double(c.walks());
  const double again = n * H * type_bytes(p.type) * double(2 * p.K + 2 * p.V);  // operands of dk and dv
  const double flop = walks * chunk_flop(p) + (c.decays ? 2 * n * H * double(kChunk * p.K) + 4 * n * H * KV : 0) +
                      (c.precise ? 4 * n * H * KV : 0) + (c.is_cut ? 4 * n * H * KV : 0);
  const double blocks = double(Segments{c.cut.length}.slots(p)) * H * walks * double((std::max(p.K, p.V) + 63) / 64);
  return predict(p, {flop, again + double(c.bytes), /*depth=*/2 * chunks, /*launches=*/c.is_cut ? 6. : 3., blocks,
                     /*steps=*/(c.is_cut ? 1.6 : 1) * chunks, chunk_step_us(p)});
}

}  // namespace lc::cuda::backward
