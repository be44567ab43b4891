"""LeetDecoding's one call (github.com/Computational-Machine-Intelligence/LeetDecoding), served by leetcore.

docs/migration-leetdecoding.md says what differs, and why.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..api import linear_attention
from ..arrays import Array, library_of
from ..decay import _real, _require

# LeetDecoding's names, and the method that is the same algorithm here.
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
    """Causal linear attention where a token s steps back weighs lambda^s.

    lambda is exp(-gamma) if is_need_exp, else gamma itself: by every method, for every dtype, shape and length.

    Args:
        q: [B, H, N, K]; arrays of any library, dtypes and strides as `leetcore.linear_attention` takes them.
        k: [B, H, N, K].
        v: [B, H, N, V].
        is_mask_weight: whether there is a decay; gamma is given if and only if it is True.
        gamma: a number, [], [H], [H, 1] or [H, 1, 1] of any real dtype; >= 0, or in [0, 1] if not is_need_exp. On a GPU
            it is copied to the host, which waits for it; a number is not.
        is_need_exp: what gamma means; nothing without gamma.
        attn_method: a name of LeetDecoding (`METHODS`), or None for the method predicted to be the fastest here.

    Returns:
        [B, H, N, V] of q's dtype in the caller's array library.

    Raises:
        ValueError, TypeError: an argument breaks the rules above; the text names it, what it was and what is allowed.
    """
    for name, flag in (("is_mask_weight", is_mask_weight), ("is_need_exp", is_need_exp)):
        if not isinstance(flag, (bool, np.bool_)):  # such as gamma, one place too early
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
    """What gamma means, as an array [H] of q's library, or a number."""
    if isinstance(gamma, np.generic):
        gamma = gamma.item()
    lib, _ = library_of(("q", "k", "v", "gamma"), q, k, v, gamma).at(q, None)
    for name, array in zip("qkv", (q, k, v), strict=True):
        if len(array.shape) != 4:
            raise ValueError(f"{name}: expected shape [B, H, N, D], got {list(array.shape)}")
    if not isinstance(gamma, (float, int)):
        lib.export("gamma", gamma, False)  # refuses what must not be read, such as a tensor that requires gradients
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
