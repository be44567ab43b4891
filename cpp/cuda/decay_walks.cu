// decay_walks.cu - walks for dq and dk that also give what d log_decay is made of: see gradient_walks.h.
#include "gradient_walks.h"

namespace lc::cuda {

using Launcher = GradientLauncher<Aim::decays>;

const char* decays_refuse(const Problem& p) { return Launcher{p}.refuses(); }

void walk_decays(const Problem& p, int passes, const GradientWalks& walks) { Launcher{p}.run(passes, walks); }

int decay_slices(const Problem& p) { return Launcher{p}.slices(p.K, /*wide=*/false).count; }

}  // namespace lc::cuda
