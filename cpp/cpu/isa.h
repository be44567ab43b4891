// isa.h - which instruction set the CPU methods use. They are compiled once per set, into namespaces of these names.
#pragma once

namespace lc {

enum class Isa { generic, avx2, avx512 };
inline constexpr const char* kIsaNames[] = {"generic", "avx2", "avx512"};

bool compiled(Isa isa);
// The best that the build and the machine have, or the one LEETCORE_ISA names; decided once. Throws Error if that one
// cannot run here.
Isa isa();

}  // namespace lc
