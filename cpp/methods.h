// methods.h - what every computation method provides; methods.def lists them.
#pragma once
#include "problem.h"

namespace lc {

struct Cost {
  double flop;          // multiplications and additions of the products and the updates of states
  double least_bytes;   // every operand read or written once
  double bytes;         // operands as often as the method reads or writes them, and states that wait in memory
  double depth;         // steps that wait for one another, with as many workers as could be used
  double microseconds;  // predicted on this device; "auto" takes the smallest
};

struct Method {
  lc_method_info info;
  const char* (*refuses)(const Problem&);  // nullptr, or a sentence saying what it cannot do
  Cost (*cost)(const Problem&);
  size_t (*workspace)(const Problem&);  // bytes
  void (*run)(const Problem&);          // throws Error only before it writes
  const char* alias = nullptr;          // another name for it
};

struct Methods {
  const Method* const* first;
  const Method* const* last;
  const Method* const* begin() const { return first; }
  const Method* const* end() const { return last; }
};

Methods methods();                                       // of every device; CPU rows of the instruction set in use
const char* refusal(const Method& m, const Problem& p);  // why m does not serve p, nullptr if it does
const char* forward_only(const Problem& p);              // the refusal of a method of forward passes and no more

// A method that serves the problem, and what it costs with the time as corrected by measurements (tuning.h).
struct Choice {
  const Method* method;
  Cost cost;
};
Cost predict(const Method& m, const Problem& p);
Choice choose(const Problem& p, const char* name);  // nullptr or "auto": cheapest; throws Error with every reason

}  // namespace lc
