"""The causal convolution for arrays of any DLPack library: the layer that precedes the operator in
Mamba-2.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from . import _core
from .arrays import Array, Stream, library_of
from .options import Activation, conv_options


class ConvGradients(NamedTuple):
    """The result of `causal_conv1d_backward`. Each gradient has the shape and the dtype of the
    argument in its name. A gradient that was not wanted is None.
    """

    d_x: Any
    d_weight: Any
    d_bias: Any
    d_initial_state: Any


_FORWARD = ("x", "weight", "bias", "initial_state", "cu_seqlens", "out")
_BACKWARD = ("x", "weight", "bias", "initial_state", "cu_seqlens", "d_y", "d_final_state")
_STEP = ("x", "weight", "bias", "state", "state_indices", "out")


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: Activation | None = None,
    initial_state: Array | None = None,
    return_state: bool = False,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
    stream: Stream | None = None,
) -> Any:
    """The causal convolution of each channel with W taps, and an activation.

    For each channel::

        u_t = bias + sum_{i < W} weight_i x_{t-W+1+i}
        y_t = u_t, or u_t / (1 + exp(-u_t)) with activation="silu"

    Inputs before token 0 are those of initial_state, and 0 before them. Sums are in float32, or in
    float64 for float64. Source of the layer: Gu and Dao 2023, Mamba, arXiv:2312.00752.

    Args:
        x: [B, D, N] in float64, float32, float16 or bfloat16, with any strides. It is never copied.
            Calls are fast where tokens or channels are contiguous: a transposed view of [B, N, D]
            is as fast as [B, D, N].
        weight: [D, W] with 2 <= W <= 8, in the dtype of x or in float32 (float64 with float64
            inputs).
        bias: [D], with a dtype as for weight. None means zeros.
        activation: None, or "silu" (also named "swish").
        initial_state: [B, D, L], or [S, D, L] with cu_seqlens, with L >= W - 1: the last L inputs
            before token 0, the newest one last. Its dtype is that of x or float32 (float64 with
            float64 inputs). None means zeros.
        return_state: whether the last L inputs, of initial_state followed by x, are returned too.
        cu_seqlens: int32 or int64 [S + 1], the start offsets of S sequences that are packed along
            the token axis, from 0 to N; B is 1.
        out: an array that receives y; it is writable and shares no memory with another argument.
        stream: None. GPU arrays are refused; `leetcore.torch.causal_conv1d` takes them.

    Returns:
        y [B, D, N] of the dtype of x in the caller's array library, or (y, final_state). The
        channels of y are contiguous if those of x are. final_state has the shape and the dtype of
        initial_state; without initial_state, L is W - 1 and the dtype is that of x.

    Raises:
        ValueError, TypeError: an argument breaks the rules above; the text names the argument, what
            was given and what is allowed.
        NotImplementedError: the arrays are on a GPU.
    """
    arrays = (x, weight, bias, initial_state, cu_seqlens, out)
    lib, queue = library_of(_FORWARD, *arrays).at(x, stream)
    return _core.conv_forward(lib, *arrays, return_state, conv_options(activation, queue))


def causal_conv1d_backward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    d_y: Array | None = None,
    d_final_state: Array | None = None,
    activation: Activation | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    wants: Collection[str] | None = None,
    stream: Stream | None = None,
) -> ConvGradients:
    """The gradients of a loss by the arguments of `causal_conv1d`.

    The gradients of the loss by the results are d_y and d_final_state. The gradients do not depend
    on the number of threads.

    Args:
        x, weight, bias, activation, initial_state, cu_seqlens, stream: as in the call of
            `causal_conv1d`.
        d_y: [B, D, N], with the dtype of x. None means zeros.
        d_final_state: an array with the shape and the dtype of the state that return_state=True
            returns. None means zeros. At least one of d_y and d_final_state is given.
        wants: names of the gradients to compute. The default is those of all arguments that are
            given.

    Returns:
        ConvGradients(d_x, d_weight, d_bias, d_initial_state) in the caller's array library. Each
        has the shape and the dtype of the argument in its name; d_x has the layout of x. d_bias and
        d_initial_state may be wanted without a bias and an initial_state; d_bias then has the dtype
        of weight, and d_initial_state that of d_final_state or of x.

    Raises:
        ValueError, TypeError, NotImplementedError: as `causal_conv1d`.
    """
    arrays = (x, weight, bias, initial_state, cu_seqlens, d_y, d_final_state)
    lib, queue = library_of(_BACKWARD, *arrays).at(x, stream)
    if wants is None:
        given = (True, True, bias is not None, initial_state is not None)
    else:
        if isinstance(wants, str) or not set(wants) <= set(ConvGradients._fields):
            raise ValueError(f"wants: expected names among {', '.join(ConvGradients._fields)}, got {wants!r}")
        given = ("d_x" in wants, "d_weight" in wants, "d_bias" in wants, "d_initial_state" in wants)
    return ConvGradients(*_core.conv_backward(lib, *arrays, given, conv_options(activation, queue)))


def causal_conv1d_step(
    x: Array,
    weight: Array,
    state: Array,
    bias: Array | None = None,
    *,
    activation: Activation | None = None,
    state_indices: Array | None = None,
    out: Array | None = None,
    stream: Stream | None = None,
) -> Any:
    """One step of generation, for one token or a few: updates states in place and returns the
    outputs.

    Args:
        x: [B, D], or [B, D, T] for T <= 64 tokens at once; otherwise as in `causal_conv1d`.
        weight, bias, activation, stream: as in `causal_conv1d`.
        state: [slots, D, L] with L >= W - 1, read and updated in place: the last L inputs, the
            newest one last. Its dtype is that of x or float32 (float64 with float64 inputs).
        state_indices: int32 or int64 [B], the slot of each sequence; no slot is named twice. -1
            skips a sequence, whose output is 0. Without state_indices sequence b uses slot b.
        out: an array that receives the output.

    Returns:
        y, [B, D] or [B, D, T]. Raises as `causal_conv1d`.
    """
    arrays = (x, weight, bias, state, state_indices, out)
    lib, queue = library_of(_STEP, *arrays).at(x, stream)
    return _core.conv_step(lib, *arrays, conv_options(activation, queue))
