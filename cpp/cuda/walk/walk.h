// walk.h - walks over sequences, 64 tokens at a time, on the matrix unit. README.md explains the
// words.
#pragma once
#include <vector>

#include "../../problem.h"

namespace lc::cuda {

inline constexpr int kChunk = 64;                // tokens; a segment is a whole number of chunks
inline constexpr int kCheckpoint = 16 * kChunk;  // tokens between two states that are kept (Walk::checkpoints)

// The tokens to walk over and the states to start from. States are dense float32 [slot, Hs, K, V].
struct Walk {
  int64_t length;            // tokens of a segment, a multiple of kChunk: see segments.cuh
  int64_t segment = -1;      // run only this segment of every sequence (slot = sequence index); -1 runs all segments
  bool states_only = false;  // start every segment but a sequence's last from zero; write its state, no outputs
  bool warm_up = false;      // heads that forget a segment within a segment start from zero some tokens earlier
  float* before = nullptr;   // states before segments; nullptr: only the initial state before a sequence's first
  float* after = nullptr;    // states after all segments except a sequence's last
  double* log2 = nullptr;    // with states_only: log2 of the decay over each segment, [slot, Hs]

  // The rest is for gradients. In a backward walk a state is the gradient of a state, keys are
  // multiplied by the scale instead of the outputs, and token t decays the state that comes from t
  // + 1 by the decay of t + 1. The decay of the first token applies to the state that leaves it.
  bool backward = false;         // walk from the last token to the first; the strides of tokens are negative
  bool transposed = false;       // states are stored as [V, K]
  int64_t share = 1;             // states that share a decay; only the first of them has the initial state
  View factor = {};              // [B, factor_heads, N, V]: the factor of the products
  int64_t factor_heads = 1;      // heads of `factor`
  float* products = nullptr;     // [slice, H, token], to be summed over slices of V; products.cuh defines them
  bool whole = false;            // products of the factor with all of the outputs: the gradient of lengths
  bool precise = false;          // walks with products compute states to full float32 precision
  float* checkpoints = nullptr;  // states at every kCheckpoint tokens: before them forward in time, after them backward
};

// Chunks of a segment, at least 4, such that the segments fill the device about twice if each needs
// `blocks` blocks. The result depends on the problem and the device alone.
int64_t segment_chunks(const Problem& p, int64_t blocks);

const char* walk_refuses(const Problem& p);
void walk(const Problem& p, const Walk& w);

// The results of a walk: o; one of dq, dk, dv; one of these with the products that d log_decay and
// d dt are made of.
enum class Aim { outputs, gradients, decays };

// A walk over the operands of gradient.h, with K and V up to 256. One launch runs up to three of
// them.
struct GradientWalk {
  Problem p;
  Walk walk;
};
using GradientWalks = std::vector<GradientWalk>;
const char* gradients_refuse(const Problem& p);
const char* decays_refuse(const Problem& p);
// `concurrent` is the number of walks that the call makes altogether, which tells how full the
// device is.
void walk_gradients(const Problem& p, int concurrent, const GradientWalks& walks);
void walk_decays(const Problem& p, int concurrent, const GradientWalks& walks);
int decay_slices(const Problem& p, int64_t columns);  // slices of Walk::products

// For cost().
int64_t walk_blocks(const Problem& p, const Walk& w);
double chunk_flop(const Problem& p);     // of outputs and states, over all tokens and heads
double chunk_step_us(const Problem& p);  // estimated time of one chunk in one block

}  // namespace lc::cuda
