// forward.cu - launches walks for outputs, and predicts what they cost.
#include "../cost.h"
#include "launch.h"

namespace lc::cuda {
namespace {

bool is_wide(const Problem& p, int64_t heads) {
  return p.type != Type::f32 && may_be_wide(Aim::outputs, p.type == Type::bf16, p.K) && p.V > 64 &&
         heads * ((p.V + 127) / 128) >= limits(p.device.id).processors;
}

Slices slices_of(const Problem& p, int64_t heads) {
  return slice(p.V, is_wide(p, heads), /*two_warps=*/false, heads, limits(p.device.id).processors);
}

}  // namespace

int64_t segment_chunks(const Problem& p, int64_t blocks) {
  constexpr int64_t kLeast = 4;
  const int64_t chunks = (p.N + kChunk - 1) / kChunk;
  const int64_t wanted = std::max<int64_t>(1, 2 * limits(p.device.id).processors / std::max<int64_t>(1, blocks));
  return std::max(kLeast, (chunks + wanted - 1) / wanted);
}

int64_t walk_blocks(const Problem& p, const Walk& w) {
  const int64_t heads = heads_of(p, w);
  return heads * slices_of(p, heads).count;
}

double chunk_flop(const Problem& p) {
  const double K = double(p.K), V = double(p.V);
  return double(tokens(p)) * double(p.H) * ((kChunk + 1) * (K + V) + 4 * K * V);
}

double chunk_step_us(const Problem& p) {
  const double columns = p.K <= 64 ? 64 : p.K <= 128 ? 128 : 256;
  return 0.3 + columns * (p.type == Type::bf16 ? 0.005 : p.type == Type::f16 || p.tf32 ? 0.01 : 0.03);
}

const char* walk_refuses(const Problem& p) {
  if (p.K > kMostKeyDim) return "K is over 256";
  bool fits = false;
  with_kernel<Aim::outputs>(p, p.K, false,
                            [&](auto kernel) { fits = stages<decltype(kernel)>(limits(p.device.id)) > 0; });
  return fits ? nullptr : "K is too large for the shared memory of this device";
}

void walk(const Problem& p, const Walk& w) {
  // If a block would write a state that other blocks still read, the q heads of a state run one
  // after another.
  const int times = w.states_only ? 1 : heads_per_block(p);
  const int parts = w.states_only || times > 1 ? 1 : int(group(p));
  const int64_t heads = heads_of(p, w);
  const bool wide = is_wide(p, heads);
  const Slices slices = slices_of(p, heads);
  with_kernel<Aim::outputs>(p, p.K, wide, [&](auto kernel) {
    using Kernel = decltype(kernel);
    const int depth = stages<Kernel>(limits(p.device.id));
    for (int i = 0; i < times; ++i) {
      const Task task = task_of(p, w, slices, parts, i, i + 1 == times);
      start<Kernel>(p, dim3(task.blocks), threads(slices, wide), Kernel::Shape::shared_bytes(depth), {{task}, depth});
    }
  });
}

}  // namespace lc::cuda
