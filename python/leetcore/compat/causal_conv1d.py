"""Functions of causal_conv1d, served by leetcore on every device.

The library is github.com/Dao-AILab/causal-conv1d, versions 1.4 to 1.6. Names, arguments, their
order and defaults are its own. `leetcore.torch` computes the results, with gradients.
`leetcore.compat.mamba_ssm.install` lets a program that imports causal_conv1d run without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..options import Activation
from ..torch import causal_conv1d, causal_conv1d_step
from ..torch.packing import one_row, packed

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: Activation | None = None,
) -> Any:
    """The causal convolution of each channel with its own weights.

    Args:
        x: [B, D, N].
        weight: [D, W].
        bias: [D] or None.
        seq_idx: [B, N] integers: the sequence of each token, where rows are packed; without
            initial_states and return_final_states.
        initial_states: [B, D, W - 1], the inputs before x. None: zeros.
        return_final_states: whether to return the last W - 1 inputs.
        final_states_out: [B, D, W - 1], where they are written; it is returned then.
        activation: None, "silu" or "swish".

    Returns:
        y [B, D, N] of x's dtype, or (y, final states [B, D, W - 1]).

    Raises:
        ValueError: seq_idx with states, or as in `leetcore.torch.causal_conv1d`.
        TypeError: as in `leetcore.torch.causal_conv1d`.
    """
    if seq_idx is None:
        y, states = causal_conv1d(
            x, weight, bias, activation=activation, initial_state=initial_states, return_state=True
        )
        if not return_final_states:
            return y
        return y, states if final_states_out is None else final_states_out.copy_(states)
    if initial_states is not None or return_final_states:
        raise ValueError("seq_idx: expected None with initial_states or return_final_states, got sequences")
    rows = packed(seq_idx, None, torch.Size((x.shape[0], x.shape[2])))
    assert rows is not None
    row = one_row(x.transpose(1, 2)).transpose(1, 2)
    y = causal_conv1d(row, weight, bias, activation=activation, cu_seqlens=rows.cu_seqlens)
    return y[0].unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """A step (or a few tokens) of the causal convolution, which updates the state in place.

    Where a gradient is required and there are no conv_state_indices, y has one.

    Args:
        x: [B, D] or [B, D, T].
        conv_state: [slots, D, L], L >= W - 1, the last inputs.
        weight: [D, W].
        bias: [D] or None.
        activation: None, "silu" or "swish".
        cache_seqlens: None. States that are circular buffers are not served.
        conv_state_indices: [B], int32 or int64, the slot of each sequence. None: sequence b uses
            slot b.

    Returns:
        y [B, D] or [B, D, T] of x's dtype.

    Raises:
        NotImplementedError: cache_seqlens is given, or as in `leetcore.torch.causal_conv1d_step`.
        ValueError, TypeError: as in `leetcore.torch.causal_conv1d_step`.
    """
    if cache_seqlens is not None:
        raise NotImplementedError("cache_seqlens: expected None, got a tensor; states are not circular buffers")
    y: Tensor = causal_conv1d_step(x, weight, conv_state, bias, activation=activation, state_indices=conv_state_indices)
    return y


def has_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def write_states(state: Tensor, slots: Tensor | None, after: Tensor) -> None:
    """Writes states into their slots."""
    after = after.detach().to(state.dtype)
    with torch.no_grad():
        if slots is None:
            state.copy_(after)
        else:
            state.index_copy_(0, slots, after)
