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

#include "../../cuda/cost.h"
#include "../../cuda/scan_states.cuh"
#include "../../cuda/walks.h"
#include "../../gradient.h"
#include "chunk_backward.h"

namespace lc::cuda::backward {
namespace {

int64_t rows(const Problem& p) { return p.cu_bits ? 1 : p.B; }

// A call: its passes, and where in the workspace they find what.
struct Call {
  Problem p;
  bool decays, queries, keys, values;  // d log_decay is asked for; the passes that there are
  bool wide;
  Slices of_key, of_value;  // the columns of dq and dk, of dv
  Segments cut;
  bool is_cut;
  size_t bytes = 0;
  View zeros, d_q, d_k, d_v, d_initial_state;
  double *log2_before, *log2_after, *sums;
  float *before, *after, *states, *gradients, *x, *y;

  explicit Call(const Problem& problem) : p(problem) {
    decays = bool(p.d_log_decay);
    queries = p.d_q || decays, keys = p.d_k || decays, values = p.d_v || p.d_initial_state;
    const int64_t processors = limits(p.device.id).processors, kv = std::max(p.K, p.V);
    const int64_t passes = int(queries) + int(keys) + int(values), heads = rows(p) * p.H * passes;
    wide = may_be_wide(p.type, kv) && std::min(p.K, p.V) > 64 && heads * ((kv + 127) / 128) >= processors;
    const bool two_warps = p.type == Type::f32 && kv > 64;
    of_key = slice(p.K, wide, two_warps, heads, processors);
    of_value = slice(p.V, wide, two_warps, heads, processors);

    // Of segments as many as fill the device about twice. States are kept at the ends of some.
    const int64_t chunks = (p.N + kChunk - 1) / kChunk, every = kKept / kChunk;
    const int64_t blocks = rows(p) * p.H * (int(queries) * of_key.count + int(keys) * of_key.count + int(values) * of_value.count);
    const int64_t wanted = std::max<int64_t>(1, 2 * processors / std::max<int64_t>(1, blocks));
    int64_t length = std::max<int64_t>(4, (chunks + wanted - 1) / wanted);
    if (length > 4) length = length <= 8 ? 8 : (length + every - 1) / every * every;
    is_cut = length < chunks;
    cut = {(is_cut ? length : chunks + 1) * kChunk};

    const int64_t size = p.K * p.V, ends = is_cut ? cut.slots(p) : 0, kept = decays ? Segments{kKept}.slots(p) : 0;
    const bool shares = decays && p.decay == Decay::constant;
    char* base = static_cast<char*>(p.workspace);
    const auto take = [&](auto*& to, int64_t numbers) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(base + bytes);
      bytes += (size_t(numbers) * sizeof(*to) + 15) / 16 * 16;
    };
    take(sums, shares ? kept * p.Hs : 0);
    take(log2_before, queries ? ends * p.Hs : 0), take(before, queries ? ends * p.Hs * size : 0);
    take(log2_after, ends * p.H), take(after, ends * p.H * size);
    take(states, kept * p.Hs * size), take(gradients, kept * p.H * size);
    take(x, decays ? of_key.count * p.H * tokens(p) : 0), take(y, decays ? of_key.count * p.H * tokens(p) : 0);
    // Gradients of every q head, dense, where fewer are asked for.
    const auto each = [&](const View& asked, int64_t b, int64_t own_heads, int64_t n, int64_t columns, int width) {
      if (!asked || own_heads == p.H) return asked;
      uint8_t* memory;
      take(memory, b * p.H * n * columns * width);
      return View{memory, {p.H * n * columns, n * columns, columns, 1}};
    };
    const int width = int(type_bytes(p.type));
    d_q = each(p.d_q, rows(p), p.Hq, p.N, p.K, width), d_k = each(p.d_k, rows(p), p.Hk, p.N, p.K, width);
    d_v = each(p.d_v, rows(p), p.Hv, p.N, p.V, width);
    d_initial_state = each(p.d_initial_state, p.B, p.Hs, p.K, p.V, 4);
    uint8_t* zero_row;
    take(zero_row, p.d_o ? 0 : p.V * width);
    zeros = {zero_row, {}};
  }
};

void backward_in_time(Problem& r, Walk& w) {
  for (View* view : {&r.q, &r.k, &r.v, &r.o, &r.log_decay, &w.factor}) view->stride[2] = -view->stride[2];
  w.backward = true;
}

// The three passes: what they read and write, of whole sequences.
struct Role {
  Problem p;
  Walk w;
};
Role queries_of(const Call& c) {
  Role r{of_queries(c.p), {c.cut.length}};
  r.p.o = c.d_q, r.w.turned = true;
  if (c.decays) r.w.factor = c.p.q, r.w.factor_heads = c.p.Hq, r.w.products = c.x, r.w.kept = c.states;
  return r;
}
Role keys_of(const Call& c) {
  Role r{of_keys(c.p), {c.cut.length}};
  r.p.o = c.d_k, r.p.initial_state = c.p.d_final_state, r.w.turned = true, r.w.share = group(c.p);
  if (c.decays) r.w.factor = c.p.k, r.w.factor_heads = c.p.Hk, r.w.products = c.y, r.w.kept = c.gradients;
  backward_in_time(r.p, r.w);
  return r;
}
Role values_of(const Call& c) {
  Role r{of_values(c.p), {c.cut.length}};
  r.p.o = c.d_v, r.p.initial_state = c.p.d_final_state, r.p.final_state = c.d_initial_state, r.w.share = group(c.p);
  backward_in_time(r.p, r.w);
  return r;
}

void launch(const Call& c, std::initializer_list<std::pair<Role, Slices>> roles) {
  with_kernel<true>(c.p, std::max(c.p.K, c.p.V), c.wide, [&](auto kernel) {
    using Kernel = decltype(kernel);
    typename Kernel::Params params{};
    params.stages = stages<Kernel>(limits(c.p.device.id));
    unsigned blocks = 0;
    int columns = 0, i = 0;
    for (const auto& [role, slices] : roles) {
      const int parts = role.w.alone ? 1 : int(group(role.p));
      params.pass[i] = pass_of(role.p, role.w, slices, parts, 0, /*writes=*/true);
      blocks = std::max(blocks, params.pass[i++].blocks), columns = std::max(columns, slices.columns);
    }
    start<Kernel>(c.p, dim3(Kernel::kPasses * blocks), threads({columns, 1}, c.wide),
                  Kernel::shared_bytes(params.stages), params);
  });
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
  if (p.type == Type::f64) return "has no gradients of float64 on a GPU";
  if (std::max(p.K, p.V) > kMostKeyDim) return "its gradients want K and V up to 256";
  bool fits = false;
  with_kernel<true>(p, std::max(p.K, p.V), false,
                    [&](auto kernel) { fits = stages<decltype(kernel)>(limits(p.device.id)) > 0; });
  return fits ? nullptr : "K or V is too large for the shared memory of this device";
}

size_t workspace(const Problem& p) { return Call(p).bytes; }

void run(const Problem& problem) {
  Call c(problem);
  Problem& p = c.p;
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    if (!p.d_o) {
      sum_heads<E>(p, c.zeros, c.zeros, 1, 1, 0, 1, p.V);
      p.d_o = c.zeros;
    }
  });
  Role of_q = queries_of(c), of_k = keys_of(c), of_v = values_of(c);
  const auto if_there = [](bool there, const Slices& slices) { return there ? slices : Slices{16, 0}; };
  if (c.is_cut) {
    Role states = of_q, gradients = of_v;
    for (Role* r : {&states, &gradients}) r->w.alone = r->w.warm_up = true, r->w.products = r->w.kept = nullptr;
    states.w.after = c.before, states.w.log2 = c.log2_before;
    gradients.w.after = c.after, gradients.w.log2 = c.log2_after;
    const bool back = c.keys || c.values;
    launch(c, {{states, if_there(c.queries, c.of_key)}, {gradients, if_there(back, c.of_value)}});
    if (c.queries) scan_states(states.p, states.w);
    if (back) scan_states(gradients.p, gradients.w);
    for (Role* r : {&of_q, &of_k, &of_v}) r->w.warm_up = true, r->w.before = c.after;
    of_q.w.before = c.before;
  }
  launch(c, {{of_q, if_there(c.queries, c.of_key)},
             {of_k, if_there(c.keys, c.of_key)},
             {of_v, if_there(c.values, c.of_value)}});
  if (c.decays) {
    const bool shares = p.decay == Decay::constant;
    const int64_t blocks = Segments{kKept}.slots(p) * p.Hs;
    start<DecayGradient>(p, dim3(unsigned(blocks)), DecayGradient::kMaxThreads, DecayGradient::kSharedBytes,
                         {p, c.states, c.gradients, c.x, c.y, c.of_key.count, shares ? c.sums : nullptr});
    const bool by_row = p.d_log_decay.stride[0], by_head = p.d_log_decay.stride[1];
    if (shares)
      start<SumDecays>(p, dim3(by_row ? unsigned(p.B) : 1, by_head ? unsigned(p.Hs) : 1), SumDecays::kMaxThreads,
                       SumDecays::kMaxThreads * 8, {p, c.sums});
  }
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    if (p.d_q && p.Hq < p.H) sum_heads<E>(p, c.d_q, p.d_q, rows(p), p.Hq, p.H / p.Hq, p.N, p.K);
    if (p.d_k && p.Hk < p.H) sum_heads<E>(p, c.d_k, p.d_k, rows(p), p.Hk, p.H / p.Hk, p.N, p.K);
    if (p.d_v && p.Hv < p.H) sum_heads<E>(p, c.d_v, p.d_v, rows(p), p.Hv, p.H / p.Hv, p.N, p.V);
  });
  if (p.d_initial_state && p.Hs < p.H)
    sum_heads<float>(p, c.d_initial_state, p.d_initial_state, p.B, p.Hs, group(p), p.K, p.V);
}

Cost cost(const Problem& p) {
  const Call c(p);
  Walk w;
  w.length = c.cut.length;
  const double chunks = double(std::min(c.cut.length, p.N)) / kChunk, n = double(tokens(p)), H = double(p.H);
  const double KV = double(p.K * p.V), passes = double(int(c.queries) + int(c.keys) + int(c.values));
  const double again = n * H * type_bytes(p.type) * double(2 * p.K + 2 * p.V);  // dk's and dv's operands once more
  const double flop = passes * chunk_flop(p) + (c.decays ? 2 * n * H * double(kChunk * p.K) : 0) +
                      (c.is_cut ? 4 * n * H * KV : 0);
  const double blocks = double(heads_of(p, w)) * (passes - double(c.values)) * c.of_key.count +
                        double(heads_of(p, w)) * double(c.values) * c.of_value.count;
  return predict(p, {flop, again + double(c.bytes), /*depth=*/2 * chunks, /*launches=*/c.is_cut ? 6. : 3., blocks,
                     /*steps=*/(c.is_cut ? 1.6 : 1) * chunks, chunk_step_us(p)});
}

}  // namespace lc::cuda::backward
