// tuning.h - measured corrections of predicted times: factors on a grid of problems. They are read
// from a text that `leetcore tune` measures and writes on a machine; the default is tuning.inc.
#pragma once
#include "problem.h"

namespace lc {

// The position of a problem between the points of the grid. It is looked up once for all methods.
struct GridPosition {
  int corner[3];     // the lower point on the axes N, D = sqrt(K V), and states per thread
  int type;          // which factors: those of 2, 4 or 8 bytes
  double weight[3];  // of the upper point on each axis
};

class Tuning;  // the table for the instruction set in use
const Tuning& tuning();
GridPosition locate(const Tuning& t, const Problem& p);

// Measured time of a method divided by its predicted time; 1 if nothing was measured.
double correction(const Tuning& t, const char* method, const GridPosition& at);

// Replaces the table by the one in a text (grammar: tuning.cpp), or by the default with nullptr.
// Throws Error and changes nothing if the text is broken.
void set_tuning(const char* text);

// "shipped", or "set" after set_tuning with a text.
const char* tuning_source();

}  // namespace lc
