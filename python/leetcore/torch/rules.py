"""What torch asks about the operators without running them: shapes, autocast, vmap and flop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import api
from .inputs import BackwardInputs, DecodeInputs, ForwardInputs, head_axis

_Inputs = TypeVar("_Inputs", ForwardInputs, BackwardInputs)
_operators: Any = torch.ops.leetcore


def absent(like: Tensor) -> Tensor:
    """An empty tensor in place of a result that was not asked for: operators cannot return None."""
    return like.new_empty(0)


# ---- shapes, for tracing


def forward_shapes(args: ForwardInputs) -> tuple[Tensor, Tensor]:
    """Empty results of linear_attention."""
    q, k, v = args.q, args.k, args.v
    _require_one_device(q, args.log_decay, k, v, args.initial_state, args.cu_seqlens)
    heads = head_axis(args.layout)
    Hs = max(k.shape[heads], v.shape[heads])
    shape = list(v.shape)
    shape[heads] = max(q.shape[heads], Hs)
    o = v.new_empty(shape)
    if not args.return_state:
        return o, absent(v)
    sequences = q.shape[0] if args.cu_seqlens is None else args.cu_seqlens.shape[0] - 1
    exact = torch.float64 if q.dtype is torch.float64 else torch.float32
    return o, v.new_empty((sequences, Hs, k.shape[3], v.shape[3]), dtype=exact)


def backward_shapes(args: BackwardInputs) -> tuple[Tensor, ...]:
    """Empty results of linear_attention_backward."""
    q, k, v = args.q, args.k, args.v
    _require_one_device(q, args.log_decay, k, v, args.initial_state, args.cu_seqlens, args.d_o, args.d_final_state)
    inputs = api.Gradients(q, k, v, args.log_decay, args.initial_state)
    return tuple(
        x.new_empty(x.shape) if wanted and x is not None else absent(v)
        for x, wanted in zip(inputs, args.wants, strict=True)
    )


def decode_shapes(args: DecodeInputs) -> Tensor:
    """An empty result of decode_step."""
    q, k, v = args.q, args.k, args.v
    _require_one_device(q, args.log_decay, k, v, args.state, args.state_indices)
    return v.new_empty((v.shape[0], max(q.shape[1], k.shape[1], v.shape[1]), *v.shape[2:]))


def _require_one_device(q: Tensor, log_decay: Tensor | None, *others: Tensor | None) -> None:
    """Refuses tensors on several devices.

    One tensor on the device "meta" is enough for torch to call the functions above, whose results
    would be uninitialised memory.
    """
    if log_decay is not None and log_decay.ndim == 0 and log_decay.device.type == "cpu":
        log_decay = None  # a number, which may be used with any device
    require_one_device("q", q, log_decay, *others)


def require_one_device(name: str, first: Tensor, *others: Tensor | None) -> None:
    """Refuses tensors that are not on the device of the argument `name`."""
    for x in others:
        if x is not None and x.device != first.device:
            raise ValueError(
                f"{name}: expected on one device with the other arguments, got {first.device} and {x.device}"
            )


# ---- autocast: q, k and v in its dtype, decays and initial states in float32


def autocast(operator: Any, inputs: Any, device: str) -> Callable[..., Any]:
    """The autocast kernel of an operator on a type of device."""

    def cast(name: str, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or name == "state":
            return x  # a state is updated in place: the update of a copy would be lost
        return x.to(dtype if name in ("q", "k", "v") else torch.float32)

    def kernel(*arguments: Any) -> Any:
        args = inputs(*arguments)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            if args.q.dtype is torch.float64:  # torch's own operators do not cast float64 either
                return operator(*args)
            return operator(*(cast(name, x, dtype) for name, x in zip(args._fields, args, strict=True)))

    return kernel


# ---- torch.vmap: its dimension becomes part of the batch


def vmap_forward(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    """linear_attention of a batch of calls, as torch.library.register_vmap expects it."""
    size = info.batch_size
    args = _fold_all(ForwardInputs(*inputs), _dims(ForwardInputs, in_dims), size)
    o, final_state = _operators.linear_attention.default(*args)
    o = o.unflatten(0, (size, -1))
    if not args.return_state:
        return (o, final_state), (0, None)
    return (o, final_state.unflatten(0, (size, -1))), (0, 0)


def vmap_backward(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    """linear_attention_backward of a batch of calls."""
    size, args, dims = info.batch_size, BackwardInputs(*inputs), _dims(BackwardInputs, in_dims)
    folded = _fold_all(args, dims, size)._replace(
        d_o=_fold(args.d_o, dims.d_o, size),
        d_final_state=_fold(args.d_final_state, dims.d_final_state, size),
    )
    found = zip(_operators.linear_attention_backward.default(*folded), args.wants, strict=True)
    gradients = api.Gradients(*(d.unflatten(0, (size, -1)) if wanted else d for d, wanted in found))
    wanted = api.Gradients(*args.wants)
    if args.log_decay is not None and wanted.d_log_decay:
        rank = args.log_decay.ndim - (dims.log_decay is not None)
        if rank < 2:  # the decay is shared by sequences, or by heads too: its gradient is the sum over them
            gradients = gradients._replace(d_log_decay=gradients.d_log_decay.sum(tuple(range(1, 3 - rank))))
    return tuple(gradients), tuple(0 if w else None for w in wanted)


def vmap_decode(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    """Refuses a batch of calls of decode_step."""
    raise NotImplementedError("decode_step: expected no torch.vmap, as it updates a state in place; use its batch")


def _dims(inputs: Any, in_dims: tuple[Any, ...]) -> Any:
    """The vmapped dimension of each input. torch leaves inputs out that have their defaults."""
    return inputs(*in_dims, *[None for _ in inputs._fields[len(in_dims) :]])


def _fold_all(args: _Inputs, dims: _Inputs, size: int) -> _Inputs:
    """The inputs that both operators share, with the vmapped dimension as part of their batch."""
    if args.cu_seqlens is not None:
        raise NotImplementedError("cu_seqlens: expected None under torch.vmap, as packed sequences have no batch")
    q, k, v = (_fold(x, dim, size) for x, dim in ((args.q, dims.q), (args.k, dims.k), (args.v, dims.v)))
    heads = head_axis(args.layout)
    Hs = max(k.shape[heads], v.shape[heads])
    return args._replace(
        q=q,
        k=k,
        v=v,
        log_decay=_fold_decay(args.log_decay, dims.log_decay, size, q.shape[0] // size, Hs),
        initial_state=_fold(args.initial_state, dims.initial_state, size),
    )


def _fold(x: Any, dim: Any, size: int) -> Any:
    """[size, B, ...] as [size * B, ...]."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _fold_decay(g: Any, dim: Any, size: int, B: int, Hs: int) -> Any:
    """Any form of log_decay as [size * B, Hs] or [size * B, Hs, N]."""
    if g is None:
        return None
    g = g.expand(size, *g.shape) if dim is None else g.movedim(dim, 0)
    if g.ndim < 3:  # [size] or [size, Hs]
        g = g.reshape(size, 1, -1).expand(size, B, Hs)
    return g.flatten(0, 1)


