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

namespace {

constexpr const char* kNames[] = {
#define FEATURE(name, refusal) #name,
#include "features.def"
#undef FEATURE
};
constexpr const char* kRefusals[] = {
#define FEATURE(name, refusal) refusal,
#include "features.def"
#undef FEATURE
};

// The features of one call.
Features asked(const Problem& p) {
  constexpr Feature kOps[] = {Feature::forward, Feature::backward, Feature::decode};
  constexpr Feature kTypes[] = {Feature::float64, Feature::float32, Feature::float16, Feature::bfloat16};
  constexpr Feature kDecays[] = {Feature::no_decay, Feature::decay_per_head, Feature::decay_per_token};
  Features f = kOps[p.op] | kTypes[int(p.type)] | kDecays[int(p.decay)];
  const auto ask = [&](bool condition, Feature feature) {
    if (condition) f = f | feature;
  };
  ask(p.cu_bits, Feature::packed);
  ask(p.Hq != p.Hk || p.Hk != p.Hv, Feature::grouped_heads);
  ask(bool(p.dt), Feature::token_lengths);
  ask(bool(p.skip), Feature::skip);
  ask(bool(p.gate), Feature::gate);
  for (const View* state : {&p.initial_state, &p.final_state, &p.d_initial_state, &p.d_final_state})
    ask(is_transposed(p, *state), Feature::transposed_states);
  if (p.op == LC_DECODE) {
    ask(p.index_bits, Feature::state_indices);
    ask(p.state_type == Type::f16 || p.state_type == Type::bf16, Feature::short_states);
  } else {
    ask(p.initial_state || p.d_initial_state, Feature::initial_state);
    ask(p.final_state || p.d_final_state, Feature::final_state);
    ask(p.d_log_decay || p.d_dt, Feature::decay_gradients);
  }
  return f;
}

bool elsewhere(const Method& m, const Problem& p) {
  return std::strcmp(m.info.device, p.device.type == LC_CUDA ? "cuda" : "cpu");
}

const char* undeclared(const Serves& serves, Features missing) {
  for (int i = 0;; ++i) {
    if (!missing.has(Feature(i))) continue;
    return serves.words.refusal && serves.words.feature == Feature(i) ? serves.words.refusal : kRefusals[i];
  }
}

const char* refusal(const Method& m, const Problem& p, Features features) {
  if (elsewhere(m, p)) return "is for another device";
  if (const Features missing = features.without(m.serves.features)) return undeclared(m.serves, missing);
  return m.refuses(p);
}

// Only forward passes on the CPU were measured.
Prediction predict(const Method& m, const Problem& p, const Tuning& table, const GridPosition& at) {
  const Cost cost = m.cost(p);
  const bool measured = p.op == LC_FORWARD && p.device.type == LC_CPU;
  const double factor = measured ? correction(table, m.info.name, at) : 1;
  return {cost, factor, cost.microseconds * factor};
}

bool named(const Method& m, const char* name) {
  return !std::strcmp(m.info.name, name) || (m.alias && !std::strcmp(m.alias, name));
}

}  // namespace

const char* refuses_nothing(const Problem&) { return nullptr; }

std::string names(Features features) {
  std::string text;
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (features.has(Feature(i))) text += (text.empty() ? "" : " ") + std::string(kNames[i]);
  return text;
}

const char* refusal(const Method& m, const Problem& p) { return refusal(m, p, asked(p)); }

Prediction predict(const Method& m, const Problem& p) {
  const Tuning& table = tuning();
  return predict(m, p, table, locate(table, p));
}

Choice choose(const Problem& p, const char* name) {
  const char* argument = "method";
  if (name && !std::strcmp(name, "auto")) name = nullptr;
  if (const std::string& wish = environment().method; !name && !wish.empty() && wish != "auto" && p.op == LC_FORWARD) {
    name = wish.c_str();
    argument = "LEETCORE_METHOD";
  }

  const Tuning& table = tuning();
  const GridPosition at = locate(table, p);
  const Features features = asked(p);
  Choice best = {};
  int serving = 0;
  for (const Method* m : methods()) {
    if ((name && !named(*m, name)) || refusal(*m, p, features)) continue;
    ++serving;
    const Prediction prediction = predict(*m, p, table, at);
    if (best.method && best.prediction.microseconds <= prediction.microseconds) continue;
    best.method = m;
    best.prediction = prediction;
  }
  if (best.method) {
    best.decided_by = name ? argument : serving == 1 ? "only" : "prediction";
    return best;
  }

  std::string known, reasons;
  bool found = !name;
  for (const Method* m : methods()) {
    if (elsewhere(*m, p)) continue;
    const char* why = refusal(*m, p, features);
    known += std::string(", ") + m->info.name;
    reasons += std::string("\n  ") + m->info.name + ": " + (why ? why : "serves it");
    found = found || named(*m, name);
  }
  if (!found) fail(LC_INVALID, "%s: unknown method '%s'; known are auto%s", argument, name, known.c_str());
  if (name) fail(LC_UNSUPPORTED, "%s: '%s' does not serve this problem:%s", argument, name, reasons.c_str());
  fail(LC_UNSUPPORTED, "no method serves this problem:%s", reasons.c_str());
}

}  // namespace lc
