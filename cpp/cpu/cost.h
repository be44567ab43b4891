// cost.h - what a call costs on this CPU: a model good enough to choose a method by.
#pragma once
#include <algorithm>

#include "../methods.h"
#include "simd.h"

namespace lc::LC_ISA {

// What one core of these instructions computes and moves in a microsecond, at the most.
constexpr double kFlopPerUs = kVectorBytes == 64 ? 110e3 : kVectorBytes == 32 ? 70e3 : 15e3;
constexpr double kBytesPerUs = 20e3;

LC_INLINE double type_bytes(Type t) { return t == Type::f64 ? 8 : t == Type::f32 ? 4 : 2; }

// Why a method that computes forward passes, and no more, does not serve a problem.
LC_INLINE const char* forward_only(const Problem& p) {
  return p.op == LC_DECODE     ? "decodes by recurrent only"
         : p.op == LC_BACKWARD ? "leaves gradients to chunk, whose serve every method"
                               : nullptr;
}

// Every operand read or written once.
LC_INLINE double least_bytes(const Problem& p) {
  const double n = double(tokens(p)), states = double(p.B * p.Hs) * double(p.K * p.V) * type_bytes(p.state_type);
  int64_t row = (p.Hq + p.Hk) * p.K + (p.Hv + p.H) * p.V;
  if (p.d_q) row += p.Hq * p.K;
  if (p.d_k) row += p.Hk * p.K;
  if (p.d_v) row += p.Hv * p.V;
  int whole = p.op == LC_DECODE ? 2 : 0;
  if (p.op != LC_DECODE)
    for (const View* state : {&p.initial_state, &p.final_state, &p.d_final_state, &p.d_initial_state})
      whole += bool(*state);
  return n * type_bytes(p.type) * double(row) + states * whole;
}

// Of one state.
LC_INLINE double state_bytes(const Problem& p) { return double(p.K * p.V) * (p.type == Type::f64 ? 8 : 4); }

// Tokens of one sequence; of packed ones on average, as their lengths may lie on a device.
LC_INLINE double mean_length(const Problem& p) { return double(tokens(p)) / double(std::max<int64_t>(p.B, 1)); }

// What a method does, see methods.h; tasks: pieces of work that cost something each, besides.
struct Work {
  double flop, extra_bytes, depth, tasks;
};

// flop at a fraction of the machine's rate, or the bytes, whichever takes longer, on so many workers.
LC_INLINE Cost predict(const Problem& p, const Work& work, double efficiency, int workers) {
  const double rate = kFlopPerUs * efficiency * (p.type == Type::f64 ? 0.5 : 1);
  const double least = least_bytes(p), bytes = least + work.extra_bytes;
  constexpr double kCallUs = 0.3, kTaskUs = 0.1, kWakeUs = 5;
  const double work_us = work.tasks * kTaskUs + std::max(work.flop / rate, bytes / kBytesPerUs);
  return {work.flop, least, bytes, work.depth, kCallUs + (workers > 1 ? kWakeUs : 0) + work_us / workers};
}

}  // namespace lc::LC_ISA
