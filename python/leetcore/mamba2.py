"""Mamba-2 (state space duality) for arrays of any DLPack library: the operator with lengths of
tokens, a skip and a gate, in the names and shapes of Mamba-2 libraries.
"""

from __future__ import annotations

import math
from typing import Any

from . import _core
from .arrays import Array, Stream, library_of
from .options import Layout, Options, options, plain, real

_SSD = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "cu_seqlens", "out")
_GRADIENTS = ("x", "dt", "A", "B", "C", "dt_bias", "initial_state", "cu_seqlens", "d_y", "d_final_state")
_STEP = ("x", "dt", "A", "B", "C", "state", "D", "z", "dt_bias", "state_indices", "out")


def ssd(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    *,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Array | None = None,
    return_state: bool = False,
    cu_seqlens: Array | None = None,
    method: str = "auto",
    out: Array | None = None,
    stream: Stream | None = None,
) -> Any:
    """The state space model of Mamba-2 (arXiv:2405.21060), for a whole sequence.

    For each head, with a state S of [P, K]::

        d_t = clamp(dt_t + dt_bias)               dt_softplus: clamp(softplus(dt_t + dt_bias))
        S_t = exp(A d_t) S_{t-1} + (d_t x_t) B_t^T
        y_t = (S_t C_t + D x_t) * silu(z_t)

    It is `linear_attention` with q = C, k = B, v = d x and log_decay = A d, in one pass over
    memory.
    Lengths d and decays are computed from the values of dt in float64, on a GPU in float32 for
    inputs other than float64.

    Args:
        x: [B, N, H, P] in float64, float32, float16 or bfloat16. Any strides are allowed; an array
            whose last dimension is not contiguous is copied.
        dt: [B, N, H], of x's dtype or float32.
        A: [H], <= 0, float32 (float64 too with float64 inputs); a number stands for all heads.
        B: [B, N, G, K] of x's dtype. G divides H; head h reads group h * G // H.
        C: [B, N, G, K] of x's dtype.
        D: [H] or [H, P], of x's dtype or float32. None: 0.
        z: [B, N, H, P] of x's dtype. None: no gate.
        dt_bias: [H], of x's dtype or float32. None: 0.
        dt_softplus: whether lengths are softplus(dt + dt_bias).
        dt_limit: the least and the greatest length, 0 <= least <= greatest.
        initial_state: [B, H, P, K], or [S, H, P, K] with cu_seqlens; float32 (float64 with float64
            inputs). None means zeros.
        return_state: whether the state after the last token is returned too, shaped like
            initial_state.
        cu_seqlens: int32 or int64 [S + 1], the start offsets of S sequences that are packed along
            the token axis, from 0 to N; B is 1.
        method: "auto" or a name of `leetcore.methods()`.
        out: an array that receives y.
        stream: as in `linear_attention`.

    Returns:
        y [B, N, H, P] of x's dtype in the caller's array library, or (y, final_state).

    Raises:
        ValueError, TypeError: an argument breaks the rules above.
        NotImplementedError: no method serves the call, or the named method does not. No method for
            GPUs does; `leetcore.torch.ssd` composes the call from other operators there.
    """
    arrays = (x, dt, plain(A), B, C, D, z, dt_bias, initial_state, cu_seqlens, out)
    lib, queue = library_of(_SSD, *arrays).at(x, stream)
    return _core.ssd(lib, *arrays, return_state, _options(queue, dt_softplus, dt_limit, method, "bnhd"))


def ssd_step(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    state: Array,
    D: Array | None = None,
    *,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state_indices: Array | None = None,
    out: Array | None = None,
    stream: Stream | None = None,
) -> Any:
    """One token of `ssd` for each sequence: updates states in place and returns the outputs.

    Args:
        x: [B, H, P]; z likewise.
        dt: [B, H].
        A, D, dt_bias, dt_softplus, dt_limit: as in `ssd`.
        B, C: [B, G, K].
        state: [slots, H, P, K], read and updated in place; float32, float16 or bfloat16 (float64
            with float64 inputs). Either of its last two dimensions is contiguous. A 16-bit state is
            rounded once per call.
        state_indices: int32 or int64 [B], the slot of each sequence; no slot is named twice. -1
            skips a sequence, whose output is 0. Without state_indices sequence b uses slot b.
        out: an array that receives y.
        stream: as in `linear_attention`.

    Returns:
        y, [B, H, P]. Raises as `ssd`.
    """
    arrays = (x, dt, plain(A), B, C, state, D, z, dt_bias, state_indices, out)
    lib, queue = library_of(_STEP, *arrays).at(x, stream)
    return _core.ssd_step(lib, *arrays, _options(queue, dt_softplus, dt_limit))


def core_gradients(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    dt_bias: Array | None,
    initial_state: Array | None,
    cu_seqlens: Array | None,
    *,
    d_y: Array | None,
    d_final_state: Array | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    wants: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Any, ...]:
    """The gradients of `ssd` without D and z by x, dt, A, B, C and initial_state.

    `wants` says which of the six to compute; the others are None. The gradient by dt_bias is the
    sum of the gradient by dt over sequences and tokens.
    """
    arrays = (x, dt, A, B, C, dt_bias, initial_state, cu_seqlens, d_y, d_final_state)
    lib, queue = library_of(_GRADIENTS, *arrays).at(x, None)
    settings = _options(queue, dt_softplus, dt_limit, layout="bnhd")
    return _core.ssd_backward(lib, *arrays, wants, settings)


def _options(
    stream: int, dt_softplus: bool, dt_limit: tuple[float, float], method: str = "auto", layout: Layout = "bhnd"
) -> Options:
    least, greatest = limits(dt_limit)
    return options(method=method, layout=layout, stream=stream)._replace(
        dt_softplus=bool(dt_softplus), dt_min=least, dt_max=greatest
    )


def limits(dt_limit: Any) -> tuple[float, float]:
    """The limits of lengths as numbers.

    Raises:
        TypeError, ValueError: they are not two numbers 0 <= least <= greatest, greatest > 0.
    """
    try:
        least, greatest = dt_limit
    except (TypeError, ValueError):
        raise TypeError(f"dt_limit: expected two numbers, got {dt_limit!r}") from None
    least, greatest = real("dt_limit", least), real("dt_limit", greatest)
    if not (0 <= least <= greatest and greatest > 0):
        raise ValueError(f"dt_limit: expected 0 <= least <= greatest and greatest > 0, got {least:g} and {greatest:g}")
    return least, greatest
