// cost.h - the sizes of a problem that predictions of its cost start from, on any device.
#pragma once
#include <algorithm>

#include "problem.h"

namespace lc {

// The work that pays for one more worker: about 10 us of one core, since waking a worker costs some
// microseconds.
inline constexpr double kFlopPerWorker = 1e6;

LC_INLINE double type_bytes(Type t) { return t == Type::f64 ? 8 : t == Type::f32 ? 4 : 2; }

// The bytes of all operands, each read or written once.
LC_INLINE double least_bytes(const Problem& p) {
  const double n = double(tokens(p)), states = double(p.B * p.Hs) * double(p.K * p.V) * type_bytes(p.state_type);
  int64_t row = (p.Hq + p.Hk) * p.K + (p.Hv + p.H) * p.V;
  if (p.dt) row += p.Hs;
  if (p.gate) row += p.H * p.V;
  if (p.d_q) row += p.Hq * p.K;
  if (p.d_k) row += p.Hk * p.K;
  if (p.d_v) row += p.Hv * p.V;
  int whole = p.op == LC_DECODE ? 2 : 0;
  if (p.op != LC_DECODE)
    for (const View* state : {&p.initial_state, &p.final_state, &p.d_final_state, &p.d_initial_state})
      whole += bool(*state);
  return n * type_bytes(p.type) * double(row) + states * whole;
}

// The bytes of one state in the accumulator's type.
LC_INLINE double state_bytes(const Problem& p) { return double(p.K * p.V) * (p.type == Type::f64 ? 8 : 4); }

// The tokens of one sequence. For packed sequences it is the average, as their lengths may be on a
// device.
LC_INLINE double mean_length(const Problem& p) { return double(tokens(p)) / double(std::max<int64_t>(p.B, 1)); }

}  // namespace lc
