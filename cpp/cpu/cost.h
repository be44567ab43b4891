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

// Every operand read or written once.
LC_INLINE double least_bytes(const Problem& p) {
  const double n = double(tokens(p)), states = double(p.B * p.Hs) * double(p.K * p.V) * type_bytes(p.state_type);
  return n * type_bytes(p.type) * double((p.Hq + p.Hk) * p.K + (p.Hv + p.H) * p.V) +
         states * (p.op == LC_DECODE ? 2 : int(bool(p.initial_state)) + int(bool(p.final_state)));
}

// flop at a fraction of the machine's rate, or the bytes, whichever takes longer, on so many workers; and what each of
// `tasks` pieces of work costs besides.
LC_INLINE Cost predict(const Problem& p, double flop, double efficiency, int workers, double tasks) {
  const double rate = kFlopPerUs * efficiency * (p.type == Type::f64 ? 0.5 : 1), bytes = least_bytes(p);
  constexpr double kTaskUs = 0.1, kWakeUs = 5;
  return {flop, bytes,
          (workers > 1 ? kWakeUs : 0) + (tasks * kTaskUs + std::max(flop / rate, bytes / kBytesPerUs)) / workers};
}

}  // namespace lc::LC_ISA
