"""The operator as it is defined, in float64: the one truth that everything is compared with.

S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t
"""

import itertools

import numpy as np


def linear_attention(q, k, v, log_decay=None, *, scale=1.0, initial_state=None, cu_seqlens=None, layout="bhnd"):
    """Arguments as leetcore.linear_attention has them, in any dtype; returns (o, final_state) in float64."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    per_token = log_decay is not None and np.ndim(log_decay) == 3
    if layout == "bnhd":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        log_decay = np.asarray(log_decay).swapaxes(1, 2) if per_token else log_decay
    if cu_seqlens is None:
        o, state = recurrence(q, k, v, log_decay, scale, initial_state)
    else:
        parts = []
        for s, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
            g = log_decay[:, :, start:end] if per_token else log_decay
            first = None if initial_state is None else initial_state[s : s + 1]
            parts.append(recurrence(*(x[:, :, start:end] for x in (q, k, v)), g, scale, first))
        o = np.concatenate([o for o, _ in parts], axis=2)
        state = np.concatenate([state for _, state in parts])
    return (o.swapaxes(1, 2) if layout == "bnhd" else o), state


def recurrence(q, k, v, log_decay, scale, state):
    """One pass over the tokens, [B, H?, N, *] in and out; groups of heads share what they read."""
    heads, states = max(x.shape[1] for x in (q, k, v)), max(k.shape[1], v.shape[1])
    q = np.repeat(q, heads // q.shape[1], axis=1)
    k, v = (np.repeat(x, states // x.shape[1], axis=1) for x in (k, v))
    B, _, N, K = q.shape
    q = q.reshape(B, states, heads // states, N, K)
    g = np.zeros(()) if log_decay is None else np.asarray(log_decay).astype(np.float64)
    decay = np.exp(np.broadcast_to(g if g.ndim == 3 else g[..., None], (B, states, N)))
    S = np.zeros((B, states, K, v.shape[-1])) if state is None else np.array(state, np.float64)
    o = np.empty((B, states, heads // states, N, v.shape[-1]))
    for t in range(N):
        S = decay[:, :, t, None, None] * S + k[:, :, t, :, None] * v[:, :, t, None, :]
        o[:, :, :, t] = scale * (q[:, :, :, t] @ S)
    return o.reshape(B, heads, N, -1), S


def decode_step(q, k, v, state, log_decay=None, *, scale=1.0, state_indices=None):
    """Arguments as leetcore.decode_step has them; returns (o, the whole pool after it) in float64."""
    state = np.asarray(state).astype(np.float64)
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    if one_token := q.ndim == 3:
        q, k, v = (x[:, :, None] for x in (q, k, v))
    slots = np.arange(len(q)) if state_indices is None else np.asarray(state_indices)
    live = slots >= 0
    g = np.asarray(log_decay)[live] if log_decay is not None and np.ndim(log_decay) > 1 else log_decay
    o = np.zeros((*q.shape[:1], max(x.shape[1] for x in (q, k, v)), q.shape[2], v.shape[-1]))
    o[live], state[slots[live]] = recurrence(q[live], k[live], v[live], g, scale, state[slots[live]])
    return (o[:, :, 0] if one_token else o), state


def error(got, want):
    """The relative Frobenius norm of the difference; inf where anything is not finite or the shapes differ."""
    got = np.asarray(got).astype(np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return np.inf
    return np.linalg.norm(got - want) / np.linalg.norm(want) if want.size else 0.0
