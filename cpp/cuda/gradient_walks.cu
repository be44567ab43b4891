// gradient_walks.cu - walks for dq, dk and dv: see gradient_walks.h.
#include "gradient_walks.h"

namespace lc::cuda {

using Launcher = GradientLauncher<Aim::gradients>;

const char* gradients_refuse(const Problem& p) { return Launcher{p}.refuses(); }

void walk_gradients(const Problem& p, int passes, const GradientWalks& walks) { Launcher{p}.run(passes, walks); }

}  // namespace lc::cuda
