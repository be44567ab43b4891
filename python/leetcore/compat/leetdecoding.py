"""The call of LeetDecoding, served by leetcore.

The library is github.com/Computational-Machine-Intelligence/LeetDecoding.

docs/migration-leetdecoding.md explains the differences.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..api import linear_attention
from ..arrays import Array, library_of
from ..decay import _real, _require

# LeetDecoding's names, and the methods of leetcore with the same algorithm.
METHODS = {
    "vanilla": "parallel",
    "recursion": "recursive",
    "block-based": "block",
    "causal_dot_product": "recurrent",
    "causal_dot_product_torch": "recurrent",
    "lightningAttention2": "chunk",
    "lightningAttention2_torch": "chunk",
    "FleetAttention": "fleet",
    "FleetAttention_torch": "fleet",
}


def causal_linear_decoder(
    q: Array,
    k: Array,
    v: Array,
    is_mask_weight: bool = False,
    gamma: Array | float | None = None,
    is_need_exp: bool = True,
    attn_method: str | None = None,
) -> Any:
    """Causal linear attention in which a token s steps back has the weight lambda^s.

    lambda is exp(-gamma) if is_need_exp is True, else gamma. This holds for every method, dtype,
    shape and length.

    Args:
        q: [B, H, N, K]. Libraries, dtypes and strides are those of `leetcore.linear_attention`.
        k: [B, H, N, K].
        v: [B, H, N, V].
        is_mask_weight: whether there is a decay. gamma must be given if and only if it is True.
        gamma: a number, [], [H], [H, 1] or [H, 1, 1] of any real dtype; >= 0, or in [0, 1] if
            is_need_exp is False. An array on a GPU is copied to the host, which waits for the copy.
        is_need_exp: whether lambda is exp(-gamma). Without gamma it has no effect.
        attn_method: a name of LeetDecoding (`METHODS`). None: the method predicted to be the
            fastest.

    Returns:
        [B, H, N, V] of q's dtype in the caller's array library.

    Raises:
        ValueError, TypeError: an argument breaks the rules above; the text names the argument, what
            was given and what is allowed.
    """
    for name, flag in (("is_mask_weight", is_mask_weight), ("is_need_exp", is_need_exp)):
        if not isinstance(flag, (bool, np.bool_)):  # such as gamma in the wrong position
            raise TypeError(f"{name}: expected True or False, got {type(flag).__name__}")
    if is_mask_weight and gamma is None:
        raise ValueError("gamma: expected the decay that is_mask_weight=True asks for, got None")
    if not is_mask_weight and gamma is not None:
        raise ValueError(f"gamma: expected None with is_mask_weight=False, got {type(gamma).__name__}")
    if attn_method is not None and attn_method not in METHODS:
        raise ValueError(f"attn_method: expected None or one of {', '.join(METHODS)}, got {attn_method!r}")
    return linear_attention(
        q,
        k,
        v,
        None if gamma is None else _log_decay(q, k, v, gamma, is_need_exp),
        method="auto" if attn_method is None else METHODS[attn_method],
    )


def _log_decay(q: Array, k: Array, v: Array, gamma: Array | float, is_need_exp: bool) -> Array | float:
    """The log-decay that gamma stands for: an array [H] of q's library, or a number."""
    if isinstance(gamma, np.generic):
        gamma = gamma.item()
    lib, _ = library_of(("q", "k", "v", "gamma"), q, k, v, gamma).at(q, None)
    for name, array in zip("qkv", (q, k, v), strict=True):
        if len(array.shape) != 4:
            raise ValueError(f"{name}: expected shape [B, H, N, D], got {list(array.shape)}")
    if not isinstance(gamma, (float, int)):
        lib.export("gamma", gamma, False)  # refuses arrays that must not be read
        gamma = lib.numpy(gamma)
    values, heads = _real("gamma", gamma), max(k.shape[1], v.shape[1])
    if values.shape not in ((), (heads,), (heads, 1), (heads, 1, 1)):
        raise ValueError(f"gamma: expected a number or shape [{heads}], got {list(values.shape)}")
    if is_need_exp:
        _require("gamma", values, values >= 0, ">= 0, as exp(-gamma) of a negative one grows")
        log_decay = 0 - values
    else:
        _require("gamma", values, (values >= 0) & (values <= 1), "in [0, 1] with is_need_exp=False")
        with np.errstate(divide="ignore"):
            log_decay = np.log(values)
    if not log_decay.ndim:
        return float(log_decay)
    exact = np.float64 if str(q.dtype).endswith("float64") else np.float32
    with np.errstate(over="ignore", under="ignore"):  # beyond float32 is -inf
        return lib.from_numpy(log_decay.reshape(-1).astype(exact))
