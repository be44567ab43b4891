// table.cpp - the CPU rows of methods.def. It is compiled once per instruction set, like the
// methods themselves.
#include "../methods.h"

namespace lc::LC_ISA {

#define CUDA(name)
#define CPU(name) extern const Method name##_cpu;
#include "../methods.def"
#undef CPU

namespace {
const Method* const kRows[] = {
#define CPU(name) &name##_cpu,
#include "../methods.def"
#undef CPU
};
}  // namespace

extern const Methods table = {kRows, kRows + sizeof kRows / sizeof *kRows};

}  // namespace lc::LC_ISA
