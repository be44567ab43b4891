"""MiniMaxLightningAttention of transformers, computed by leetcore.

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
from torch import Tensor

from .... import decay
from ...masks import hide
from ...nn import ConstantDecay
from ...ops import decode_step, linear_attention
from .layers import become, has_replaced_forward, masked_tokens

try:
    from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention
except ImportError as error:
    raise ImportError(
        "transformers: expected a version with MiniMaxLightningAttention and MiniMaxCache in models.minimax, got "
        + transformers.__version__
    ) from error

_MOST_DECODED = 64  # the most tokens that decode_step takes
_ATTRIBUTES = "qkv_proj act_fn output_gate norm out_proj slope_rate layer_idx num_attention_heads num_hidden_layers"


def is_served(layer: Any) -> bool:
    """Whether the layer can be patched and is not."""
    return type(layer) is MiniMaxLightningAttention


def is_patched(layer: Any) -> bool:
    """Whether the layer computes with leetcore."""
    return type(layer) is LightningAttention


def patch(layer: Any) -> None:
    """Makes a layer without `differences` compute with leetcore."""
    log_decay = _log_decay(layer)
    become(layer, LightningAttention)
    layer._set_decay(log_decay, layer.slope_rate.device)


def unpatch(layer: Any) -> None:
    """Restores the computation of transformers in a patched layer."""
    become(layer, MiniMaxLightningAttention)
    del layer.log_decay, layer._exact


class LightningAttention(ConstantDecay, MiniMaxLightningAttention):
    """MiniMaxLightningAttention computed by leetcore. `patch` turns layers of a model into it."""

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
            q, k, v, log_decay = hide(masked_tokens(attention_mask, hidden_states), q, k, v, log_decay)

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


def differences(layer: Any) -> list[str]:
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
    if has_replaced_forward(layer):
        found.append("its forward has been replaced")
    if not found and (slopes := _slopes(layer)) is not None and _distance(_log_decay(layer), slopes) > 1:
        found.append(f"its slope_rate of layer {layer.layer_idx} is not leetcore.decay.minimax")
    return found
