"""The definition of operators `torch.ops.leetcore.*` from their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from .inputs import schema


class Operator(NamedTuple):
    """The parts of an operator. Kernels and shapes take the NamedTuple of the inputs."""

    inputs: Any  # the NamedTuple
    results: str  # in the language of schemas
    kernels: dict[str, Callable[..., Any]]  # by dispatch key, CPU and CUDA
    autograd: Callable[..., Any]
    shapes: Callable[..., Any]
    vmap: Callable[..., Any]
    flop: Callable[..., int]
    autocast: Callable[..., Any] | None  # makes a kernel of (operator, inputs, type of device)


def define(operators: dict[str, Operator]) -> torch.library.Library:
    """Defines the operators. They live as long as the library that is returned."""
    library = torch.library.Library("leetcore", "DEF")
    for name, operator in operators.items():
        library.define(schema(name, operator.inputs, operator.results))
        packet = getattr(torch.ops.leetcore, name)
        for key, kernel in operator.kernels.items():
            library.impl(name, _with_tuple(kernel, operator.inputs), key)
            if operator.autocast is not None:
                kernel = operator.autocast(packet.default, operator.inputs, key.lower())
                library.impl(name, kernel, f"Autocast{key}")
        library.impl(name, operator.autograd, "Autograd")
        shapes = _with_tuple(operator.shapes, operator.inputs)
        torch.library.register_fake(f"leetcore::{name}", shapes, lib=library)
        torch.library.register_vmap(f"leetcore::{name}", operator.vmap, lib=library)
        register_flop_formula(packet)(operator.flop)
    return library


def both(kernel: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """One kernel for the tensors of both devices."""
    return {"CPU": kernel, "CUDA": kernel}


def _with_tuple(function: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
    """A function of single inputs, as torch calls it, from a function of their NamedTuple."""
    return lambda *single: function(inputs(*single))
