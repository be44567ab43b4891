// conv.h - one validated call of the causal convolution as plain data, and the convolution for one
// instruction set.
#pragma once
#include "problem.h"

namespace lc {

// Fields with the names of fields of Problem have their meaning. Views have the axes [b, d, n, -];
// states have [s, d, l, -], weight has [d, w, -, -].
struct ConvProblem {
  lc_op op;
  lc_device device;
  Type type;         // x, y
  Type weight_type;  // weight
  Type bias_type;    // bias
  Type state_type;   // all states
  bool silu;
  int32_t cu_bits;
  int64_t B;  // sequences: the batch, or the packed sequences
  int64_t N;  // tokens of one batch entry; packed: tokens of all sequences
  int64_t D;  // channels
  int64_t W;  // taps
  int64_t L;  // inputs in a state; 0: the call has no state
  int64_t slots;
  View x, y, weight, bias, initial_state, final_state;
  View d_y, d_final_state, d_x, d_weight, d_bias, d_initial_state;
  const void* cu_seqlens;
  int32_t index_bits;
  const void* state_indices;
  void* workspace;
  size_t workspace_bytes;
  int threads;
  Interrupt* interrupt;
};

inline constexpr int64_t kMostTaps = 8;

// The convolution for one instruction set.
struct Conv {
  size_t (*workspace)(const ConvProblem&);  // bytes
  void (*run)(const ConvProblem&);
};

// Validation, in check_conv.cpp. The two functions differ as check_structure and check do.
ConvProblem check_conv_structure(const lc_conv_args& args);
ConvProblem check_conv(const lc_conv_args& args);

}  // namespace lc
