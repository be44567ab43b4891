"""Mamba-2 as operators of torch: `ssd`, its gradients and `ssd_step`.

On the CPU each kernel is one call of the library; only the skip and the gate have their gradients
from torch. On a GPU, where no method of the library takes lengths of tokens, the same results are
composed from `linear_attention` and operators of torch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function

from .. import api, mamba2
from . import autograd, rules
from .inputs import SsdBackwardInputs, SsdInputs, SsdStepInputs, is_number, stand_in

_operators: Any = torch.ops.leetcore


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    method: str = "auto",
) -> Any:
    """The state space model of Mamba-2 (arXiv:2405.21060), as an operator of torch.

    The operator is `leetcore.ssd` with gradients of y and of the final state by x, dt, A, B, C, D,
    z, dt_bias and initial_state. torch.compile treats it as opaque and keeps the graph whole.
    Second derivatives are not available. Under autocast, x, B, C and z are cast to autocast's
    dtype, the others to float32.

    Args:
        x: [B, N, H, P] in float64, float32, float16 or bfloat16.
        dt: [B, N, H] of x's dtype or float32.
        A: [H], <= 0. Dtypes of 16 bits are cast to float32.
        B: [B, N, G, K] of x's dtype. G divides H; head h reads group h * G // H.
        C: [B, N, G, K] of x's dtype.
        D: [H] or [H, P] of x's dtype or float32. None: 0.
        z: [B, N, H, P] of x's dtype. None: no gate.
        dt_bias: [H] of x's dtype or float32. None: 0.
        dt_softplus: whether lengths are softplus(dt + dt_bias).
        dt_limit: the least and the greatest length, 0 <= least <= greatest.
        initial_state: [B, H, P, K], or [S, H, P, K] with cu_seqlens. Dtypes of 16 bits are cast to
            float32. None: zeros.
        return_state: whether to also return the state after the last token, in float32 (float64
            with float64 inputs).
        cu_seqlens: [S + 1], int32 or int64: start offsets of S sequences packed along the token
            axis, from 0 to N; B is 1.
        method: "auto" or a name of `leetcore.methods()`.

    Returns:
        y [B, N, H, P] of x's dtype, or (y, final_state) with return_state.

    Raises:
        ValueError, TypeError: an argument breaks the rules above.
        NotImplementedError: no method, or not the named one, serves the call, or it is inside of
            torch.vmap.
        RuntimeError: a GPU cannot be used, or reported an error.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    if _any_stand_in(SsdInputs, tensors):
        return handle_torch_function(
            ssd,
            tensors,
            *tensors[:6],
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            initial_state=initial_state,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
            method=method,
        )
    y, final_state = _operators.ssd.default(
        x,
        dt,
        _exact(A, x),
        B,
        C,
        D,
        z,
        dt_bias,
        _exact(initial_state, x),
        cu_seqlens,
        bool(dt_softplus),
        *_limits(dt_limit),
        bool(return_state),
        method,
    )
    return (y, final_state) if return_state else y


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state_indices: Tensor | None = None,
) -> Tensor:
    """One token of `ssd` for each sequence, as an operator of torch; updates `state` in place.

    It has no gradient; use `ssd` with initial_state where a gradient is needed.

    Args:
        x: [B, H, P]; z likewise.
        dt: [B, H].
        A, D, dt_bias, dt_softplus, dt_limit: as in `ssd`.
        B, C: [B, G, K].
        state: [slots, H, P, K], read and updated in place; float32, float16 or bfloat16 (float64
            with float64 inputs). A 16-bit state is rounded once per call.
        state_indices: [B], int32 or int64, the slot of each sequence, all different; -1 skips a
            sequence, whose output is 0. None: sequence b uses slot b.

    Returns:
        y, [B, H, P], of x's dtype.

    Raises:
        ValueError, TypeError: an argument breaks the rules above.
        NotImplementedError: an argument requires a gradient while gradients are enabled, or the
            call is inside of torch.vmap.
    """
    tensors = (x, dt, A, B, C, state, D, z, dt_bias, state_indices)
    if _any_stand_in(SsdStepInputs, tensors):
        return handle_torch_function(
            ssd_step,
            tensors,
            *tensors[:7],
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            state_indices=state_indices,
        )
    limits = _limits(dt_limit)
    y: Tensor = _operators.ssd_step.default(
        x, dt, _exact(A, x), B, C, state, D, z, dt_bias, state_indices, bool(dt_softplus), *limits
    )
    return y


