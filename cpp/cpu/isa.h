// isa.h - the instruction sets of this build (isas.def) and the one that the CPU methods use. The
// methods are compiled once per set, each time into the namespace of the set's name.
#pragma once
#include "../conv.h"
#include "../methods.h"

namespace lc {

struct Isa {
  const char* name;
  bool (*runs_here)();   // whether this machine's processor has the set
  const Methods* table;  // the CPU methods, compiled for this set
  const Conv* conv;      // the causal convolution, compiled for this set
};

struct Isas {
  const Isa* first;
  const Isa* last;
  const Isa* begin() const { return first; }
  const Isa* end() const { return last; }
};

Isas isas();  // of this build, the best one last

// The set in use: the one that LEETCORE_ISA names, or else the best one that runs here. It is
// decided once. Throws Error if the named set cannot run here.
const Isa& isa();

}  // namespace lc
