// chunks.h - segments of tokens, chunk by chunk, on the matrix unit: what chunk, scan and block launch.
#pragma once
#include <vector>

#include "../problem.h"

namespace lc::cuda {

inline constexpr int kChunk = 64;  // tokens; segments are whole chunks

// Which tokens, from which states. States are [slot, Hs, K, V], dense, float32.
struct Walk {
  int64_t length;           // of a segment, a multiple of kChunk: see segments.cuh
  int64_t segment = -1;     // this one of every sequence, whose states have the sequence's number as slot; -1: all
  bool alone = false;       // segments but the last of a sequence, from zero: their states and decays, no outputs
  bool warm_up = false;     // heads that forget a segment within one start from zero some tokens before it instead
  float* before = nullptr;  // states before segments; nullptr: none, but the initial state before a first one
  float* after = nullptr;   // states after segments that are not the last
  double* log2 = nullptr;   // alone: of the decay over each segment, [slot, Hs]

  // What only gradients need. Backward in time, states are gradients of states: the weight of a key is the scale, that
  // of an output is 1; token t decays what comes from t + 1 by the decay of t + 1, and the state that leaves the first
  // token by its own.
  bool backward = false;      // from the last token to the first: strides of tokens are negative
  bool turned = false;        // states lie in memory as [V, K]
  int64_t share = 1;          // states that share a decay, of which the first has the initial state
  View factor = {};           // [B, factor_heads, N, V]: products_t = factor_t.o_t, of o what comes through the state
  int64_t factor_heads = 1;   //   and, forward in time: + sum_j w_tj - sum_i w_it, w_ij = mask_ij q_i.k_j factor_i.v_j,
  float* products = nullptr;  //   j < i in one chunk; [slice of V, H, token], summed over slices
  bool precise = false;   // states with all digits of float32 at the cost of another product, where there are products
  float* kept = nullptr;  // states at every kKept tokens from the first on: before them, forward in time; after it
};

inline constexpr int kKept = 16 * kChunk;  // tokens from one state that is kept to the next

// Chunks of a segment, at least 4: as many segments as fill the device about twice, with so many blocks for each; of
// the problem and the device alone.
int64_t segment_chunks(const Problem& p, int64_t blocks);

const char* walk_refuses(const Problem& p);
void walk(const Problem& p, const Walk& w);

// What a walk is for: o; dq, dk or dv; dq or dk, and what d log_decay is made of.
enum class Aim { outputs, gradients, decays };

// Walks for the gradients of p, up to three side by side (gradient_walks.h): over operands of gradient.h, K and V up to
// 256. `passes` of p there are altogether, which tells how full the device is.
struct GradientWalk {
  Problem p;
  Walk walk;
};
using GradientWalks = std::vector<GradientWalk>;
const char* gradients_refuse(const Problem& p);
const char* decays_refuse(const Problem& p);
void walk_gradients(const Problem& p, int passes, const GradientWalks& walks);
void walk_decays(const Problem& p, int passes, const GradientWalks& walks);
int decay_slices(const Problem& p);  // of products

// For cost().
int64_t walk_blocks(const Problem& p, const Walk& w);
double chunk_flop(const Problem& p);     // of outputs and states of all tokens and heads
double chunk_step_us(const Problem& p);  // of one chunk in one block; estimated

}  // namespace lc::cuda