# ---- flop, counted for chunks of 64 tokens (cpp/kernels/chunk) with any method, so that a count
# ---- depends on shapes only. torch passes shapes in place of tensors.


def forward_flop(*inputs: Any, out_shape: Any = None, **named: Any) -> int:
    """The flop count of linear_attention."""
    return _flop(ForwardInputs(*inputs, **named), 1, 1, 4)


def backward_flop(*inputs: Any, out_shape: Any = None, **named: Any) -> int:
    """The flop count of linear_attention_backward."""
    return _flop(BackwardInputs(*inputs, **named), 3, 2, 10)


def decode_flop(*inputs: Any, out_shape: Any = None, **named: Any) -> int:
    """The flop count of decode_step."""
    args: Any = DecodeInputs(*inputs, **named)
    q, k, v = args.q, args.k, args.v
    T = q[2] if len(q) == 4 else 1
    count: int = q[0] * T * 2 * k[-1] * v[-1] * (max(q[1], k[1], v[1]) + max(k[1], v[1]))
    return count


def _flop(args: Any, of_K: int, of_V: int, of_KV: int) -> int:
    q, k, v = args.q, args.k, args.v
    heads = head_axis(args.layout)
    tokens = 3 - heads
    H, K, V = max(x[heads] for x in (q, k, v)), k[3], v[3]
    count: int = q[0] * H * q[tokens] * (65 * (of_K * K + of_V * V) + of_KV * K * V)
    return count
