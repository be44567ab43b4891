// cost.h - predicts what a call costs on this CPU, well enough to choose a method.
#pragma once
#include <algorithm>

#include "../cost.h"
#include "../methods.h"
#include "simd.h"

namespace lc::LC_ISA {

// The most that one core computes and moves in a microsecond with these instructions.
constexpr double kFlopPerUs = kVectorBytes == 64 ? 110e3 : kVectorBytes == 32 ? 70e3 : 15e3;
constexpr double kBytesPerUs = 20e3;

// What a method does; methods.h defines the terms. Each task costs a fixed time in addition to its
// flop and bytes.
struct Work {
  double flop, extra_bytes, depth, tasks;
};

// The time is that of the flop, at a fraction of the machine's rate, or that of the bytes,
// whichever is longer. It is divided among the workers.
LC_INLINE Cost predict(const Problem& p, const Work& work, double efficiency, int workers) {
  const double rate = kFlopPerUs * efficiency * (p.type == Type::f64 ? 0.5 : 1);
  const double least = least_bytes(p), bytes = least + work.extra_bytes;
  constexpr double kCallUs = 0.3, kTaskUs = 0.1, kWakeUs = 5;
  const double compute = work.flop / rate, memory = bytes / kBytesPerUs;
  const double fixed = kCallUs + (workers > 1 ? kWakeUs : 0), each = work.tasks * kTaskUs;
  const double most = std::max(compute, memory);
  const char* bound = fixed * workers + each > most ? "overhead" : compute > memory ? "compute" : "memory";
  return {work.flop, least, bytes, work.depth, fixed + (each + most) / workers, bound};
}

}  // namespace lc::LC_ISA
