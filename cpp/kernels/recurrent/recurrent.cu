// recurrent.cu - GPU: launches the kernels of recurrent.cuh and decode.cuh.
//
//   forward: a block for each (sequence, state, part of its q heads, slice of V); B N H 8.5 K V
//   flop
//   decode: a block for each (sequence, state, slice of V); B N (2 H + 3 Hs) K V flop
//   Katharopoulos et al. 2020, arXiv:2006.16236
#include "recurrent.cuh"

#include "../../cuda/cost.h"
#include "../../cuda/launch.h"
#include "../../cuda/lengths.h"
#include "decode.cuh"

namespace lc {
namespace {

using namespace cuda;

// ---- forward ------------------------------------------------------------------------------------

void forward(const Problem& given) {
  const Problem p = with_lengths(given);
  const int heads = heads_per_block(p);
  with_type(p.type, [&](auto e) {
    using Kernel = RecurrentForward<decltype(e)>;
    const int64_t blocks = p.B * p.Hs * (group(p) / heads) * Kernel::slices(p);
    start<Kernel>(p, dim3(unsigned(blocks)), Kernel::kMaxThreads, int(Kernel::shared_bytes(p)), {p, heads});
  });
}

// ---- decode -------------------------------------------------------------------------------------

constexpr int kBlocksPerProcessor = 4;  // that decode aims for
constexpr int64_t kLeastColumns = 2;    // groups of columns of a slice in decode: memory moves 32 bytes at least

// Calls f(kernel) with the kernel for the types of p.
template <class E, class F>
void with_pool(const Problem& p, F& f) {
  with_type(p.state_type, [&](auto s) {
    using P = decltype(s);
    if constexpr (std::is_same_v<E, double> == std::is_same_v<P, double>)
      is_transposed(p, p.final_state) ? f(Decode<E, P, true>()) : f(Decode<E, P, false>());
  });
}
template <class F>
void with_decode(const Problem& p, F&& f) {
  with_type(p.type, [&](auto e) { with_pool<decltype(e)>(p, f); });
}

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Slices as wide as a block has threads for, or narrower if that would leave processors without
// work.
template <class E, class P, bool kTransposed>
typename Decode<E, P, kTransposed>::Params plan(const Decode<E, P, kTransposed>&, const Problem& p) {
  using Kernel = Decode<E, P, kTransposed>;
  const int64_t groups = ceil_div(p.V, Kernel::kColumns), row_groups = ceil_div(p.K, Kernel::kRows);
  const int64_t blocks = kBlocksPerProcessor * limits(p.device.id).processors;
  const int64_t enough = ceil_div(blocks, std::max<int64_t>(1, p.B * p.Hs));
  const int64_t most = std::max<int64_t>(1, Kernel::kMaxThreads / row_groups);
  const int64_t columns = std::min(most, std::max(kLeastColumns, groups / enough));
  typename Kernel::Params a = {};
  a.p = p;
  a.columns = int(ceil_div(groups, ceil_div(groups, columns)));  // slices of equal width
  a.slices = unsigned(ceil_div(groups, a.columns));
  a.row_groups = int(row_groups);
  a.heads = unsigned(group(p));
  a.q_share = unsigned(p.H / p.Hq);
  a.k_share = unsigned(p.Hs / p.Hk);
  a.v_share = unsigned(p.Hs / p.Hv);
  a.pairs = int(std::min<int64_t>(Kernel::kPairs, p.N * group(p)));
  const View& pool = p.final_state;
  a.whole = (kTransposed ? p.K : p.V) % Kernel::kVector == 0 && reinterpret_cast<uintptr_t>(pool.data) % 16 == 0;
  for (int i : {0, 1, kTransposed ? 3 : 2}) a.whole = a.whole && pool.stride[i] % Kernel::kVector == 0;
  return a;
}

void decode(const Problem& p) {
  with_decode(p, [&](auto kernel) {
    using Kernel = decltype(kernel);
    const auto params = plan(kernel, p);
    start<Kernel>(p, dim3(unsigned(p.B * p.Hs) * params.slices), (params.threads() + 31) / 32 * 32,
                  int(params.shared_bytes()), params);
  });
}

// ---- the row ------------------------------------------------------------------------------------

void run(const Problem& p) { p.op == LC_DECODE ? decode(p) : forward(p); }

const char* refuses(const Problem& p) {
  bool fits = true;
  const int most = limits(p.device.id).shared_block;
  if (p.op == LC_DECODE)
    with_decode(p, [&](auto kernel) {
      const auto params = plan(kernel, p);
      fits = params.threads() <= kernel.kMaxThreads && params.shared_bytes() <= most;
    });
  else
    with_type(p.type, [&](auto e) { fits = RecurrentForward<decltype(e)>::shared_bytes(p) <= most; });
  return fits ? nullptr : "K is too large for the shared memory of this device";
}

Cost cost(const Problem& p) {
  const double n = double(tokens(p)), KV = double(p.K * p.V), length = mean_length(p);
  if (p.op == LC_DECODE) {
    double blocks = 0;
    with_decode(p, [&](auto kernel) { blocks = double(p.B * p.Hs) * plan(kernel, p).slices; });
    return predict(p,
                   {n * KV * (2. * double(p.H) + 3. * double(p.Hs)), /*extra_bytes=*/0, /*depth=*/length,
                    /*launches=*/1, blocks, /*steps=*/1, /*step_us=*/2 + 0.2 * length * double(group(p))},
                   kBlocksPerProcessor);
  }
  const double blocks = double(p.B * p.H) * double(RecurrentForward<float>::slices(p));
  return predict(p, {8.5 * n * double(p.H) * KV, /*extra_bytes=*/0, /*depth=*/length, /*launches=*/1, blocks,
                     /*steps=*/std::ceil(length / 32), /*step_us=*/1 + 0.06 * double(p.K)});
}

size_t workspace(const Problem& p) { return p.op == LC_DECODE ? 0 : lengths_bytes(p); }

}  // namespace

extern const Method recurrent_cuda = {
    {"recurrent", "cuda", "32 tokens at a time, each number of the state by a scan over a warp; decodes in place",
     "Katharopoulos et al. 2020, arXiv:2006.16236"},
    {Feature::forward | Feature::decode | Feature::state_indices | Feature::short_states | kAllTypes | kAllDecays |
     kSequences | kMamba2},
    refuses,
    cost,
    workspace,
    run};

}  // namespace lc
