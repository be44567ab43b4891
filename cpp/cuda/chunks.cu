// chunks.cu - launches chunks.cuh with the configuration that suits the problem and the device.
#include "chunks.cuh"

#include "cost.h"
#include "launch.h"

namespace lc::cuda {
namespace {

constexpr int64_t kMostKeyDim = 256, kLeastSlice = 32;

// f(kernel) with the one for p and for so many columns of V a warp.
template <class E, class X, class F>
void with_size(const Problem& p, bool wide, F&& f) {
  if constexpr (is_16_bit<E>) {
    if (wide && p.K <= 64) return f(ChunkWalk<E, X, 64, 32>());
    if constexpr (is_16_bit<X>)
      if (wide && p.K <= 128) return f(ChunkWalk<E, X, 128, 32>());
  }
  if (p.K <= 64) return f(ChunkWalk<E, X, 64, 16>());
  if (p.K <= 128) return f(ChunkWalk<E, X, 128, 16>());
  f(ChunkWalk<E, X, 256, 16>());
}
template <class F>
void with_kernel(const Problem& p, bool wide, F&& f) {
  if (p.type == Type::bf16) return with_size<bf16, bf16>(p, wide, f);
  if (p.type == Type::f16) return with_size<f16, tf32>(p, wide, f);
  if (p.tf32) return with_size<float, tf32>(p, wide, f);
  with_size<float, float>(p, wide, f);
}

// How the columns of V are dealt out.
struct Slices {
  bool wide;           // 32 columns a warp
  int columns, count;  // of one slice; slices
};
Slices slice(const Problem& p, int64_t heads) {
  const int64_t processors = limits(p.device.id).processors;
  const bool wide = p.type != Type::f32 && p.K <= (p.type == Type::bf16 ? 128 : 64) && p.V > 64 &&
                    heads * ((p.V + 127) / 128) >= processors;
  const int64_t unit = wide ? 32 : 16;
  int64_t count = (p.V + 4 * unit - 1) / (4 * unit);
  while (!wide && heads * count < processors && p.V > count * kLeastSlice) ++count;
  const int64_t columns = ((p.V + count - 1) / count + unit - 1) / unit * unit;
  return {wide, int(columns), int((p.V + columns - 1) / columns)};
}

bool aligned(const View& w, int bytes) {
  const auto multiple = [&](int64_t x) { return x * bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(w.data) % 16 == 0 && multiple(w.stride[0]) && multiple(w.stride[1]) &&
         multiple(w.stride[2]);
}

// The deepest ring that leaves room for as many blocks as a shallow one; 0: there is no room for one.
template <class Kernel>
int stages(const Problem& p) {
  const Limits& l = limits(p.device.id);
  const auto blocks = [&](int n) {
    const int bytes = Kernel::shared_bytes(n);
    return bytes > l.shared_block ? 0 : std::min(Kernel::kMinBlocks, l.shared_processor / (bytes + 1024));
  };
  if (!blocks(1)) return 0;
  if (!blocks(2)) return 1;
  return blocks(3) == blocks(2) ? 3 : 2;
}

// Blocks of a launch, but for their slices.
int64_t heads_of(const Problem& p, const Walk& w) {
  const int64_t slots = w.segment < 0 ? Segments{w.length}.slots(p) : p.B;
  return slots * (w.alone ? p.Hs : p.H / heads_per_block(p));
}

}  // namespace

int64_t walk_blocks(const Problem& p, const Walk& w) {
  const int64_t heads = heads_of(p, w);
  return heads * slice(p, heads).count;
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
  if (const char* why = forward_only(p)) return why;
  if (p.type == Type::f64) return "float64 has no matrix unit that it uses";
  if (p.K > kMostKeyDim) return "K is over 256";
  bool fits = false;
  with_kernel(p, false, [&](auto kernel) { fits = stages<decltype(kernel)>(p) > 0; });
  return fits ? nullptr : "K is too large for the shared memory of this device";
}

void walk(const Problem& p, const Walk& w) {
  // Where blocks of one state would write what others still read, its q heads come one after the other.
  const int times = w.alone ? 1 : heads_per_block(p), parts = w.alone || times > 1 ? 1 : int(group(p));
  const int64_t heads = heads_of(p, w);
  const Slices slices = slice(p, heads);
  with_kernel(p, slices.wide, [&](auto kernel) {
    using Kernel = decltype(kernel);
    const int bytes = p.type == Type::f32 ? 4 : 2, depth = stages<Kernel>(p);
    const int warps = slices.columns / (slices.wide ? 32 : 16);
    for (int i = 0; i < times; ++i)
      start<Kernel>(p, dim3(unsigned(heads * slices.count)), 32 * warps, Kernel::shared_bytes(depth),
                    {p, w, parts, i, i + 1 == times, slices.columns, slices.count, depth, aligned(p.q, bytes),
                     aligned(p.k, bytes), aligned(p.v, bytes), aligned(p.o, bytes)});
  });
}

}  // namespace lc::cuda