def _any_stand_in(inputs: Any, tensors: tuple[Any, ...]) -> bool:
    return stand_in(**dict(zip(inputs._fields, tensors, strict=False)))


def _limits(dt_limit: tuple[float, float]) -> tuple[float, float]:
    """The limits as the operators take them: a greatest length of 0 is infinity."""
    least, greatest = mamba2.limits(dt_limit)
    return least, 0.0 if greatest == math.inf else greatest


def _exact_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _exact(value: Any, x: Tensor) -> Any:
    """A tensor in float32 at least; a number as a tensor."""
    if is_number(value):
        return torch.full((x.shape[-2],), value, dtype=_exact_dtype(x), device=x.device)
    if isinstance(value, Tensor) and value.is_floating_point() and value.element_size() == 2:
        return value.float()
    return value


# ---- kernels


def forward(args: SsdInputs) -> tuple[Tensor, Tensor]:
    """The kernel of ssd on the CPU."""
    result = mamba2.ssd(
        *args[:6],
        z=args.z,
        dt_bias=args.dt_bias,
        dt_softplus=args.dt_softplus,
        dt_limit=_dt_limit(args),
        initial_state=args.initial_state,
        return_state=args.return_state,
        cu_seqlens=args.cu_seqlens,
        method=args.method,
    )
    return result if args.return_state else (result, rules.absent(args.x))


def backward(args: SsdBackwardInputs) -> tuple[Tensor, ...]:
    """The kernel of ssd_backward on the CPU."""
    return _gradients(args, forward, _core_backward)


def _gradients(args: SsdBackwardInputs, forward: Any, core: Any) -> tuple[Tensor, ...]:
    """The gradients that are wanted, and empty tensors for others.

    Args:
        forward: a kernel of ssd.
        core: a function that computes the gradients without the skip and the gate.
    """
    wants = SsdGradients(*args.wants)
    x, d_y, exact = args.x, args.d_y, _exact_dtype(args.x)
    d_D = d_z = d_dt_bias = None
    if args.z is not None and d_y is not None:
        z = args.z.to(exact)
        sigmoid = torch.sigmoid(z)
        if wants.d_z:
            ungated, _ = forward(_forward_inputs(args))
            d_z = (d_y * ungated.to(exact) * sigmoid * (1 + z * (1 - sigmoid))).to(args.z.dtype)
        d_y = (d_y * (z * sigmoid)).to(x.dtype)
    if args.D is not None and d_y is not None and wants.d_D:
        d_D = (d_y.to(exact) * x).sum((0, 1, 3) if args.D.ndim == 1 else (0, 1)).to(args.D.dtype)
    # dt in 32 bits at least: the gradient of dt_bias is a sum over tokens.
    d_x, d_dt, d_A, d_B, d_C, d_initial_state = core(args._replace(dt=_exact(args.dt, x), d_y=d_y))
    if args.D is not None and d_y is not None and d_x is not None:
        d_x = torch.addcmul(d_x, d_y, (args.D if args.D.ndim == 2 else args.D[:, None]).to(x.dtype))
    if wants.d_dt_bias and d_dt is not None and args.dt_bias is not None:
        d_dt_bias = d_dt.sum((0, 1)).to(args.dt_bias.dtype)
    if d_dt is not None:
        d_dt = d_dt.to(args.dt.dtype)
    found = SsdGradients(d_x, d_dt, d_A, d_B, d_C, d_D, d_z, d_dt_bias, d_initial_state)
    return tuple(
        (rules.absent(x) if not wanted else given.new_zeros(given.shape) if d is None else d)
        for d, wanted, given in zip(found, wants, SsdGradients(*args[:9]), strict=True)
    )


def step(args: SsdStepInputs) -> Tensor:
    """The kernel of ssd_step on the CPU."""
    y: Tensor = mamba2.ssd_step(
        *args[:7],
        z=args.z,
        dt_bias=args.dt_bias,
        dt_softplus=args.dt_softplus,
        dt_limit=_dt_limit(args),
        state_indices=args.state_indices,
    )
    return y


