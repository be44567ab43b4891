"""Mamba-2 as operators of torch: `ssd`, its gradients and `ssd_step`.

Each kernel is one call of the library; only the skip and the gate have their gradients from torch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import mamba2
from . import autograd, rules
from .inputs import SsdBackwardInputs, SsdGradients, SsdInputs, SsdStepInputs, is_number, stand_in
from .mamba2_rules import exact_dtype

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


def _exact(value: Any, x: Tensor) -> Any:
    """A tensor in float32 at least; a number as a tensor."""
    if is_number(value):
        return torch.full((x.shape[-2],), value, dtype=exact_dtype(x), device=x.device)
    if isinstance(value, Tensor) and value.is_floating_point() and value.element_size() == 2:
        return value.float()
    return value


# ---- kernels


def forward(args: SsdInputs) -> tuple[Tensor, Tensor]:
    """The kernel of ssd."""
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
    """The kernel of ssd_backward: the gradients that are wanted, and empty tensors for others."""
    wants = SsdGradients(*args.wants)
    x, d_y, exact = args.x, args.d_y, exact_dtype(args.x)
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
    d_x, d_dt, d_A, d_B, d_C, d_initial_state = _core(args._replace(dt=_exact(args.dt, x), d_y=d_y))
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
    """The kernel of ssd_step."""
    y: Tensor = mamba2.ssd_step(
        *args[:7],
        z=args.z,
        dt_bias=args.dt_bias,
        dt_softplus=args.dt_softplus,
        dt_limit=_dt_limit(args),
        state_indices=args.state_indices,
    )
    return y


def _dt_limit(args: Any) -> tuple[float, float]:
    return args.dt_min, args.dt_max or math.inf


def _forward_inputs(args: SsdBackwardInputs) -> SsdInputs:
    """The inputs of the forward pass without its gate."""
    shared = {name: getattr(args, name) for name in SsdInputs._fields if name in SsdBackwardInputs._fields}
    return SsdInputs(**shared)._replace(z=None)


def _core(args: SsdBackwardInputs) -> Any:
    """The gradients by x, dt, A, B, C and initial_state, of y before the skip and the gate."""
    asked = SsdGradients(*args.wants)
    wants = (
        asked.d_x,
        asked.d_dt or asked.d_dt_bias,
        asked.d_A,
        asked.d_B,
        asked.d_C,
        asked.d_initial_state,
    )
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
