// methods.cpp - the table of methods and the choice among them.
#include "methods.h"

#include <cstring>
#include <iterator>
#include <vector>

#include "cpu/isa.h"
#include "environment.h"
#include "tuning.h"

namespace lc {

#define CPU(name)
#ifdef LC_WITH_CUDA
#define CUDA(name) extern const Method name##_cuda;
#include "methods.def"
#undef CUDA
#define CUDA(name) &name##_cuda,
static constexpr const Method* kCudaRows[] = {
#include "methods.def"
};
#undef CUDA
#endif
#undef CPU

static Methods cpu_methods() { return *isa().table; }

Methods methods() {
#ifdef LC_WITH_CUDA
  static const std::vector<const Method*> all = [] {
    std::vector<const Method*> rows(cpu_methods().begin(), cpu_methods().end());
    rows.insert(rows.end(), std::begin(kCudaRows), std::end(kCudaRows));
    return rows;
  }();
  return {all.data(), all.data() + all.size()};
#else
  return cpu_methods();
#endif
}

static bool elsewhere(const Method& m, const Problem& p) {
  return std::strcmp(m.info.device, p.device.type == LC_CUDA ? "cuda" : "cpu");
}

const char* refusal(const Method& m, const Problem& p) {
  return elsewhere(m, p) ? "is for another device" : m.refuses(p);
}

const char* forward_only(const Problem& p) {
  if (p.op == LC_DECODE) return "decodes by recurrent only";
  if (p.op == LC_FORWARD) return nullptr;
  return "leaves gradients to chunk, whose gradients are those of every method";
}

// Only forward passes on the CPU are measured: decoding has one method.
static Cost corrected(const Method& m, const Problem& p, const Tuning& table, const GridPosition& at) {
  Cost cost = m.cost(p);
  if (p.op == LC_FORWARD && p.device.type == LC_CPU) cost.microseconds *= correction(table, m.info.name, at);
  return cost;
}

Cost predict(const Method& m, const Problem& p) {
  const Tuning& table = tuning();
  return corrected(m, p, table, locate(table, p));
}

static bool named(const Method& m, const char* name) {
  return !std::strcmp(m.info.name, name) || (m.alias && !std::strcmp(m.alias, name));
}

Choice choose(const Problem& p, const char* name) {
  const char* argument = "method";
  if (name && !std::strcmp(name, "auto")) name = nullptr;
  if (const std::string& wish = environment().method; !name && !wish.empty() && wish != "auto" && p.op == LC_FORWARD)
    name = wish.c_str(), argument = "LEETCORE_METHOD";

  const Tuning& table = tuning();
  const GridPosition at = locate(table, p);
  Choice best = {};
  for (const Method* m : methods()) {
    if ((name && !named(*m, name)) || refusal(*m, p)) continue;
    const Cost cost = corrected(*m, p, table, at);
    if (!best.method || cost.microseconds < best.cost.microseconds) best = {m, cost};
  }
  if (best.method) return best;

  std::string known, reasons;
  bool found = !name;
  for (const Method* m : methods()) {
    if (elsewhere(*m, p)) continue;
    const char* why = refusal(*m, p);
    known += std::string(", ") + m->info.name;
    reasons += std::string("\n  ") + m->info.name + ": " + (why ? why : "serves it");
    found = found || named(*m, name);
  }
  if (!found) fail(LC_INVALID, "%s: unknown method '%s'; known are auto%s", argument, name, known.c_str());
  if (name) fail(LC_UNSUPPORTED, "%s: '%s' does not serve this problem:%s", argument, name, reasons.c_str());
  fail(LC_UNSUPPORTED, "no method serves this problem:%s", reasons.c_str());
}

}  // namespace lc
