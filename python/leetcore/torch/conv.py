"""The causal convolution as operators of torch: functions that call them, inputs, kernels,
gradients, and what torch asks about them.

One operator is functional and differentiable, one computes its gradients, one updates a state in
place. The CPU kernels call the library; `composed.py` has those of a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import _core, conv
from ..arrays import TORCH
from ..options import Activation, conv_options, is_silu
from . import composed
from .autograd import apply, is_differentiated, run, run_in_function
from .composed import has_contiguous_channels
from .definition import Operator
from .inputs import Updated, stand_in
from .rules import absent, require_one_device


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """The causal convolution of each channel with W taps, as an operator of torch.

    The operator is `leetcore.causal_conv1d` with gradients. torch.compile treats it as opaque and
    keeps the graph whole. Gradients flow from y and from final_state to x, weight, bias and
    initial_state. Second derivatives are not available.

    Under autocast, x is cast to autocast's dtype; weight, bias and initial_state are cast to
    float32 if they have another dtype than these two. torch.vmap adds its dimension to the
    channels. On a GPU the operator is composed of torch's own functions, which reads cu_seqlens on
    the host.

    Args:
        x: [B, D, N], float64, float32, float16 or bfloat16, with any strides; it is never copied.
        weight: [D, W] with 2 <= W <= 8, in the dtype of x or in float32 (float64 with float64
            inputs).
        bias: [D], with a dtype as for weight. None: zeros.
        activation: None, or "silu" (also named "swish").
        initial_state: [B, D, L], or [S, D, L] with cu_seqlens, with L >= W - 1: the last L inputs
            before token 0, in the dtype of x or in float32. None: zeros.
        return_state: whether to also return the last L inputs, of initial_state followed by x.
        cu_seqlens: [S + 1], int32 or int64: start offsets of S sequences packed along the token
            axis, from 0 to N; B is 1.

    Returns:
        y [B, D, N] of the dtype of x, or (y, final_state) with return_state. The channels of y are
        contiguous if those of x are. final_state has the shape and the dtype of initial_state;
        without initial_state, L is W - 1 and the dtype is that of x.

    Raises:
        ValueError, TypeError: an argument breaks the rules above.
    """
    if stand_in(x=x, weight=weight, bias=bias, initial_state=initial_state, cu_seqlens=cu_seqlens):
        return handle_torch_function(
            causal_conv1d,
            (x, weight, bias, initial_state, cu_seqlens),
            x,
            weight,
            bias,
            activation=activation,
            initial_state=initial_state,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
        )
    y, final_state = _operators.causal_conv1d.default(
        x, weight, bias, initial_state, cu_seqlens, is_silu(activation), return_state
    )
    return (y, final_state) if return_state else y


def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One step (or a few tokens) of generation, as an operator of torch; updates `state` in place.

    The operator is `leetcore.causal_conv1d_step`, in eager and in compiled code. Where gradients
    are enabled and an argument requires one, the step is computed by `causal_conv1d`, with
    gradients, and its final state is copied to `state`.

    Args:
        x: [B, D], or [B, D, T] for T <= 64 tokens; float64, float32, float16 or bfloat16.
        weight: [D, W], as in `causal_conv1d`.
        state: [slots, D, L] with L >= W - 1, read and updated in place: the last L inputs, in the
            dtype of x or in float32.
        bias: [D] or None, as in `causal_conv1d`.
        activation: None, or "silu" (also named "swish").
        state_indices: [B], int32 or int64, the slot of each sequence, all different; -1 skips a
            sequence, whose output is 0. None: sequence b uses slot b.

    Returns:
        y, [B, D] or [B, D, T], of the dtype of x.

    Raises:
        ValueError, TypeError: an argument breaks the rules above.
        NotImplementedError: state_indices are given while an argument requires a gradient, or the
            call is inside of torch.vmap.
    """
    if stand_in(x=x, weight=weight, state=state, bias=bias, state_indices=state_indices):
        tensors = (x, weight, state, bias, state_indices)
        return handle_torch_function(
            causal_conv1d_step, tensors, x, weight, state, bias, activation=activation, state_indices=state_indices
        )
    silu = is_silu(activation)
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (x, weight, state, bias)):
        return _differentiable_step(x, weight, state, bias, state_indices, silu)
    y: Tensor = _operators.causal_conv1d_step.default(x, weight, state, bias, state_indices, silu)
    return y


