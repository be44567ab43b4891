// tuning.h - measured corrections of predicted times: factors on a grid of problems, from a text that a machine's own
// measurement writes (`leetcore tune`), by default the one in tuning.inc.
#pragma once
#include "problem.h"

namespace lc {

// Where a problem lies between the points of the grid; looked up once for all methods.
struct GridPosition {
  int corner[3], type;  // of axes N, D = sqrt(K V), and states per thread
  double weight[3];
};

class Tuning;  // of the instruction set in use
const Tuning& tuning();
GridPosition locate(const Tuning& t, const Problem& p);

// Measured over predicted time of a method, 1 where nothing was measured.
double correction(const Tuning& t, const char* method, const GridPosition& at);

// Replaces the table by that of a text (grammar: tuning.cpp), nullptr: by the default. Throws Error and changes nothing
// if the text is broken.
void set_tuning(const char* text);

// "shipped", or "set" after set_tuning with a text.
const char* tuning_source();

}  // namespace lc
