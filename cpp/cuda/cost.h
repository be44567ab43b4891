// cost.h - what a call costs on a GPU: a model good enough to choose a method by, until one is measured.
#pragma once
#include <cmath>

#include "../cost.h"
#include "../methods.h"
#include "device.h"

namespace lc::cuda {

// What a method does, see methods.h, and how: blocks of which each takes so many steps, one after the other.
struct Work {
  double flop, extra_bytes, depth;
  double launches, blocks, steps, step_us;
};

// Blocks of one processor run beside one another; `resident` of them at the most.
inline Cost predict(const Problem& p, const Work& work, double resident = 2) {
  const Limits& l = limits(p.device.id);
  constexpr double kLaunchUs = 3;
  const double least = least_bytes(p), bytes = least + work.extra_bytes;
  const double waves = std::ceil(work.blocks / (l.processors * resident));
  const double compute = waves * work.steps * work.step_us, memory = bytes / l.bytes_per_us;
  const double fixed = kLaunchUs * work.launches, most = std::max(compute, memory);
  const char* bound = fixed > most ? "overhead" : compute > memory ? "compute" : "memory";
  return {work.flop, least, bytes, work.depth, fixed + most, bound};
}

}  // namespace lc::cuda
