// gradients.cu - walks for dq, dk and dv.
#include "launch.h"

namespace lc::cuda {

using Launcher = GradientLauncher<Aim::gradients>;

const char* gradients_refuse(const Problem& p) { return Launcher{p}.refuses(); }

void walk_gradients(const Problem& p, int concurrent, const GradientWalks& walks) {
  Launcher{p}.run(concurrent, walks);
}

}  // namespace lc::cuda
