// lengths.cu - launches the kernel of lengths.cuh.
#include "lengths.h"

#include <cmath>

#include "launch.h"
#include "lengths.cuh"

namespace lc::cuda {
namespace {

size_t number_bytes(const Problem& p) { return p.type == Type::f64 ? sizeof(double) : sizeof(float); }

// Bytes of one number per token and state head.
size_t array_bytes(const Problem& p) { return (size_t(tokens(p) * p.Hs) * number_bytes(p) + 255) / 256 * 256; }

template <class T>
void make(const Problem& p, void* lengths, void* log_decays) {
  using Kernel = TokenLengths<T>;
  const int64_t blocks = batch(p) * Kernel::blocks_of(p.Hs) * Kernel::blocks_of(p.N);
  start<Kernel>(p, dim3(unsigned(blocks)), Kernel::kMaxThreads, Kernel::kSharedBytes,
                {p, static_cast<T*>(lengths), static_cast<T*>(log_decays)});
}

}  // namespace

size_t lengths_bytes(const Problem& p) { return p.dt ? 2 * array_bytes(p) : 0; }

Problem with_lengths(const Problem& p) {
  if (!p.dt) return p;
  auto* memory = static_cast<unsigned char*>(p.workspace);
  unsigned char* log_decays = memory + array_bytes(p);
  p.type == Type::f64 ? make<double>(p, memory, log_decays) : make<float>(p, memory, log_decays);

  Problem r = p;
  r.dt = {memory, {p.Hs * p.N, p.N, 1, 1}};
  r.log_decay = {log_decays, {p.Hs * p.N, p.N, 1, 1}};
  r.dt_type = r.decay_type = p.type == Type::f64 ? Type::f64 : Type::f32;
  r.dt_bias = {};
  r.softplus = false;
  r.dt_min = 0;
  r.dt_max = HUGE_VAL;
  r.workspace = memory + lengths_bytes(p);
  return r;
}

}  // namespace lc::cuda