class SsdGradients(NamedTuple):
    """Gradients by the differentiable inputs of ssd, in the order of SsdInputs."""

    d_x: Any
    d_dt: Any
    d_A: Any
    d_B: Any
    d_C: Any
    d_D: Any
    d_z: Any
    d_dt_bias: Any
    d_initial_state: Any


def _dt_limit(args: Any) -> tuple[float, float]:
    return args.dt_min, args.dt_max or math.inf


def _forward_inputs(args: SsdBackwardInputs) -> SsdInputs:
    """The inputs of the forward pass without its gate."""
    shared = {name: getattr(args, name) for name in SsdInputs._fields if name in SsdBackwardInputs._fields}
    return SsdInputs(**shared)._replace(z=None)


def _core_wants(args: SsdBackwardInputs) -> tuple[bool, bool, bool, bool, bool, bool]:
    """Which of d_x, d_dt, d_A, d_B, d_C and d_initial_state to compute."""
    wants = SsdGradients(*args.wants)
    return wants.d_x, wants.d_dt or wants.d_dt_bias, wants.d_A, wants.d_B, wants.d_C, wants.d_initial_state


def _core_backward(args: SsdBackwardInputs) -> Any:
    wants = _core_wants(args)
    if not any(wants) or (args.d_y is None and args.d_final_state is None):
        return (None,) * 6
    return mamba2.core_gradients(
        *args[:5],
        args.dt_bias,
        args.initial_state,
        args.cu_seqlens,
        d_y=args.d_y,
        d_final_state=args.d_final_state,
        dt_softplus=args.dt_softplus,
        dt_limit=_dt_limit(args),
        wants=wants,
    )


# ---- the same from other operators


def _lengths(args: Any) -> Tensor:
    before = _before_limits(args)
    return before.clamp(args.dt_min, args.dt_max or None)


def _before_limits(args: Any) -> Tensor:
    u = _dt(args)
    return F.softplus(u) if args.dt_softplus else u


def _dt(args: Any) -> Tensor:
    dt: Tensor = args.dt.to(_exact_dtype(args.x))
    return dt if args.dt_bias is None else dt + args.dt_bias


def _slopes(args: Any) -> Tensor:
    """The derivatives of lengths by dt."""
    before = _before_limits(args)
    slopes = torch.sigmoid(_dt(args)) if args.dt_softplus else torch.ones_like(before)
    return torch.where((before < args.dt_min) | (before > (args.dt_max or math.inf)), 0, slopes)


def _finished(args: Any, y: Tensor) -> Tensor:
    """y with the skip and the gate, in x's dtype."""
    exact = _exact_dtype(args.x)
    if args.D is not None:
        y = y.to(exact) + args.x * (args.D if args.D.ndim == 2 else args.D[:, None]).to(exact)
    if args.z is not None:
        y = y.to(exact) * F.silu(args.z.to(exact))
    return y.to(args.x.dtype)


