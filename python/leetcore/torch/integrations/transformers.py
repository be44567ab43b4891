"""MiniMax models of transformers with leetcore as their linear attention: `patch(model)`.

The layer of transformers computes blocks of 256 tokens in the model's dtype, and one token at a
time when it continues from a cache. The patched layer calls the operator once in both cases. It
keeps states in float32 and decays exact. Padding does not change a state. Weights, configuration
and cache stay as they are.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn

from ... import decay
from ..masks import hide
from ..nn import ConstantDecay
from ..ops import decode_step, linear_attention

try:
    from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention
except ImportError as error:
    raise ImportError(
        "transformers: expected a version with MiniMaxLightningAttention and MiniMaxCache in models.minimax, got "
        + transformers.__version__
    ) from error

_MOST_DECODED = 64  # the most tokens that decode_step takes
# Attributes in which hooks of accelerate keep the layer's own forward.
_KEPT = "forward", "_old_forward"
_ATTRIBUTES = "qkv_proj act_fn output_gate norm out_proj slope_rate layer_idx num_attention_heads num_hidden_layers"


def patch(model: nn.Module) -> int:
    """Makes every linear attention layer of a MiniMax model compute with leetcore, in place.

    Prefill, continuation of a cache by any number of tokens, beam search and training work as
    before. Padding does not decay a state. A cached state is float32; a call of up to 64 tokens
    without gradients updates it in place. Layers that are already patched stay as they are.
    `unpatch` undoes the change.

    Args:
        model: MiniMaxForCausalLM or any module that contains MiniMaxLightningAttention.

    Returns:
        The number of layers that compute with leetcore now.

    Raises:
        ValueError: the model has no such layer.
        NotImplementedError: the layer of this version of transformers is not the one that leetcore
            knows; the text names the difference.
    """
    layers: list[Any] = [layer for layer in model.modules() if type(layer) is MiniMaxLightningAttention]
    patched = sum(type(layer) is LightningAttention for layer in model.modules())
    if not layers and not patched:
        raise ValueError(f"model: expected one with layers MiniMaxLightningAttention, got {type(model).__name__}")
    for layer in layers:
        if differences := _differences(layer):
            raise NotImplementedError(
                f"transformers {transformers.__version__}: expected a MiniMaxLightningAttention as in 5.24, but "
                + "; ".join(differences)
            )
    for layer in layers:
        log_decay = _log_decay(layer)
        _become(layer, LightningAttention)
        layer._set_decay(log_decay, layer.slope_rate.device)
    return patched + len(layers)


def unpatch(model: nn.Module) -> int:
    """Restores the computation of transformers in patched layers. States in caches stay float32.

    Returns:
        The number of layers that were patched.
    """
    layers = [layer for layer in model.modules() if type(layer) is LightningAttention]
    for layer in layers:
        _become(layer, MiniMaxLightningAttention)
        del layer.log_decay, layer._exact
    return len(layers)


class LightningAttention(ConstantDecay, MiniMaxLightningAttention):
    """MiniMaxLightningAttention computed by leetcore. `patch` turns existing layers into it."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        past_key_value: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output [B, N, C] and its state [B, H, D, D].

        The state also replaces the one in the cache.
        """
        for older in (past_key_values, past_key_value):
            cache = older if cache is None else cache
        N = hidden_states.shape[1]
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        q, k, v = qkv.unflatten(-1, (self.num_attention_heads, -1)).chunk(3, dim=-1)
        log_decay = self._decay_on(qkv.device)
        if attention_mask is not None:
            q, k, v, log_decay = hide(_masked_tokens(attention_mask, hidden_states), q, k, v, log_decay)

        state = None if cache is None else cache.get_linear_cache(self.layer_idx)
        if state is not None:
            state = state.to(torch.promote_types(qkv.dtype, torch.float32))
        if state is None or N > _MOST_DECODED or (torch.is_grad_enabled() and qkv.requires_grad):
            o, state = linear_attention(q, k, v, log_decay, initial_state=state, return_state=True, layout="bnhd")
        else:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            log_decay = log_decay if attention_mask is None or log_decay is None else log_decay.transpose(1, 2)
            o = decode_step(q, k, v, state, log_decay).transpose(1, 2)
        if cache is not None:
            cache.set_linear_cache(self.layer_idx, state)

        y = torch.sigmoid(self.output_gate(hidden_states)) * self.norm(o.flatten(-2))
        return self.out_proj(y), state


def _become(layer: Any, kind: type) -> None:
    for name in _KEPT:
        if _is_forward_of(vars(layer).get(name), type(layer)):
            setattr(layer, name, kind.forward.__get__(layer))  # type: ignore[attr-defined]
    layer.__class__ = kind


def _is_forward_of(call: Any, kind: Any) -> bool:
    return getattr(call, "__func__", None) is kind.forward


def _masked_tokens(mask: Tensor, x: Tensor) -> Tensor:
    """The mask of transformers, of any dtype and maybe with earlier tokens, as bool [B, N]."""
    if mask.ndim != 2 or mask.shape[0] not in (1, x.shape[0]) or mask.shape[1] < x.shape[1]:
        raise ValueError(
            f"attention_mask: expected shape [{x.shape[0]}, {x.shape[1]}], or longer by the tokens before, as linear "
            f"attention has no use for another, got {list(mask.shape)}"
        )
    return mask[:, mask.shape[1] - x.shape[1] :].to(x.device).ne(0).expand(x.shape[:2])


def _log_decays(layer: Any) -> list[npt.NDArray[np.float32]]:
    """The decays that known versions of transformers give the layer."""
    heads, index, layers = layer.num_attention_heads, layer.layer_idx, layer.num_hidden_layers
    undivided = decay.minimax(heads, 0, 1) / (1 + 1e-5)
    return [
        decay.minimax(heads, index, layers),
        (undivided * (1 - index / max(layers - 1, 1) + 1e-5)).astype(np.float32),
        decay.minimax(heads, index, layers, "vllm"),
    ]


def _distance(log_decay: npt.NDArray[np.float32], slopes: npt.NDArray[np.float32]) -> float:
    """The distance between slopes and a decay, at most 1 if rounding may explain it.

    bfloat16 changes a number by up to 2^-8 of it. float16 makes the smallest slopes of the last
    layer multiples of 2^-24. A slope may have been rounded twice.
    """
    if slopes.shape != log_decay.shape:
        return float("inf")
    return float(np.max(np.abs(slopes + log_decay) / (2**-24 - 2**-7 * log_decay)))


def _slopes(layer: Any) -> npt.NDArray[np.float32] | None:
    """The layer's slopes. None if they are on the device "meta"."""
    if layer.slope_rate.is_meta:
        return None
    slopes: npt.NDArray[np.float32] = layer.slope_rate.detach().flatten().float().cpu().numpy()
    return slopes


