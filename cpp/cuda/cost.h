// cost.h - predicts the cost of a call on a GPU, to choose a method if there is no measurement.
#pragma once
#include <cmath>

#include "../cost.h"
#include "../methods.h"
#include "device.h"

namespace lc::cuda {

// The work of a method (see methods.h), and its launches: each block takes `steps` steps, one after
// another.
struct Work {
  double flop, extra_bytes, depth;
  double launches, blocks, steps, step_us;
};

// `resident` is the largest number of blocks that run on one processor at once.
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
