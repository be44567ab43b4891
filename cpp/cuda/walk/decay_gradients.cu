// decay_gradients.cu - walks for dq and dk that also write the products for d log_decay.
#include "launch.h"

namespace lc::cuda {

using Launcher = GradientLauncher<Aim::decays>;

const char* decays_refuse(const Problem& p) { return Launcher{p}.refuses(); }

void walk_decays(const Problem& p, int concurrent, const GradientWalks& walks) { Launcher{p}.run(concurrent, walks); }

int decay_slices(const Problem& p, int64_t columns) { return Launcher{p}.slices(columns, /*wide=*/false).count; }

}  // namespace lc::cuda