def _log_decay(layer: Any) -> npt.NDArray[np.float32]:
    """The known decay that is closest to the layer's rounded slopes."""
    slopes, known = _slopes(layer), _log_decays(layer)
    return known[0] if slopes is None else min(known, key=lambda log_decay: _distance(log_decay, slopes))


def _differences(layer: Any) -> list[str]:
    """The things that the patch needs and the installed transformers lacks, one sentence each."""
    found = [f"it has no {name}" for name in _ATTRIBUTES.split() if not hasattr(layer, name)]
    found += [
        f"MiniMaxCache has no {name}"
        for name in ("get_linear_cache", "set_linear_cache")
        if not hasattr(MiniMaxCache, name)
    ]
    taken = inspect.signature(MiniMaxLightningAttention.forward).parameters
    found += [f"its forward takes no {name}" for name in ("hidden_states", "attention_mask") if name not in taken]
    if not {"cache", "past_key_values", "past_key_value"} & set(taken):
        found.append("its forward takes no cache")
    kept = [vars(layer)[name] for name in _KEPT if name in vars(layer)]
    if kept and not any(_is_forward_of(call, MiniMaxLightningAttention) for call in kept):
        found.append("its forward has been replaced")
    if not found and (slopes := _slopes(layer)) is not None and _distance(_log_decay(layer), slopes) > 1:
        found.append(f"its slope_rate of layer {layer.layer_idx} is not leetcore.decay.minimax")
    return found
