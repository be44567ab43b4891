"""The inputs of the operators `torch.ops.leetcore.*`: one NamedTuple per operator.

The fields of a NamedTuple are the only list of an operator's arguments. The schema that torch reads
is made from their names, types and defaults; kernels, gradients and rules receive the tuple.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np
from torch import Tensor

from ..options import Layout, is_bnhd

Updated = Annotated[Tensor, "updated in place"]

_TYPES_OF_SCHEMAS: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Updated: "Tensor(a!)",
    float: "float",
    bool: "bool",
    str: "str",
    Layout: "str",
    list[bool]: "bool[]",
}


class ForwardInputs(NamedTuple):
    """Inputs of `linear_attention`, with the names of `leetcore.linear_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float = 1.0
    return_state: bool = False
    layout: Layout = "bhnd"
    method: str = "auto"
    tf32: bool = False  # whether precision is "tf32"


class BackwardInputs(NamedTuple):
    """Inputs of `linear_attention_backward`.

    Fields with names of `ForwardInputs` have the values of the forward pass.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    d_o: Tensor | None
    d_final_state: Tensor | None
    scale: float
    layout: Layout
    tf32: bool
    wants: list[bool]  # which fields of `leetcore.Gradients` to compute


class DecodeInputs(NamedTuple):
    """Inputs of `decode_step`, with the names of `leetcore.decode_step`."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Updated
    log_decay: Tensor | None = None
    state_indices: Tensor | None = None
    scale: float = 1.0


class SsdInputs(NamedTuple):
    """Inputs of `ssd`, with the names of `leetcore.ssd`. The first nine are differentiable."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dt_softplus: bool = False
    dt_min: float = 0.0
    dt_max: float = 0.0  # 0 is infinity
    return_state: bool = False
    method: str = "auto"


class SsdBackwardInputs(NamedTuple):
    """Inputs of `ssd_backward`.

    Fields with names of `SsdInputs` have the values of the forward pass.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    d_y: Tensor | None
    d_final_state: Tensor | None
    dt_softplus: bool
    dt_min: float
    dt_max: float
    wants: list[bool]  # which of the nine gradients to compute


class SsdStepInputs(NamedTuple):
    """Inputs of `ssd_step`, with the names of `leetcore.ssd_step`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    state: Updated
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    state_indices: Tensor | None = None
    dt_softplus: bool = False
    dt_min: float = 0.0
    dt_max: float = 0.0


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


def stand_in(**tensors: Any) -> bool:
    """Whether an argument stands in for a tensor, as torch.fx's proxies do.

    Decays may be numbers. Raises TypeError for an object that is neither a tensor nor a stand-in.
    """
    found = False
    for name, value in tensors.items():
        if value is None or isinstance(value, Tensor) or (name in ("log_decay", "A") and is_number(value)):
            continue
        if not hasattr(value, "__torch_function__"):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
        found = True
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a number of Python or numpy, as a decay may be."""
    return isinstance(value, (float, int, np.number))


def schema(name: str, inputs: Any, results: str) -> str:
    """The text that defines an operator for torch: `name(inputs) -> results`."""
    defaults = inputs._field_defaults
    arguments = (
        f"{_TYPES_OF_SCHEMAS[kind]} {field}" + (f"={defaults[field]!r}" if field in defaults else "")
        for field, kind in get_type_hints(inputs, include_extras=True).items()
    )
    return f"{name}({', '.join(arguments)}) -> {results}"


def tensor_fields(inputs: Any) -> tuple[str, ...]:
    """The names of the inputs that are tensors or None."""
    kinds = get_type_hints(inputs, include_extras=True).items()
    return tuple(name for name, kind in kinds if _TYPES_OF_SCHEMAS[kind].startswith("Tensor"))


def head_axis(layout: str) -> int:
    """The axis of heads in q, k and v."""
    return 2 if is_bnhd(layout) else 1
