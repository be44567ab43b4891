// chunk_backward.h - the gradients of every method, which the row `chunk` serves: on the CPU
// (chunk_backward.cpp) and on a GPU (chunk_backward.cu).
#pragma once
#include "../../methods.h"

#ifdef LC_ISA
namespace lc::LC_ISA::backward {

Cost cost(const Problem& p);
size_t workspace(const Problem& p);
void run(const Problem& p);

}  // namespace lc::LC_ISA::backward
#endif

namespace lc::cuda::backward {

const char* refuses(const Problem& p);
Cost cost(const Problem& p);
size_t workspace(const Problem& p);
void run(const Problem& p);

}  // namespace lc::cuda::backward