def _differentiable_step(
    x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None, state_indices: Tensor | None, silu: bool
) -> Tensor:
    if state_indices is not None:
        raise NotImplementedError(
            "state_indices: expected None where an argument requires a gradient, or torch.no_grad(), as states of a "
            "pool are updated without a gradient"
        )
    tokens = x[:, :, None] if x.ndim == 2 else x
    before = state[: x.shape[0]]
    y, after = _operators.causal_conv1d.default(tokens, weight, bias, before.clone(), None, silu, True)
    before.copy_(after)
    result: Tensor = y[:, :, 0] if x.ndim == 2 else y
    return result


# ---- inputs, as inputs.py describes them


class ForwardInputs(NamedTuple):
    """Inputs of `causal_conv1d`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    silu: bool = False
    return_state: bool = False


class BackwardInputs(NamedTuple):
    """Inputs of `causal_conv1d_backward`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    d_y: Tensor | None
    d_final_state: Tensor | None
    silu: bool
    wants: list[bool]  # which fields of `leetcore.ConvGradients` to compute


class StepInputs(NamedTuple):
    """Inputs of `causal_conv1d_step`."""

    x: Tensor
    weight: Tensor
    state: Updated
    bias: Tensor | None = None
    state_indices: Tensor | None = None
    silu: bool = False


_operators: Any = torch.ops.leetcore
_DIFFERENTIABLE = 4  # x, weight, bias, initial_state: the first inputs, in the order of ConvGradients


def _name(silu: bool) -> Activation | None:
    return "silu" if silu else None


# ---- kernels


def _forward(args: ForwardInputs) -> tuple[Tensor, Tensor]:
    x, weight, bias, initial_state, cu_seqlens, silu, return_state = args
    result = conv.causal_conv1d(
        x,
        weight,
        bias,
        activation=_name(silu),
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_state=return_state,
    )
    return result if return_state else (result, absent(x))


def _backward(args: BackwardInputs) -> tuple[Tensor, ...]:
    x, weight, bias, initial_state, cu_seqlens, d_y, d_final_state, silu, wants = args
    gradients = conv.causal_conv1d_backward(
        x,
        weight,
        bias,
        d_y=d_y,
        d_final_state=d_final_state,
        activation=_name(silu),
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        wants=[name for name, wanted in zip(conv.ConvGradients._fields, wants, strict=True) if wanted],
    )
    return tuple(absent(x) if d is None else d for d in gradients)


def _step(args: StepInputs) -> Tensor:
    x, weight, state, bias, state_indices, silu = args
    y: Tensor = conv.causal_conv1d_step(x, weight, state, bias, activation=_name(silu), state_indices=state_indices)
    return y


def _check_on_gpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> None:
    """Refuses what the library refuses. It knows no values that are on a GPU."""
    lib, queue = TORCH.at(x, None)
    arrays = (x, weight, bias, initial_state, cu_seqlens, state, state_indices)
    _core.conv_check(lib, *arrays, conv_options(None, queue))


def _forward_on_gpu(args: ForwardInputs) -> tuple[Tensor, Tensor]:
    x, weight, bias, initial_state, cu_seqlens, silu, return_state = args
    _check_on_gpu(x, weight, bias, initial_state, cu_seqlens)
    y, final_state = composed.forward(x, weight, bias, initial_state, cu_seqlens, silu)
    return y, final_state if return_state else absent(x)


def _backward_on_gpu(args: BackwardInputs) -> tuple[Tensor, ...]:
    gradients = composed.backward(*args[:-1])
    return tuple(d if wanted else absent(args.x) for d, wanted in zip(gradients, args.wants, strict=True))


