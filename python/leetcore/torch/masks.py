"""Padding: a masked token adds nothing to a state and does not decay it, wherever the token is.

q, k, v and log_decay of the token become 0, so a masked call always has one log_decay per token.
One decay per head would give the same numbers if all padding were at the start of the first call.
Only the values of the mask can tell, and reading them stops a GPU and breaks the graph of
torch.compile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    """The inputs with zeros at padding; log_decay becomes [B, N, H].

    Values are selected, not multiplied, so that NaN at padding has no effect.

    Args:
        mask: bool [B, N], False at padding.
        q, k: [B, N, H, K].
        v: [B, N, H, V].
        log_decay: [], [H] or [B, N, H]. None: no decay.
    """
    q, k, v = (torch.where(mask[..., None, None], x, 0) for x in (q, k, v))
    if log_decay is None:
        return q, k, v, None
    return q, k, v, torch.where(mask[..., None], log_decay, 0).expand(*mask.shape, max(k.shape[2], v.shape[2]))


def tokens_last(mask: Tensor, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """The inputs of a causal convolution with all padding at the front, as zeros.

    A convolution over them reads no padding between two tokens, and its last inputs are the state
    that it leaves.

    Args:
        mask: bool [B, N], False at padding.
        x: [B, N, C].
        before: [B, C, L], inputs before x. None: L is 0.

    Returns:
        inputs [B, L + N, C], and place [B, N], the index of each token of x in inputs.
    """
    x = torch.where(mask[..., None], x, 0)
    if before is not None:
        x = torch.cat([before.transpose(1, 2).to(x.dtype), x], dim=1)
        mask = F.pad(mask, (before.shape[2], 0), value=True)
    padding = (~mask).sum(1, keepdim=True)
    # The places of one row are a permutation. Padding keeps its order, and so do tokens.
    place = torch.where(mask, padding + mask.cumsum(1) - 1, (~mask).cumsum(1) - 1)
    inputs = torch.zeros_like(x).scatter(1, place[..., None].expand_as(x), x)
    return inputs, place if before is None else place[:, before.shape[2] :]
