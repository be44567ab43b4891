"""The causal convolution composed of torch's own functions, for tensors on a GPU.

Sums over taps are products and sums of whole tensors in float32, or in float64 for float64: a
convolution of cuDNN may round float32 to tf32.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y and final_state of `leetcore.causal_conv1d`. cu_seqlens is read on the host."""
    parts = _parts(x, cu_seqlens, initial_state)
    outputs, states = [], []
    for part, state in parts:
        u = _sums(_inputs(part, weight, state), weight, bias, part.shape[2])
        outputs.append((torch.nn.functional.silu(u) if silu else u).to(x.dtype))
        states.append(_last(part, weight, state))
    return like(x, torch.cat(outputs, 2)), torch.cat(states)


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    d_y: Tensor | None,
    d_final_state: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients d_x, d_weight, d_bias and d_initial_state."""
    exact = _exact(x)
    W = weight.shape[1]
    known = initial_state if initial_state is not None else d_final_state
    L, state_dtype = (W - 1, x.dtype) if known is None else (known.shape[2], known.dtype)
    d_weight = torch.zeros(weight.shape, dtype=exact, device=x.device)
    d_bias = torch.zeros(weight.shape[:1], dtype=exact, device=x.device)
    of_x, of_states = [], []
    d_outputs = torch.zeros_like(x) if d_y is None else d_y
    d_parts = _parts(d_outputs, cu_seqlens, d_final_state)
    for (part, state), (d_part, d_state) in zip(_parts(x, cu_seqlens, initial_state), d_parts, strict=True):
        N = part.shape[2]
        inputs = _inputs(part, weight, state)
        d_u = d_part.to(exact)
        if silu:
            u = _sums(inputs, weight, bias, N)
            s = torch.sigmoid(u)
            d_u = d_u * (s * (1 + u * (1 - s)))
        d_inputs = torch.zeros((*part.shape[:2], L + N), dtype=exact, device=x.device)
        for i, w in enumerate(weight.to(exact).unbind(1)):
            first = L - W + 1 + i
            d_inputs[:, :, first : first + N] += w[:, None] * d_u
            d_weight[:, i] += (d_u * inputs[:, :, i : i + N]).sum((0, 2))
        d_bias += d_u.sum((0, 2))
        if d_state is not None:
            d_inputs[:, :, N:] += d_state
        of_x.append(d_inputs[:, :, L:].to(x.dtype))
        of_states.append(d_inputs[:, :, :L].to(state_dtype))
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return like(x, torch.cat(of_x, 2)), d_weight.to(weight.dtype), d_bias.to(bias_dtype), torch.cat(of_states)


def step(
    x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None, state_indices: Tensor | None, silu: bool
) -> Tensor:
    """The outputs of `leetcore.causal_conv1d_step`; state is updated in place."""
    tokens = x[:, :, None] if x.ndim == 2 else x
    if state_indices is None:
        before = state[: len(x)]
        y, after = forward(tokens, weight, bias, before, None, silu)
        before.copy_(after)
    else:
        # A skipped sequence repeats the write of the first one that is not skipped, since the
        # number of skipped ones is on the device. If all are skipped, slot 0 is written as it is.
        live = (state_indices >= 0) & (state_indices < len(state))
        source = torch.where(live, torch.arange(len(x), device=x.device), live.int().argmax())
        slots = torch.where(live, state_indices, 0).long()[source]
        before = state[slots]
        y, after = forward(tokens, weight, bias, before, None, silu)
        y = torch.where(live[:, None, None], y, 0)
        state[slots] = torch.where(live.any(), after[source], before)
    return y[:, :, 0].contiguous() if x.ndim == 2 else like(x, y)


def like(x: Tensor, y: Tensor) -> Tensor:
    """y in the layout that the results of a convolution of x have."""
    if has_contiguous_channels(x):
        return y.transpose(1, 2).contiguous().transpose(1, 2)
    return y.contiguous()


def has_contiguous_channels(x: Tensor) -> bool:
    """Whether the channels of results are contiguous, as those of x are."""
    return x.ndim == 3 and x.stride(1) == 1 and x.stride(2) != 1 and x.shape[1] > 1 and x.shape[2] > 1


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _parts(x: Tensor, cu_seqlens: Tensor | None, states: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """The inputs and the state of each sequence, or of the whole batch."""
    if cu_seqlens is None:
        return [(x, states)]
    bounds = itertools.pairwise(cu_seqlens.tolist())
    return [
        (x[:, :, begin:end], None if states is None else states[s : s + 1]) for s, (begin, end) in enumerate(bounds)
    ]


def _inputs(x: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
    """The W - 1 inputs before x, and x."""
    before = weight.shape[1] - 1
    if state is None:
        return torch.nn.functional.pad(x.to(_exact(x)), (before, 0))
    return torch.cat([state[:, :, state.shape[2] - before :].to(_exact(x)), x.to(_exact(x))], 2)


def _sums(inputs: Tensor, weight: Tensor, bias: Tensor | None, N: int) -> Tensor:
    u = torch.zeros((), dtype=inputs.dtype, device=inputs.device) if bias is None else bias.to(inputs.dtype)[:, None]
    for i, w in enumerate(weight.to(inputs.dtype).unbind(1)):
        u = u + w[:, None] * inputs[:, :, i : i + N]
    return u


def _last(x: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
    """The last L inputs, of the state followed by x."""
    if state is None:
        state = x.new_zeros((*x.shape[:2], weight.shape[1] - 1))
    return torch.cat([state, x.to(state.dtype)], 2)[:, :, x.shape[2] :]
