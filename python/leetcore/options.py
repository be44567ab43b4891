"""The options of a call: what it has besides arrays, validated once for every entry point."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from .arrays import threads_of_framework

Layout = Literal["bhnd", "bnhd"]
Precision = Literal["ieee", "tf32"]
Activation = Literal["silu", "swish"]


class Options(NamedTuple):
    """The options as the extension module takes them: `Options` of cpp/python.cpp, in the same
    order.
    """

    scale: float
    method: str
    bnhd: bool
    tf32: bool
    stream: int
    threads: int
    dt_softplus: bool = False
    dt_min: float = 0.0
    dt_max: float = 0.0  # 0 is infinity


class ConvOptions(NamedTuple):
    """The options of a convolution as the extension module takes them, in the same order."""

    silu: bool
    stream: int
    threads: int


def conv_options(activation: str | None, stream: int = 0) -> ConvOptions:
    """Validated options of a convolution. Raises ValueError for an unknown activation."""
    return ConvOptions(is_silu(activation), stream, threads_of_framework())


def options(
    scale: Any = 1.0,
    method: Any = "auto",
    layout: str = "bhnd",
    precision: str | None = None,
    stream: int = 0,
) -> Options:
    """Validated options. `stream` is the number of a cudaStream_t; 0 on the CPU.

    Raises:
        TypeError, ValueError: an option is not of its type, or not one of the allowed values.
    """
    return Options(
        real("scale", scale),
        method_name(method),
        is_bnhd(layout),
        allows_tf32(precision),
        stream,
        threads_of_framework(),
    )


def real(name: str, value: Any) -> float:
    """The value as a float. Raises TypeError where it is not a number."""
    try:
        if not isinstance(value, str):  # float("1") is 1.0
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def plain(value: Any) -> Any:
    """A scalar of numpy as a float, any other value as it is: log_decay may be either."""
    return float(value) if isinstance(value, np.generic) else value


def method_name(method: Any) -> str:
    """The name as given. Raises TypeError where it is not a string."""
    if not isinstance(method, str):
        raise TypeError(f"method: expected 'auto' or a name of leetcore.methods(), got {type(method).__name__}")
    return method


def is_bnhd(layout: str) -> bool:
    """Whether tokens come before heads. Raises ValueError for an unknown layout."""
    if layout == "bhnd":
        return False
    if layout == "bnhd":
        return True
    raise ValueError(f"layout: expected 'bhnd' or 'bnhd', got {layout!r}")


def allows_tf32(precision: str | None) -> bool:
    """Whether GPUs may round float32 products. Raises ValueError for an unknown precision."""
    if precision is None or precision == "ieee":
        return False
    if precision == "tf32":
        return True
    raise ValueError(f"precision: expected None, 'ieee' or 'tf32', got {precision!r}")


def is_silu(activation: str | None) -> bool:
    """Whether outputs go through silu. Raises ValueError for an unknown activation."""
    if activation is None:
        return False
    if activation in ("silu", "swish"):
        return True
    raise ValueError(f"activation: expected None, 'silu' or 'swish' (another name of silu), got {activation!r}")
