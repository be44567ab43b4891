"""MiniMax models of transformers with leetcore as their linear attention: `patch(model)`.

The layer of transformers computes blocks of 256 tokens in the model's dtype, and walks token by token when it continues
from a cache. The patched one calls the operator once in either case, and keeps states in float32 and decays exact.
Weights, configuration and cache stay as they are.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ... import decay
from ..ops import decode_step, linear_attention

try:
    from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention
except ImportError as error:
    raise ImportError(
        "transformers: expected a version with MiniMaxLightningAttention and MiniMaxCache in models.minimax, got "
        + transformers.__version__
    ) from error

_MOST_DECODED = 64  # tokens that decode_step takes
_KEPT = "forward", "_old_forward"  # where hooks of accelerate keep, in the layer, the forward that they wrap
_ATTRIBUTES = "qkv_proj act_fn output_gate norm out_proj slope_rate layer_idx num_attention_heads num_hidden_layers"


def patch(model: nn.Module) -> int:
    """Lets every linear attention layer of a MiniMax model compute with leetcore, in place; `unpatch` undoes it.

    Prefill, continuation of a cache by any number of tokens, left padding, beam search and training work as before. A
    cached state is float32, and updated in place by at most 64 tokens without gradients.

    Args:
        model: MiniMaxForCausalLM or any module that contains MiniMaxLightningAttention.

    Returns:
        How many layers were patched.

    Raises:
        ValueError: there is no such layer.
        NotImplementedError: the layer of this version of transformers is not the one known here; what differs is named.
    """
    layers = [layer for layer in model.modules() if type(layer) is MiniMaxLightningAttention]
    if not layers:
        raise ValueError(f"model: expected one with layers MiniMaxLightningAttention, got {type(model).__name__}")
    for layer in layers:
        if differences := _differences(layer):
            raise NotImplementedError(
                f"transformers {transformers.__version__}: expected a MiniMaxLightningAttention as in 5.24, but "
                + "; ".join(differences)
            )
    for layer in layers:
        _become(layer, LightningAttention)
    return len(layers)


def unpatch(model: nn.Module) -> int:
    """Gives patched layers their own computation back; returns how many there were. States in caches stay float32."""
    layers = [layer for layer in model.modules() if type(layer) is LightningAttention]
    for layer in layers:
        _become(layer, MiniMaxLightningAttention)
    return len(layers)


class LightningAttention(MiniMaxLightningAttention):
    """MiniMaxLightningAttention by leetcore; `patch` makes it of existing layers."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output [B, N, C] and its state [B, H, D, D], which is also put into the cache."""
        cache = past_key_values if cache is None else cache
        N = hidden_states.shape[1]
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:  # [B, N] or longer at the front: padding adds nothing to a state
            qkv = qkv * attention_mask[:, -N:, None].to(qkv.dtype)
        q, k, v = qkv.unflatten(-1, (self.num_attention_heads, -1)).chunk(3, dim=-1)
        log_decay = _log_decay(self.num_attention_heads, self.layer_idx, self.num_hidden_layers, qkv.device)

        state = None if cache is None else cache.get_linear_cache(self.layer_idx)
        if state is not None:
            state = state.to(torch.promote_types(qkv.dtype, torch.float32))
        if state is None or N > _MOST_DECODED or (torch.is_grad_enabled() and qkv.requires_grad):
            o, state = linear_attention(q, k, v, log_decay, initial_state=state, return_state=True, layout="bnhd")
        else:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
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


@functools.cache
def _log_decay(heads: int, layer: int, layers: int, device: torch.device) -> Tensor:
    return torch.from_numpy(decay.minimax(heads, layer, layers)).to(device)


def _differences(layer: Any) -> list[str]:
    """What the patch relies on and the installed transformers does not have."""
    found = [f"it has no {name}" for name in _ATTRIBUTES.split() if not hasattr(layer, name)]
    found += [
        f"MiniMaxCache has no {name}"
        for name in ("get_linear_cache", "set_linear_cache")
        if not hasattr(MiniMaxCache, name)
    ]
    taken = inspect.signature(MiniMaxLightningAttention.forward).parameters
    found += [f"its forward takes no {name}" for name in ("hidden_states", "attention_mask") if name not in taken]
    if not {"cache", "past_key_values"} & set(taken):
        found.append("its forward takes no cache")
    kept = [vars(layer)[name] for name in _KEPT if name in vars(layer)]
    if kept and not any(_is_forward_of(call, MiniMaxLightningAttention) for call in kept):
        found.append("its forward has been replaced")
    if not found and not layer.slope_rate.is_meta:
        slopes = layer.slope_rate.detach().flatten().float().cpu()
        ours = -_log_decay(layer.num_attention_heads, layer.layer_idx, layer.num_hidden_layers, slopes.device)
        if slopes.shape != ours.shape or not torch.allclose(slopes, ours, rtol=2**-7, atol=0):  # bfloat16 at worst
            found.append(f"its slope_rate of layer {layer.layer_idx} is not leetcore.decay.minimax(flavor='hf')")
    return found
