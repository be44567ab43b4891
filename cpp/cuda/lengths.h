// lengths.h - lengths of tokens for the kernels of a call.
#pragma once
#include "../problem.h"

namespace lc::cuda {

// A call with dt as a call with a log-decay and a length per token. `with_lengths` starts the
// kernel that makes both, in the first lengths_bytes(p) bytes of the workspace, and returns the
// problem that the other kernels of the call get: dt has the lengths, in the type of sums, and the
// workspace begins after them. A call without dt stays as it is.
size_t lengths_bytes(const Problem& p);
Problem with_lengths(const Problem& p);

}  // namespace lc::cuda
