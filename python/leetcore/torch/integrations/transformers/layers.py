"""What all families share: the class of a layer changes in place, and masks of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Attributes in which hooks of accelerate keep the layer's own forward.
_KEPT = "forward", "_old_forward"


def become(layer: Any, kind: type) -> None:
    """Changes the class of a layer in place. Hooks of accelerate stay around its forward."""
    for name in _KEPT:
        if _is_forward_of(vars(layer).get(name), type(layer)):
            setattr(layer, name, kind.forward.__get__(layer))  # type: ignore[attr-defined]
    layer.__class__ = kind


def has_replaced_forward(layer: Any) -> bool:
    """Whether something other than the forward of its class runs when the layer is called."""
    kept = [vars(layer)[name] for name in _KEPT if name in vars(layer)]
    return bool(kept) and not any(_is_forward_of(call, type(layer)) for call in kept)


def _is_forward_of(call: Any, kind: Any) -> bool:
    return getattr(call, "__func__", None) is kind.forward


def masked_tokens(mask: Tensor, x: Tensor) -> Tensor:
    """The mask of transformers, of any dtype and maybe with earlier tokens, as bool [B, N]."""
    if mask.ndim != 2 or mask.shape[0] not in (1, x.shape[0]) or mask.shape[1] < x.shape[1]:
        raise ValueError(
            f"attention_mask: expected shape [{x.shape[0]}, {x.shape[1]}], or longer by the tokens before, as linear "
            f"attention has no use for another, got {list(mask.shape)}"
        )
    return mask[:, mask.shape[1] - x.shape[1] :].to(x.device).ne(0).expand(x.shape[:2])
