"""What torch asks about the operators of Mamba-2 without running them: shapes, vmap and flop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import rules
from .inputs import SsdBackwardInputs, SsdInputs, SsdStepInputs


def exact_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states: float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def forward_shapes(args: SsdInputs) -> tuple[Tensor, Tensor]:
    """Empty results of ssd."""
    rules.require_one_device("x", args.x, *args[1:10])
    x = args.x
    if not args.return_state:
        return x.new_empty(x.shape), rules.absent(x)
    sequences = x.shape[0] if args.cu_seqlens is None else args.cu_seqlens.shape[0] - 1
    shape = (sequences, *x.shape[2:], args.B.shape[3])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=exact_dtype(x))


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
