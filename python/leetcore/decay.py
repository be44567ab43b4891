"""Log-decays from the numbers that models store, for the argument ``log_decay``.

They are computed in float64 and returned as float32 numpy arrays. A decay is stored as its natural
logarithm, because float32 cannot represent a factor close to 1: at gamma = 1 - 1e-6 the logarithm
of the rounded factor is 1.3 % off. Each function returns all heads of the model. A process that
computes some of the heads (tensor parallelism) slices the result.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

LogDecay = npt.NDArray[np.float32]


def from_gamma(gamma: npt.ArrayLike) -> LogDecay:
    """log(gamma) of factors per token. A factor of 0 gives -inf, which forgets all earlier tokens.

    Args:
        gamma: factors in [0, 1], a number or an array of any shape, preferably float64.

    Returns:
        float32 of gamma's shape.

    Raises:
        ValueError: gamma has values other than real numbers in [0, 1].
    """
    factor = _real("gamma", gamma)
    _require("gamma", factor, (factor >= 0) & (factor <= 1), "in [0, 1]")
    with np.errstate(divide="ignore"):
        return _log_decay(np.log(factor))


def from_slopes(slopes: npt.ArrayLike) -> LogDecay:
    """-slopes, as in TransNormerLLM and Lightning Attention.

    A token s steps back has the weight exp(-slope * s).

    Args:
        slopes: >= 0, a number or an array of any shape. inf forgets all earlier tokens.

    Returns:
        float32 of the shape of slopes.

    Raises:
        ValueError: slopes has values other than real numbers >= 0.
    """
    slope = _real("slopes", slopes)
    _require("slopes", slope, slope >= 0, ">= 0")
    return _log_decay(-slope)


def alibi(num_heads: int) -> LogDecay:
    """ALiBi's geometric slopes as decays (Press et al. 2021, arXiv:2108.12409).

    If num_heads is a power of two, head h = 0, 1, ... has the slope 2^(-8 (h + 1) / num_heads). For
    another number, let P be the largest power of two below it. The slopes for P heads come first,
    followed by elements 0, 2, ... of the slopes for 2 P heads.

    Args:
        num_heads: number of heads of the whole model, >= 1.

    Returns:
        float32 [num_heads].

    Raises:
        ValueError: num_heads is not an integer >= 1.
    """
    return from_slopes(_alibi_slopes(num_heads))


def retnet(num_heads: int) -> LogDecay:
    """RetNet's decays: log(1 - 2^(-5 - h)) for head h = 0, 1, ...

    The source is Sun et al. 2023, arXiv:2307.08621.

    Args:
        num_heads: number of heads of the whole model, >= 1.

    Returns:
        float32 [num_heads].

    Raises:
        ValueError: num_heads is not an integer >= 1.
    """
    heads = np.arange(_integer("num_heads", num_heads, 1), dtype=np.float64)
    return _log_decay(np.log1p(-np.exp2(-5 - heads)))


def minimax(num_heads: int, layer: int, num_layers: int, flavor: Literal["hf", "vllm"] = "hf") -> LogDecay:
    """Decays of MiniMax-Text-01 (arXiv:2501.08313), after TransNormerLLM.

    The slopes shrink with the layer l of L.

    - "hf", as in transformers: the slope of head h is 2^(-8 (h + 1) / num_heads) for any num_heads,
      times 1 - l / (L - 1 + 1e-5) + 1e-5.
    - "vllm", as in vLLM and SGLang: the slopes are those of `alibi`, times 1 - l / (L - 1) + 1e-5
      (1 + 1e-5 if L is 1).

    Args:
        num_heads: number of heads of the whole model, >= 1.
        layer: index of the layer from 0, counted over all layers of the model, with any attention.
        num_layers: number of layers of the whole model.
        flavor: "hf" or "vllm", the formula.

    Returns:
        float32 [num_heads].

    Raises:
        ValueError: a count is not an integer in its range, or flavor is unknown.
    """
    num_layers = _integer("num_layers", num_layers, 1)
    layer = _integer("layer", layer, 0, num_layers - 1)
    if flavor == "hf":
        slopes = _geometric_slopes(_integer("num_heads", num_heads, 1))
        factor = 1 - layer / (num_layers - 1 + 1e-5) + 1e-5
    elif flavor == "vllm":
        slopes = _alibi_slopes(num_heads)
        factor = 1 - layer / max(num_layers - 1, 1) + 1e-5
    else:
        raise ValueError(f"flavor: expected 'hf' or 'vllm', got {flavor!r}")
    return from_slopes(slopes * factor)


def mamba2(A: npt.ArrayLike, dt: npt.ArrayLike) -> LogDecay:
    """A[h] * dt[b, h, t], the data-dependent decay of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060).

    With it, the operator's v is dt * x, its k and q are B and C, and its state is Mamba's state
    transposed.

    Args:
        A: [H], < 0. Models compute it as -exp(A_log).
        dt: [B, H, N], >= 0: step sizes after bias and softplus. Mamba's own are [B, N, H]:
            transpose them.

    Returns:
        float32 [B, H, N].

    Raises:
        ValueError: a shape or a sign is wrong.
    """
    a, step = _real("A", A), _real("dt", dt)
    if a.ndim != 1:
        raise ValueError(f"A: expected shape [H], got {list(a.shape)}")
    if step.ndim != 3 or step.shape[1] != len(a):
        raise ValueError(f"dt: expected shape [B, {len(a)}, N] as A has {len(a)} heads, got {list(step.shape)}")
    _require("A", a, (a < 0) & np.isfinite(a), "finite and < 0 (-exp(A_log), not A_log)")
    _require("dt", step, (step >= 0) & np.isfinite(step), "finite and >= 0")
    return _log_decay(a[:, None] * step)


def _geometric_slopes(heads: int) -> npt.NDArray[np.float64]:
    return np.exp2(-8 / heads * np.arange(1, heads + 1, dtype=np.float64))


def _alibi_slopes(num_heads: int) -> npt.NDArray[np.float64]:
    heads = _integer("num_heads", num_heads, 1)
    power = 1 << (heads.bit_length() - 1)
    return np.concatenate([_geometric_slopes(power), _geometric_slopes(2 * power)[::2][: heads - power]])


def _log_decay(value: npt.NDArray[np.float64]) -> LogDecay:
    with np.errstate(over="ignore", under="ignore"):  # values beyond float32 become -inf
        return np.asarray(value + 0.0, np.float32)  # + 0.0 turns -0 into 0


def _real(name: str, value: npt.ArrayLike) -> npt.NDArray[np.float64]:
    try:
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError  # numpy would drop the mask
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor of bfloat16, on a GPU or with requires_grad
        hint = "; x.detach().cpu().double() has them, without a gradient" if hasattr(value, "detach") else ""
        raise ValueError(f"{name}: expected numbers that numpy can read, got {type(value).__name__}{hint}") from None
    if not np.can_cast(array.dtype, np.float64, "same_kind") or array.dtype == np.bool_:
        raise ValueError(f"{name}: expected real numbers, got dtype {array.dtype}")
    return array.astype(np.float64)


def _require(name: str, array: npt.NDArray[np.float64], good: npt.NDArray[np.bool_], allowed: str) -> None:
    if not np.all(good):
        place = np.unravel_index(np.argmin(good), array.shape)
        where = f" at {[int(i) for i in place]}" if place else ""
        raise ValueError(f"{name}: expected values {allowed}, got {array[place]:g}{where}")


def _integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    good = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not good or value < least or (most is not None and value > most):
        allowed = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"
        raise ValueError(f"{name}: expected {allowed}, got {value!r}")
    return int(value)