def _transposed(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.transpose(2, 3).contiguous()


def composed_forward(args: SsdInputs) -> tuple[Tensor, Tensor]:
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


def composed_backward(args: SsdBackwardInputs) -> tuple[Tensor, ...]:
    """The kernel of ssd_backward on a GPU, composed likewise."""
    return _gradients(args, composed_forward, _composed_core)


def _composed_core(args: SsdBackwardInputs) -> Any:
    """The gradients by x, dt, A, B, C and initial_state, composed likewise. d_y has passed the
    gate."""
    wants = dict(zip(("x", "dt", "A", "B", "C", "state"), _core_wants(args), strict=True))
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


def composed_step(args: SsdStepInputs) -> Tensor:
    """The kernel of ssd_step on a GPU, composed from operators of torch."""
    exact, state = _exact_dtype(args.x), args.state
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


# ---- gradients


_DIFFERENTIABLE = tuple(name.removeprefix("d_") for name in SsdGradients._fields)


class _Forward:
    inputs = SsdInputs

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        args = SsdInputs(*inputs)
        ctx.save_for_backward(*args[:10])
        ctx.options = args[10:]
        ctx.set_materialize_grads(False)
        return autograd.run_in_function(_operators.ssd.default, inputs)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
        args = SsdInputs(*ctx.saved_tensors, *ctx.options)
        d_final_state = d_final_state if args.return_state else None
        if d_y is None and d_final_state is None:
            return (None,) * len(SsdInputs._fields)
        wants = ctx.needs_input_grad[: len(_DIFFERENTIABLE)]
        known = args._asdict() | {"d_y": d_y, "d_final_state": d_final_state, "wants": list(wants)}
        gradients = _operators.ssd_backward.default(*(known[name] for name in SsdBackwardInputs._fields))
        found = [d if wanted else None for d, wanted in zip(gradients, wants, strict=True)]
        return (*found, *[None] * (len(SsdInputs._fields) - len(found)))


class _Backward:
    inputs = SsdBackwardInputs

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        return autograd.run_in_function(_operators.ssd_backward.default, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> None:
        raise NotImplementedError("leetcore.torch.ssd has first derivatives only; expected no gradient of its gradient")


def forward_kernel(*inputs: Any) -> Any:
    """The Autograd kernel of ssd."""
    return autograd.differentiated(_Forward, _operators.ssd.default, inputs)


def backward_kernel(*inputs: Any) -> Any:
    """The Autograd kernel of ssd_backward."""
    return autograd.differentiated(_Backward, _operators.ssd_backward.default, inputs)


def step_kernel(*inputs: Any) -> Any:
    """The Autograd kernel of ssd_step, which refuses inputs that require gradients."""
    state = inputs[SsdStepInputs._fields.index("state")]
    return autograd.in_place("ssd_step", "ssd", _operators.ssd_step.default, state, inputs)


# ---- shapes, torch.vmap and flop


def forward_shapes(args: SsdInputs) -> tuple[Tensor, Tensor]:
    """Empty results of ssd."""
    rules.require_one_device("x", args.x, *args[1:10])
    x = args.x
    if not args.return_state:
        return x.new_empty(x.shape), rules.absent(x)
    sequences = x.shape[0] if args.cu_seqlens is None else args.cu_seqlens.shape[0] - 1
    shape = (sequences, *x.shape[2:], args.B.shape[3])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=_exact_dtype(x))


def backward_shapes(args: SsdBackwardInputs) -> tuple[Tensor, ...]:
    """Empty results of ssd_backward."""
    rules.require_one_device("x", args.x, *args[1:12])
    return tuple(
        given.new_empty(given.shape) if wanted and given is not None else rules.absent(args.x)
        for given, wanted in zip(args[:9], args.wants, strict=True)
    )


def step_shapes(args: SsdStepInputs) -> Tensor:
    """An empty result of ssd_step."""
    rules.require_one_device("x", args.x, *args[1:10])
    return args.x.new_empty(args.x.shape)


def vmap_refusal(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    """Refuses a batch of calls."""
    raise NotImplementedError("leetcore.torch.ssd: expected no torch.vmap; use its batch dimension")


def _flop(x: Any, B: Any, of_K: int, of_P: int, of_KP: int) -> int:
    K, P = B[3], x[3]
    count: int = x[0] * x[1] * x[2] * (65 * (of_K * K + of_P * P) + of_KP * K * P)
    return count


def forward_flop(*inputs: Any, out_shape: Any = None, **named: Any) -> int:
    """The flop count of ssd, in chunks of 64 tokens."""
    args: Any = SsdInputs(*inputs, **named)
    return _flop(args.x, args.B, 1, 1, 4)


def backward_flop(*inputs: Any, out_shape: Any = None, **named: Any) -> int:
    """The flop count of ssd_backward, in chunks of 64 tokens."""
    args: Any = SsdBackwardInputs(*inputs, **named)
    return _flop(args.x, args.B, 3, 2, 10)


def step_flop(*inputs: Any, out_shape: Any = None, **named: Any) -> int:
    """The flop count of ssd_step."""
    args: Any = SsdStepInputs(*inputs, **named)
    count: int = 4 * args.x[0] * args.x[1] * args.x[2] * args.B[2]
    return count
