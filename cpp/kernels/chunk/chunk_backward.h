// chunk_backward.h - the gradients of every method, as the row `chunk` serves them (chunk_backward.cpp).
#pragma once
#include "../../methods.h"

namespace lc::LC_ISA::backward {

Cost cost(const Problem& p);
size_t workspace(const Problem& p);
void run(const Problem& p);

}  // namespace lc::LC_ISA::backward
