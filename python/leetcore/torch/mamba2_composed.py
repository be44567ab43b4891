"""Mamba-2 composed from `linear_attention` and operators of torch, for tensors on a GPU, where no
method of the library takes lengths of tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import api
from . import rules
from .inputs import SsdBackwardInputs, SsdGradients, SsdInputs, SsdStepInputs


def exact_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def core_wants(args: SsdBackwardInputs) -> tuple[bool, bool, bool, bool, bool, bool]:
    """Which of d_x, d_dt, d_A, d_B, d_C and d_initial_state to compute."""
    wants = SsdGradients(*args.wants)
    return wants.d_x, wants.d_dt or wants.d_dt_bias, wants.d_A, wants.d_B, wants.d_C, wants.d_initial_state


def _lengths(args: Any) -> Tensor:
    before = _before_limits(args)
    return before.clamp(args.dt_min, args.dt_max or None)


def _before_limits(args: Any) -> Tensor:
    u = _dt(args)
    return F.softplus(u) if args.dt_softplus else u


def _dt(args: Any) -> Tensor:
    dt: Tensor = args.dt.to(exact_dtype(args.x))
    return dt if args.dt_bias is None else dt + args.dt_bias


def _slopes(args: Any) -> Tensor:
    """The derivatives of lengths by dt."""
    before = _before_limits(args)
    slopes = torch.sigmoid(_dt(args)) if args.dt_softplus else torch.ones_like(before)
    return torch.where((before < args.dt_min) | (before > (args.dt_max or math.inf)), 0, slopes)


def _finished(args: Any, y: Tensor) -> Tensor:
    """y with the skip and the gate, in x's dtype."""
    exact = exact_dtype(args.x)
    if args.D is not None:
        y = y.to(exact) + args.x * (args.D if args.D.ndim == 2 else args.D[:, None]).to(exact)
    if args.z is not None:
        y = y.to(exact) * F.silu(args.z.to(exact))
    return y.to(args.x.dtype)


def _transposed(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.transpose(2, 3).contiguous()


def forward(args: SsdInputs) -> tuple[Tensor, Tensor]:
    """The kernel of ssd on a GPU, composed from linear_attention and operators of torch."""
    lengths = _lengths(args)
    result = api.linear_attention(
        args.C,
        args.B,
        (args.x * lengths[..., None]).to(args.x.dtype),
        lengths * args.A,
        initial_state=_transposed(args.initial_state),
        return_state=args.return_state,
        cu_seqlens=args.cu_seqlens,
        layout="bnhd",
        method=args.method,
    )
    y, state = result if args.return_state else (result, None)
    return _finished(args, y), rules.absent(args.x) if state is None else state.transpose(2, 3).contiguous()


def core_gradients(args: SsdBackwardInputs) -> Any:
    """The gradients by x, dt, A, B, C and initial_state, composed likewise. d_y has passed the
    gate."""
    wants = dict(zip(("x", "dt", "A", "B", "C", "state"), core_wants(args), strict=True))
    if not any(wants.values()) or (args.d_y is None and args.d_final_state is None):
        return (None,) * 6
    weight = _lengths(args)
    d = api.linear_attention_backward(
        args.C,
        args.B,
        (args.x * weight[..., None]).to(args.x.dtype),
        weight * args.A,
        d_o=args.d_y,
        d_final_state=_transposed(args.d_final_state),
        initial_state=_transposed(args.initial_state),
        cu_seqlens=args.cu_seqlens,
        layout="bnhd",
        wants=[
            name
            for name, wanted in (
                ("d_q", wants["C"]),
                ("d_k", wants["B"]),
                ("d_v", wants["x"] or wants["dt"]),
                ("d_log_decay", wants["A"] or wants["dt"]),
                ("d_initial_state", wants["state"]),
            )
            if wanted
        ],
    )
    d_x = d_dt = d_A = None
    if wants["x"]:
        d_x = (d.d_v * weight[..., None]).to(args.x.dtype)
    if wants["A"]:
        d_A = (d.d_log_decay * weight).sum((0, 1))
    if wants["dt"]:
        by_length = (d.d_v.to(weight.dtype) * args.x).sum(-1) + d.d_log_decay * args.A
        d_dt = by_length * _slopes(args)
    return d_x, d_dt, d_A, d.d_k, d.d_q, _transposed(d.d_initial_state)


def step(args: SsdStepInputs) -> Tensor:
    """The kernel of ssd_step on a GPU, composed from operators of torch."""
    exact, state = exact_dtype(args.x), args.state
    lengths = _lengths(args)
    slots = args.state_indices
    rows = (state[: args.x.shape[0]] if slots is None else state[slots.clamp(0)]).to(exact)
    B, C = (y.to(exact).repeat_interleave(state.shape[1] // y.shape[1], 1) for y in (args.B, args.C))
    weighed = args.x.to(exact) * lengths[..., None]
    after = rows * torch.exp(lengths * args.A)[..., None, None] + weighed[..., None] * B[:, :, None]
    y = _finished(args, (after @ C[..., None]).squeeze(-1))
    if slots is None:
        state[: args.x.shape[0]].copy_(after)
        return y
    live = slots >= 0
    state[slots[live]] = after[live].to(state.dtype)
    return torch.where(live[:, None, None], y, 0)
