#include "isa.h"

#include <cstring>
#include <string>

#include "../environment.h"
#include "../problem.h"

namespace lc {
namespace {

bool machine_has(Isa isa) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::generic;
}

bool usable(Isa isa) { return compiled(isa) && machine_has(isa); }

Isa decide() {
  constexpr Isa kBestFirst[] = {Isa::avx512, Isa::avx2, Isa::generic};
  const char* wanted = environment().isa.c_str();
  if (!*wanted) {
    for (Isa isa : kBestFirst)
      if (usable(isa)) return isa;
  }
  std::string here;
  for (Isa isa : kBestFirst) {
    const char* name = kIsaNames[int(isa)];
    if (!usable(isa)) continue;
    if (!std::strcmp(wanted, name)) return isa;
    here += std::string(here.empty() ? "" : ", ") + name;
  }
  fail(LC_DEVICE, "LEETCORE_ISA: '%s' cannot run here; this build on this machine has %s", wanted, here.c_str());
}

}  // namespace

bool compiled(Isa isa) {
#ifdef LC_X86_ISAS
  return isa == Isa::generic || isa == Isa::avx2 || isa == Isa::avx512;
#else
  return isa == Isa::generic;
#endif
}

Isa isa() {
  static const Isa chosen = decide();  // a throwing decide() is tried again by the next call
  return chosen;
}

}  // namespace lc