def _step_on_gpu(args: StepInputs) -> Tensor:
    x, weight, state, bias, state_indices, silu = args
    _check_on_gpu(x, weight, bias, state=state, state_indices=state_indices)
    return composed.step(x, weight, state, bias, state_indices, silu)


# ---- gradients: kernels of the dispatch key Autograd


def _forward_kernel(*inputs: Any) -> Any:
    if not is_differentiated(inputs):
        return run(_operators.causal_conv1d.default, inputs)
    return apply(_Forward, ForwardInputs(*inputs))


def _backward_kernel(*inputs: Any) -> Any:
    if not is_differentiated(inputs):
        return run(_operators.causal_conv1d_backward.default, inputs)
    return apply(_Backward, inputs)


def _step_kernel(*inputs: Any) -> Any:
    if is_differentiated(inputs):
        raise NotImplementedError(
            "torch.ops.leetcore.causal_conv1d_step has no gradient; expected tensors that do not require one, or "
            "leetcore.torch.causal_conv1d_step"
        )
    state = StepInputs(*inputs).state
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)
    return run(_operators.causal_conv1d_step.default, inputs)


class _Forward:
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        args = ForwardInputs(*inputs)
        ctx.save_for_backward(*args[:5])
        ctx.silu, ctx.return_state = args.silu, args.return_state
        ctx.set_materialize_grads(False)
        return run_in_function(_operators.causal_conv1d.default, inputs)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs, None for inputs that have none."""
        none = (None,) * len(ForwardInputs._fields)
        d_final_state = d_final_state if ctx.return_state else None
        if d_y is None and d_final_state is None:
            return none
        wants = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
        # In the order of BackwardInputs.
        gradients = _operators.causal_conv1d_backward.default(*ctx.saved_tensors, d_y, d_final_state, ctx.silu, wants)
        return (*(d if wanted else None for d, wanted in zip(gradients, wants, strict=True)), *none[_DIFFERENTIABLE:])


class _Backward:
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        return run_in_function(_operators.causal_conv1d_backward.default, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> None:
        raise NotImplementedError(
            "leetcore.torch.causal_conv1d has first derivatives only; expected no gradient of its gradient"
        )


# ---- shapes, for tracing


def _like_x(x: Tensor) -> Tensor:
    B, D, N = x.shape
    return x.new_empty((B, N, D)).transpose(1, 2) if has_contiguous_channels(x) else x.new_empty((B, D, N))


def _forward_shapes(args: ForwardInputs) -> tuple[Tensor, Tensor]:
    x, state = args.x, args.initial_state
    require_one_device("x", x, args.weight, args.bias, state, args.cu_seqlens)
    if not args.return_state:
        return _like_x(x), absent(x)
    sequences = x.shape[0] if args.cu_seqlens is None else args.cu_seqlens.shape[0] - 1
    L = args.weight.shape[1] - 1 if state is None else state.shape[2]
    return _like_x(x), (x if state is None else state).new_empty((sequences, x.shape[1], L))


def _backward_shapes(args: BackwardInputs) -> tuple[Tensor, ...]:
    x, weight, bias, state = args[:4]
    require_one_device("x", x, weight, bias, state, args.cu_seqlens, args.d_y, args.d_final_state)
    shapes = (
        _like_x(x),
        weight.new_empty(weight.shape),
        None if bias is None else bias.new_empty(bias.shape),
        None if state is None else state.new_empty(state.shape),
    )
    return tuple(d if wanted and d is not None else absent(x) for d, wanted in zip(shapes, args.wants, strict=True))


def _step_shapes(args: StepInputs) -> Tensor:
    require_one_device("x", args.x, args.weight, args.state, args.bias, args.state_indices)
    return _like_x(args.x) if args.x.ndim == 3 else args.x.new_empty(args.x.shape)


# ---- autocast


def _autocast(operator: Any, inputs: Any, device: str) -> Any:
    """The autocast kernel of an operator on a type of device."""

    def kernel(*arguments: Any) -> Any:
        args = inputs(*arguments)
        dtype = torch.get_autocast_dtype(device)

        def cast(name: str, a: Any) -> Any:
            if not isinstance(a, Tensor) or not a.is_floating_point() or name == "state":
                return a  # a state is updated in place: the update of a copy would be lost
            if name == "x":
                return a.to(dtype)
            return a if a.dtype is dtype else a.float()

        with torch.autocast(device, enabled=False):
            if args.x.dtype is torch.float64:  # torch's own operators do not cast float64 either
                return operator(*args)
            return operator(*(cast(name, a) for name, a in zip(args._fields, args, strict=True)))

    return kernel


# ---- torch.vmap: its dimension becomes part of the channels

_CHANNEL_AXES = {"x": 1, "weight": 0, "bias": 0, "initial_state": 1, "d_y": 1, "d_final_state": 1}


def _fold(args: Any, in_dims: tuple[Any, ...], size: int) -> Any:
    """The inputs, with the vmapped dimension before and as part of the channels."""
    dims = dict(zip(args._fields, in_dims, strict=False))  # torch leaves inputs out that have their defaults
    if dims.get("cu_seqlens") is not None:
        raise NotImplementedError("cu_seqlens: expected one for all calls under torch.vmap, got a batch of them")

    def fold(name: str, axis: int) -> Any:
        a, dim = getattr(args, name), dims.get(name)
        if a is None:
            return None
        a = a.unsqueeze(axis).expand(*a.shape[:axis], size, *a.shape[axis:]) if dim is None else a.movedim(dim, axis)
        return a.flatten(axis, axis + 1)

    return args._replace(**{name: fold(name, axis) for name, axis in _CHANNEL_AXES.items() if name in args._fields})


def _vmap_forward(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    size, args = info.batch_size, ForwardInputs(*inputs)
    y, final_state = _operators.causal_conv1d.default(*_fold(args, in_dims, size))
    if not args.return_state:
        return (y.unflatten(1, (size, -1)), final_state), (1, None)
    return (y.unflatten(1, (size, -1)), final_state.unflatten(1, (size, -1))), (1, 1)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    size, args = info.batch_size, BackwardInputs(*inputs)
    gradients = _operators.causal_conv1d_backward.default(*_fold(args, in_dims, size))
    axes = tuple(
        _CHANNEL_AXES[name] if wanted else None for name, wanted in zip(args._fields, args.wants, strict=False)
    )
    return tuple(
        d if axis is None else d.unflatten(axis, (size, -1)) for d, axis in zip(gradients, axes, strict=True)
    ), axes


def _vmap_step(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    raise NotImplementedError(
        "causal_conv1d_step: expected no torch.vmap, as it updates a state in place; use its batch"
    )


# ---- flop: a product and a sum per tap. torch passes shapes in place of tensors.


def _flop(inputs: Any, factor: int) -> Any:
    def count(*single: Any, out_shape: Any = None, **named: Any) -> int:
        args = inputs(*single, **named)
        elements = 1
        for size in args.x:
            elements *= size
        return factor * elements * int(args.weight[1])

    return count


OPERATORS = {
    "causal_conv1d": Operator(
        ForwardInputs,
        "(Tensor y, Tensor final_state)",
        {"CPU": _forward, "CUDA": _forward_on_gpu},
        _forward_kernel,
        _forward_shapes,
        _vmap_forward,
        _flop(ForwardInputs, 2),
        _autocast,
    ),
    "causal_conv1d_backward": Operator(
        BackwardInputs,
        "(Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor d_initial_state)",
        {"CPU": _backward, "CUDA": _backward_on_gpu},
        _backward_kernel,
        _backward_shapes,
        _vmap_backward,
        _flop(BackwardInputs, 4),
        None,
    ),
    "causal_conv1d_step": Operator(
        StepInputs,
        "Tensor y",
        {"CPU": _step, "CUDA": _step_on_gpu},
        _step_kernel,
        _step_shapes,
        _vmap_step,
        _flop(StepInputs, 2),
        _autocast,
    ),
}
