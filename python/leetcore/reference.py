"""The operator and the convolution by their definitions, in float64. Tests, checks and benchmarks
compare results with them.

S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t
u_t = bias + sum_i weight_i x_{t-W+1+i}   y_t = u_t or silu(u_t)
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

Array = Any


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array = None,
    *,
    scale: float = 1.0,
    initial_state: Array = None,
    cu_seqlens: Array = None,
    layout: str = "bhnd",
    fast: bool = False,
) -> tuple[Array, Array]:
    """Causal linear attention with exponential decay, in float64.

    The arguments are those of `leetcore.linear_attention`, of any dtype.

    Args:
        fast: whether to compute in chunks (`chunks`) instead of token by token (`recurrence`), for
            long sequences.

    Returns:
        (o, final_state), float64.
    """
    one_pass = chunks if fast else recurrence
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    per_token = log_decay is not None and np.ndim(log_decay) == 3
    if layout == "bnhd":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        log_decay = np.asarray(log_decay).swapaxes(1, 2) if per_token else log_decay
    if cu_seqlens is None:
        o, state = one_pass(q, k, v, log_decay, scale, initial_state)
    else:
        parts = []
        for s, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
            g = log_decay[:, :, start:end] if per_token else log_decay
            first = None if initial_state is None else initial_state[s : s + 1]
            cut = [x[:, :, start:end] for x in (q, k, v)]
            parts.append(one_pass(cut[0], cut[1], cut[2], g, scale, first))
        o = np.concatenate([o for o, _ in parts], axis=2)
        state = np.concatenate([state for _, state in parts])
    return (o.swapaxes(1, 2) if layout == "bnhd" else o), state


def recurrence(q: Array, k: Array, v: Array, log_decay: Array, scale: float, state: Array) -> tuple[Array, Array]:
    """The recurrence, token by token. q, k, v and o are [B, heads, N, *].

    Grouped heads share k, v and states.
    """
    q, k, v, g, S = _ungrouped(q, k, v, log_decay, state)
    decay = np.exp(g)
    o = np.empty((*q.shape[:-1], v.shape[-1]))
    for t in range(q.shape[3]):
        S = decay[:, :, t, None, None] * S + k[:, :, t, :, None] * v[:, :, t, None, :]
        o[:, :, :, t] = scale * (q[:, :, :, t] @ S)
    return _grouped(o), S


def chunks(q: Array, k: Array, v: Array, log_decay: Array, scale: float, state: Array) -> tuple[Array, Array]:
    """The recurrence in chunks of 128 tokens: two products per chunk, one state between chunks."""
    q, k, v, g, S = _ungrouped(q, k, v, log_decay, state)
    o = np.empty((*q.shape[:-1], v.shape[-1]))
    S = _chunks(q, k, v, g, S, o, np)
    return scale * _grouped(o), S


def in_chunks(q: Array, k: Array, v: Array, log_decay: Array, state: Array = None, xp: Any = np) -> tuple[Array, Array]:
    """Output and final state in float64, computed where the arrays are by the functions of their
    library `xp`.

    q, k [B, H, N, K], v [B, H, N, V], log_decay [H] or [B, H, N], state [B, H, K, V] or None, N >=
    1; the scale is 1.
    """
    if state is None:
        state = xp.zeros_like(k[:, :, 0, :, None] * v[:, :, 0, None, :], dtype=xp.float64)
    g = log_decay if log_decay.ndim == 3 else xp.broadcast_to(log_decay[None, :, None], (1, *q.shape[1:3]))
    o = xp.zeros_like(v[:, :, None], dtype=xp.float64)
    state = _chunks(q[:, :, None], k, v, g, state, o, xp)
    return o[:, :, 0], state


def gradients(q: Array, k: Array, v: Array, log_decay: Array, d_o: Array, xp: Any = np) -> dict[str, Array]:
    """Gradients in float64 of sum(o * d_o), by name, of the arguments of `in_chunks`.

    Each gradient is the operator on other operands. d_k and d_v are sums over later tokens: the
    operator runs backward in time, where a token decays what the token after it has added. The sum
    of log_decay up to a token multiplies what this token reads and divides what it writes.
    d_log_decay is given for decays [B, H, N] only.
    """

    def reverse(x: Array) -> Array:
        return xp.flip(x, (2,))

    late = xp.roll(reverse(log_decay), 1, 2) if log_decay.ndim == 3 else log_decay
    q_late, k_late, v_late, d_o_late = map(reverse, (q, k, v, d_o))
    d_q = in_chunks(d_o, v, k, log_decay, xp=xp)[0]
    d_k = reverse(in_chunks(v_late, d_o_late, q_late, late, xp=xp)[0])
    d_v = reverse(in_chunks(k_late, q_late, d_o_late, late, xp=xp)[0])
    found = {"d_q": d_q, "d_k": d_k, "d_v": d_v}
    if log_decay.ndim == 3:
        found["d_log_decay"] = reverse(xp.cumsum(reverse((q * d_q).sum(3) - (k * d_k).sum(3)), axis=2))
    return found


def _chunks(q: Array, k: Array, v: Array, g: Array, S: Array, o: Array, xp: Any) -> Array:
    """Writes o [B, Hs, H / Hs, N, V] and returns the final state; shapes as `_ungrouped` gives
    them."""
    g = xp.clip(xp.asarray(g, dtype=xp.float64), -1e4, None)  # exp(g) is still 0, and sums of it have differences
    for t in range(0, q.shape[3], 128):
        part = slice(t, t + 128)
        Q, K, V = (xp.asarray(x, dtype=xp.float64) for x in (q[:, :, :, part], k[:, :, part], v[:, :, part]))
        cum = xp.cumsum(g[:, :, part], axis=2)
        weights = xp.tril(xp.exp(xp.tril(cum[..., :, None] - cum[..., None, :])))
        o[:, :, :, part] = xp.exp(cum)[:, :, None, :, None] * (Q @ S[:, :, None])
        o[:, :, :, part] += (Q @ K.swapaxes(2, 3)[:, :, None] * weights[:, :, None]) @ V[:, :, None]
        to_end = xp.exp(cum[..., -1:] - cum)[..., None]
        S = xp.exp(cum[..., -1])[..., None, None] * S + (to_end * K).swapaxes(2, 3) @ V
    return S


def _ungrouped(q: Array, k: Array, v: Array, log_decay: Array, state: Array) -> tuple[Array, ...]:
    """q [B, Hs, H / Hs, N, K], k and v [B, Hs, N, *], log_decay [B, Hs, N], state [B, Hs, K, V]."""
    heads, states = max(x.shape[1] for x in (q, k, v)), max(k.shape[1], v.shape[1])
    q = np.repeat(q, heads // q.shape[1], axis=1)
    k, v = (np.repeat(x, states // x.shape[1], axis=1) for x in (k, v))
    B, _, N, K = q.shape
    g = np.zeros(()) if log_decay is None else np.asarray(log_decay).astype(np.float64)
    g = np.broadcast_to(g if g.ndim == 3 else g[..., None], (B, states, N))
    S = np.zeros((B, states, K, v.shape[-1])) if state is None else np.array(state, np.float64)
    return q.reshape(B, states, heads // states, N, K), k, v, g, S


def _grouped(o: Array) -> Array:
    B, states, group, N, V = o.shape
    return o.reshape(B, states * group, N, V)


def decode_step(
    q: Array,
    k: Array,
    v: Array,
    state: Array,
    log_decay: Array = None,
    *,
    scale: float = 1.0,
    state_indices: Array = None,
) -> tuple[Array, Array]:
    """One step of generation, in float64, with the arguments of `leetcore.decode_step`.

    Returns:
        (o, the whole pool of states after the step), float64. `state` itself is not changed.
    """
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


def ssd(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array = None,
    *,
    z: Array = None,
    dt_bias: Array = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, np.inf),
    initial_state: Array = None,
    cu_seqlens: Array = None,
    fast: bool = False,
) -> tuple[Array, Array]:
    """`leetcore.ssd` in float64, with its arguments of any dtype.

    Returns:
        (y, final_state), float64.
    """
    x, dt, A, B, C = (np.asarray(value).astype(np.float64) for value in (x, dt, A, B, C))
    lengths = dt if dt_bias is None else dt + np.asarray(dt_bias).astype(np.float64)
    if dt_softplus:
        lengths = np.logaddexp(0, lengths)
    lengths = np.clip(lengths, *dt_limit)
    first = None if initial_state is None else np.asarray(initial_state).astype(np.float64).swapaxes(2, 3)
    y, state = linear_attention(
        C,
        B,
        x * lengths[..., None],
        lengths * np.maximum(A, -1e300),  # a token of length 0 does not decay a state
        initial_state=first,
        cu_seqlens=cu_seqlens,
        layout="bnhd",
        fast=fast,
    )
    if D is not None:
        D = np.asarray(D).astype(np.float64)
        y = y + x * (D if D.ndim == 2 else D[:, None])
    if z is not None:
        z = np.asarray(z).astype(np.float64)
        y = y * z * _sigmoid(z)
    return y, state.swapaxes(2, 3)


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array = None,
    *,
    activation: str | None = None,
    initial_state: Array = None,
    cu_seqlens: Array = None,
) -> tuple[Array, Array]:
    """The causal convolution, in float64, with the arguments of `leetcore.causal_conv1d`.

    Returns:
        (y, final_state), float64.
    """
    x, weight = (np.asarray(a).astype(np.float64) for a in (x, weight))
    bounds = (0, x.shape[2]) if cu_seqlens is None else cu_seqlens
    L = weight.shape[1] - 1 if initial_state is None else initial_state.shape[2]
    y, states = np.zeros_like(x), [np.zeros((0, x.shape[1], L))]
    for s, (start, end) in enumerate(itertools.pairwise(bounds)):
        first = initial_state if cu_seqlens is None or initial_state is None else initial_state[s : s + 1]
        inputs = _with_state(x[:, :, start:end], weight, first)
        y[:, :, start:end] = _taps(inputs, weight, end - start)
        states.append(inputs[:, :, inputs.shape[2] - L :])
    y += 0 if bias is None else np.asarray(bias).astype(np.float64)[:, None]
    return (y * _sigmoid(y) if activation else y), np.concatenate(states)


def causal_conv1d_gradients(
    x: Array,
    weight: Array,
    bias: Array = None,
    *,
    d_y: Array = None,
    d_final_state: Array = None,
    activation: str | None = None,
    initial_state: Array = None,
    cu_seqlens: Array = None,
) -> dict[str, Array]:
    """Gradients in float64 of sum(y * d_y) + sum(final_state * d_final_state), by name.

    d_initial_state has the length L of initial_state or d_final_state, or W - 1.
    """
    x, weight = (np.asarray(a).astype(np.float64) for a in (x, weight))
    D, W = weight.shape
    d_u = np.zeros_like(x) if d_y is None else np.asarray(d_y).astype(np.float64)
    if activation:
        u, _ = causal_conv1d(x, weight, bias, initial_state=initial_state, cu_seqlens=cu_seqlens)
        s = _sigmoid(u)
        d_u = d_u * s * (1 + u * (1 - s))
    bounds = (0, x.shape[2]) if cu_seqlens is None else cu_seqlens
    known = next((a for a in (initial_state, d_final_state) if a is not None), None)
    L = W - 1 if known is None else known.shape[2]
    d_x, d_weight, d_states = np.zeros_like(x), np.zeros_like(weight), [np.zeros((0, D, L))]
    for s, (start, end) in enumerate(itertools.pairwise(bounds)):
        rows = slice(None) if cu_seqlens is None else slice(s, s + 1)
        first = np.zeros((len(x), D, L)) if initial_state is None else initial_state[rows]
        inputs = _with_state(x[:, :, start:end], weight, first)
        d_inputs, part = np.zeros_like(inputs), d_u[:, :, start:end]
        for i in range(W):
            at = slice(L - W + 1 + i, L - W + 1 + i + end - start)
            d_inputs[:, :, at] += weight[:, i, None] * part
            d_weight[:, i] += (part * inputs[:, :, at]).sum((0, 2))
        if d_final_state is not None:
            d_inputs[:, :, end - start :] += d_final_state[rows]
        d_x[:, :, start:end] = d_inputs[:, :, L:]
        d_states.append(d_inputs[:, :, :L])
    sums = {"d_weight": d_weight, "d_bias": d_u.sum((0, 2))}
    return {"d_x": d_x, **sums, "d_initial_state": np.concatenate(d_states)}


def causal_conv1d_step(
    x: Array,
    weight: Array,
    state: Array,
    bias: Array = None,
    *,
    activation: str | None = None,
    state_indices: Array = None,
) -> tuple[Array, Array]:
    """One step, in float64, with the arguments of `leetcore.causal_conv1d_step`.

    Returns:
        (y, the whole pool of states after the step), float64. `state` itself is not changed.
    """
    x, state = (np.asarray(a).astype(np.float64) for a in (x, state))
    if one_token := x.ndim == 2:
        x = x[:, :, None]
    slots = np.arange(len(x)) if state_indices is None else np.asarray(state_indices)
    live = slots >= 0
    y = np.zeros_like(x)
    y[live], state[slots[live]] = causal_conv1d(
        x[live], weight, bias, activation=activation, initial_state=state[slots[live]]
    )
    return (y[:, :, 0] if one_token else y), state


def _with_state(x: Array, weight: Array, state: Array) -> Array:
    """The initial state, or zeros, followed by x."""
    if state is None:
        state = np.zeros((*x.shape[:2], weight.shape[1] - 1))
    return np.concatenate([np.asarray(state).astype(np.float64), x], axis=2)


def _taps(inputs: Array, weight: Array, N: int) -> Array:
    """The sums over the taps for the last N inputs."""
    W = weight.shape[1]
    begin = inputs.shape[2] - N - W + 1
    return sum(weight[:, i, None] * inputs[:, :, begin + i : begin + i + N] for i in range(W))


def _sigmoid(u: Array) -> Array:
    e = np.exp(-np.abs(u))
    return np.where(u < 0, e, 1) / (1 + e)


def error(got: Array, want: Array) -> float:
    """The relative Frobenius norm of got - want; inf if a value is not finite or shapes differ."""
    got = np.asarray(got).astype(np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return np.inf
    # numpy's norm is a threaded dot product, which takes a thousand times as long for a small
    # array.
    difference, size = np.square(got - want).sum(), np.square(want).sum()
    if not difference:  # zeros too: their relative error would be 0 / 0
        return 0.0
    return float(np.sqrt(difference / size)) if size else np.inf
