// methods.h - what every computation method provides; methods.def lists the methods.
#pragma once
#include "problem.h"

namespace lc {

// What a call can ask of a method.
enum class Feature : uint8_t {
#define FEATURE(name, refusal) name,
#include "features.def"
#undef FEATURE
};

// A set of features.
struct Features {
  uint32_t bits = 0;
  constexpr Features() = default;
  explicit constexpr Features(uint32_t set) : bits(set) {}
  constexpr Features(Feature f) : bits(uint32_t(1) << int(f)) {}
  constexpr bool has(Feature f) const { return bits >> int(f) & 1; }
  constexpr Features without(Features other) const { return Features(bits & ~other.bits); }
  constexpr explicit operator bool() const { return bits != 0; }
};
constexpr Features operator|(Features a, Features b) { return Features(a.bits | b.bits); }
constexpr Features operator|(Feature a, Feature b) { return Features(a) | Features(b); }

inline constexpr Features kAllTypes = Feature::float64 | Feature::float32 | Feature::float16 | Feature::bfloat16;
inline constexpr Features kMatrixUnitTypes = Feature::float32 | Feature::float16 | Feature::bfloat16;
inline constexpr Features kDecaysPerHead = Feature::no_decay | Feature::decay_per_head;
inline constexpr Features kAllDecays = kDecaysPerHead | Feature::decay_per_token;
inline constexpr Features kSequences =
    Feature::packed | Feature::grouped_heads | Feature::initial_state | Feature::final_state;
inline constexpr Features kMamba2 = Feature::token_lengths | Feature::skip | Feature::gate | Feature::transposed_states;

// What a row declares. `words` replaces the refusal of features.def for one feature that the row
// does not declare.
struct Serves {
  Features features;
  struct Words {
    Feature feature;
    const char* refusal;
  } words = {};
};

struct Cost {
  double flop;          // multiplications and additions of the products and of the updates of states
  double least_bytes;   // every operand read or written once
  double bytes;         // operands as often as the method reads or writes them, and states that wait in memory
  double depth;         // steps that wait for one another, with as many workers as could be used
  double microseconds;  // predicted on this device; "auto" takes the smallest
  const char* bound;    // the largest part of the prediction: "compute", "memory" or "overhead"
};

struct Method {
  lc_method_info info;
  Serves serves;                           // a call that asks for more is refused before `refuses` is asked
  const char* (*refuses)(const Problem&);  // nullptr, or why sizes, device or combination cannot be served
  Cost (*cost)(const Problem&);
  size_t (*workspace)(const Problem&);  // bytes
  void (*run)(const Problem&);          // throws Error only before it writes
  const char* alias = nullptr;          // another name of the method
};

// The `refuses` of a row that serves every call whose features it declares.
const char* refuses_nothing(const Problem& p);

struct Methods {
  const Method* const* first;
  const Method* const* last;
  const Method* const* begin() const { return first; }
  const Method* const* end() const { return last; }
};

Methods methods();                                       // of every device; CPU rows of the instruction set in use
const char* refusal(const Method& m, const Problem& p);  // why m does not serve p, nullptr if it does
std::string names(Features features);                    // as in features.def, with blanks between them

// The cost of one call by one method, with the time as corrected by measurements (tuning.h).
struct Prediction {
  Cost cost;                        // as the model has it
  double correction, microseconds;  // measured over predicted time, and their product
};
Prediction predict(const Method& m, const Problem& p);

struct Choice {
  const Method* method;
  Prediction prediction;
  const char* decided_by;  // "method", "LEETCORE_METHOD", "only" (no other serves the call) or "prediction"
};
Choice choose(const Problem& p, const char* name);  // nullptr or "auto": cheapest; throws Error with every reason

}  // namespace lc
