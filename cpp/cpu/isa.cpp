#include "isa.h"

#include <iterator>
#include <string>

#include "../environment.h"
#include "../problem.h"

namespace lc {

#define ISA(name, needs, flags) \
  namespace name {              \
  extern const Methods table;   \
  extern const Conv conv;       \
  }
#include "isas.def"
#undef ISA

namespace {

#define HAS(feature) __builtin_cpu_supports(#feature)
#define ISA(name, needs, flags) {#name, [] { return bool(needs); }, &name::table, &name::conv},
const Isa kIsas[] = {
#include "isas.def"
};
#undef ISA
#undef HAS

const Isa& decide() {
#ifdef LC_X86_ISAS
  __builtin_cpu_init();
#endif
  const std::string& wanted = environment().isa;
  std::string here;
  for (const Isa* set = std::end(kIsas); set-- != std::begin(kIsas);) {
    if (!set->runs_here()) continue;
    if (wanted.empty() || wanted == set->name) return *set;
    here += std::string(here.empty() ? "" : ", ") + set->name;
  }
  fail(LC_DEVICE, "LEETCORE_ISA: '%s' cannot run here; this build on this machine has %s", wanted.c_str(),
       here.c_str());
}

}  // namespace

Isas isas() { return {std::begin(kIsas), std::end(kIsas)}; }

const Isa& isa() {
  static const Isa& chosen = decide();  // after an exception the next call decides again
  return chosen;
}

}  // namespace lc
