"""The competitors of the laboratory: those of `leetcore.bench.rivals`, and one module for each
other one.

A rival's functions take a problem and return factories by label, nothing where it cannot serve. A
factory prepares tables and buffers and returns the call that is timed; a factory that raises is
left out, with its reason. A call returns o, freshly allocated, in the dtype of the inputs; a call
of `training` returns o and the gradients by name. Rivals of Mamba-2 have a tuple of their own:
their calls of `forward` return y and the state by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from leetcore.bench import rivals
from leetcore.bench.session import Factory
from torch import Tensor

Serve = Callable[[Any, bool], dict[str, Factory]]


def nothing(p: Any, quick: bool = False) -> dict[str, Factory]:
    return {}


@dataclass(frozen=True)
class Rival:
    """name: begins with "torch" if it counts as the best torch.

    each: its variants are methods of their own.
    """

    name: str
    forward: Serve = nothing
    decode: Serve = nothing
    training: Serve = nothing
    each: bool = False


def training_step(forward: Callable[..., Tensor], leaves: dict[str, Tensor], d_o: Tensor) -> dict[str, Tensor]:
    """One forward and backward pass: o and the gradients by name; the leaves keep none."""
    o = forward(**leaves)
    o.backward(d_o)
    results = {"o": o.detach()}
    for name, x in leaves.items():
        assert x.grad is not None
        results[f"d_{name}"], x.grad = x.grad, None
    return results


def half(p: Any, quick: bool = False) -> dict[str, Factory]:
    """torch chunk with its big products in the 16-bit dtype of the inputs; the carried state stays
    float32."""
    return {} if p.dtype == torch.float32 else rivals.configurations(p, p.dtype, quick)


from rivals import fla, mamba2, minimax, torch_autograd, torch_decode  # noqa: E402

ALL = (
    Rival("torch chunk", rivals.chunk),
    Rival("torch chunk, 16-bit products", half),
    Rival("torch quadratic", rivals.quadratic),
    Rival("minimax", minimax.forward, minimax.decode),
    Rival("torch decode", decode=torch_decode.decode),
    Rival("torch autograd", training=torch_autograd.training),
    Rival("fla", fla.forward, fla.decode, fla.training, each=True),
)
MAMBA2 = (
    Rival("mamba_ssm", mamba2.forward, mamba2.decode, mamba2.training),
    Rival("bare operator", mamba2.bare),
)
