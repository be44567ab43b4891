// launch.h - shared by launchers (kernels/*/*.cu): a run-time type as a template argument, and a
// checked launch.
#pragma once
#include "../methods.h"
#include "../simt/simt.h"
#include "device.h"

namespace lc::cuda {

using namespace simt;

// Calls f(E()) with the C++ type of a Type.
template <class F>
void with_type(Type type, F&& f) {
  switch (type) {
    case Type::f64:
      return f(double());
    case Type::f32:
      return f(float());
    case Type::f16:
      return f(f16());
    case Type::bf16:
      return f(bf16());
  }
}

// q heads of one block: one, or all q heads of a state that is updated in place, since no block may
// write the state while another block reads it.
inline int heads_per_block(const Problem& p) {
  const bool in_place = p.initial_state && p.initial_state.data == p.final_state.data;
  return in_place ? int(group(p)) : 1;
}

// Launches kernel K on the problem's stream. Does nothing for an empty grid.
template <class K>
void start(const Problem& p, dim3 grid, int block, int smem, const typename K::Params& params) {
  if (!grid.x || !grid.y || !grid.z) return;
  if (const char* why = launch<K>(grid, block, smem, static_cast<Stream>(p.stream), params))
    launch_failed(p, K::kName, why);
}

}  // namespace lc::cuda
