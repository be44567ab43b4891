// gradient.h - gradients as outputs and states of the recurrence itself, over other operands. With
// S_t the state after token t and dS_t the gradient of S_t,
//
//   S_t  = e^g_t S_t-1 + k_t v_t^T              dq_t = scale S_t dO_t
//   dS_t = e^g_t+1 dS_t+1 + scale q_t dO_t^T    dk_t = dS_t v_t     dv_t = dS_t^T k_t
//
// and dS_N = d_final_state. Each function returns a problem with other tensors in the places of q,
// k and v. Every q head has a dS of its own.
#pragma once
#include "problem.h"

namespace lc {

// Outputs dq, forward in time. States S^T; scores dO_i.v_j.
LC_INLINE Problem of_queries(const Problem& p) {
  Problem r = p;
  r.q = p.d_o;
  r.k = p.v;
  r.v = p.k;
  r.K = p.V;
  r.V = p.K;
  r.Hq = p.H;
  r.Hk = p.Hv;
  r.Hv = p.Hk;
  return r;
}

// Outputs dk, backward in time. States dS^T; scores v_j.dO_i.
LC_INLINE Problem of_keys(const Problem& p) {
  Problem r = p;
  r.q = p.v;
  r.k = p.d_o;
  r.v = p.q;
  r.K = p.V;
  r.V = p.K;
  r.Hq = p.Hv;
  r.Hk = p.H;
  r.Hs = p.H;
  r.Hv = p.Hq;
  return r;
}

// Outputs dv, backward in time. States dS; scores k_j.q_i.
LC_INLINE Problem of_values(const Problem& p) {
  Problem r = p;
  r.q = p.k;
  r.k = p.q;
  r.v = p.d_o;
  r.Hq = p.Hk;
  r.Hk = p.Hq;
  r.Hv = p.H;
  r.Hs = p.H;
  return r;
}

}  // namespace lc
