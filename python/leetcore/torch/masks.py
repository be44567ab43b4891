"""Padding: a masked token adds nothing to a state and lets nothing of it decay, wherever the token is.

q, k and v of the token become 0 and its log_decay 0, so a masked call always has a log_decay for each token. A decay
for each head would give the same numbers where all padding is at the start of the first call, but whether that is so
is known to the values of the mask alone: reading them stops a GPU, and breaks the graph of torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_tokens(name: str, mask: Tensor, x: Tensor) -> Tensor:
    """The mask as bool [B, N], True at tokens of x [B, N, C]."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(mask).__name__}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{name}: expected shape {list(x.shape[:2])}, got {list(mask.shape)}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"{name}: expected bool or integers, as 0 means two things in masks of floats, got {mask.dtype}"
        )
    return mask.to(x.device).bool()


def hide(
    mask: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k [B, N, H, K], v [B, N, H, V] and a decay [], [H] or [B, N, H], where the mask [B, N] is False at padding.

    Values are selected, not multiplied, so that NaN at padding does no harm.
    """
    q, k, v = (torch.where(mask[..., None, None], x, 0) for x in (q, k, v))
    if log_decay is None:
        return q, k, v, None
    return q, k, v, torch.where(mask[..., None], log_decay, 0).expand(*mask.shape, max(k.shape[2], v.shape[2]))
