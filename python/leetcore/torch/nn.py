"""Layers of causal linear attention, for whole sequences and for generation from a state.

Every layer maps [B, N, embed_dim] to the same shape:

    y = layer(x)                        # a whole sequence, as in training
    state = layer.new_state(B)          # generation:
    y = layer(prompt, state)            # in one piece or in several; updates the state
    y = layer.step(x, state)            # one more token, [B, embed_dim]; inference only

    y = layer(x, mask=mask)             # mask [B, N] is False at padding, on either side or in
    between

Both ways give the same numbers. state_dict() holds parameters only. Constant decays are computed
from the arguments of the constructor, and stay float32 when .to(dtype) converts the parameters.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import decay
from .mamba2_layer import Mamba2, Mamba2State
from .masks import hide, masked_tokens
from .ops import decode_step, linear_attention

__all__ = ["GatedLinearAttention", "Lightning", "LinearAttention", "Mamba2", "Mamba2State", "Retention", "State"]


@dataclass
class State:
    """The state of a layer after the tokens it has processed.

    Attributes:
        memory: [B, H, K, V], or [S, H, K, V] with cu_seqlens; float32, or float64 in a float64
            layer.
        position: number of tokens processed, int64: [], or [B] if a mask made the numbers differ.
    """

    memory: Tensor
    position: Tensor

    def select(self, indices: Tensor) -> State:
        """A copy of the state of some sequences, such as the beams that a search keeps."""
        return State(self.memory[indices], self.position[indices] if self.position.ndim else self.position)

    def detach(self) -> State:
        """The state detached from the autograd graph, for training on pieces of a long text."""
        return State(self.memory.detach(), self.position)


torch.serialization.add_safe_globals([State])  # lets torch.load read a saved State with weights_only=True


class ConstantDecay(nn.Module):
    """A module with a constant decay, which stays float32 and follows the inputs' device."""

    log_decay: Tensor | None
    _exact: Tensor | None

    def _set_decay(self, log_decay: npt.NDArray[np.float32] | None, device: torch.device | None = None) -> None:
        self._exact = None if log_decay is None else torch.from_numpy(log_decay)
        self.register_buffer("log_decay", None, persistent=False)
        self._move_decay(device)

    def _move_decay(self, device: torch.device | None) -> None:
        if self._exact is not None:
            self.log_decay = self._exact.to(device, copy=True)

    def _decay_on(self, device: torch.device) -> Tensor | None:
        """The decay on the device of an input. Parameters may have moved there without it."""
        if isinstance(device, fx.Proxy):  # torch.fx traces the layer: the device is unknown
            return self.log_decay
        if self.log_decay is not None and self.log_decay.device != device:
            self._move_decay(device)
        return self.log_decay

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.log_decay is not None:
            self._move_decay(self.log_decay.device)
        return result


class _Layer(ConstantDecay):
    """Base of the layers.

    `project` makes q, k, v and a decay of x; `finish` makes y of the operator's o.
    """

    def __init__(
        self, num_heads: int, key_dim: int, value_dim: int, scale: float, log_decay: npt.ArrayLike | None
    ) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.value_dim, self.scale = num_heads, key_dim, value_dim, scale
        self._set_decay(None if log_decay is None else _constant(log_decay, num_heads), torch.get_default_device())

    def project(self, x: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k [B, N, H, K], v [B, N, H, V] and log_decay of x [B, N, embed_dim].

        Args:
            x: [B, N, embed_dim].
            position: [N] or [B, N], int64, the index of each token in its sequence. None: 0, 1, 2,
                ...
        """
        raise NotImplementedError

    def _positions(self, x: Tensor, state: State | None, shown: Tensor | None) -> Tensor | None:
        """The indices of the tokens x in their sequences. Masked tokens are not counted."""
        if state is None and shown is None:
            return None
        own = torch.arange(x.shape[1], device=x.device) if shown is None else (shown.cumsum(1) - 1).clamp(min=0)
        if state is None:
            return own
        return own + (state.position[:, None] if state.position.ndim else state.position)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """y [B, N, embed_dim] of the outputs [B, N, H, V] and x."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Applies the layer to a sequence, or to its continuation if a state is given.

        Args:
            x: [B, N, embed_dim], the tokens.
            state: the state after the tokens before x, from `new_state` or from an earlier call.
                The call updates it; its memory is differentiable. None: x begins the sequence.
            cu_seqlens: [S + 1], int32 or int64: start offsets of S sequences packed along N, from 0
                to N; B is 1.
            mask: [B, N], bool or integers: False or 0 at padding, which may be anywhere. y of the
                other tokens, the state and gradients are the same as without padding; y of padding
                is 0.

        Returns:
            y [B, N, embed_dim].

        Raises:
            ValueError, TypeError: an argument breaks the rules above.
        """
        if isinstance(state, fx.Proxy):
            state = _require_none("state", state)
        if isinstance(mask, fx.Proxy):
            mask = _require_none("mask", mask)
        shown = None if mask is None else masked_tokens("mask", mask, x)
        if shown is not None and cu_seqlens is not None:
            raise ValueError("mask: expected None with cu_seqlens, got both; packed sequences have no padding")
        if shown is not None:
            x = torch.where(shown[..., None], x, 0)
        q, k, v, log_decay = self.project(x, self._positions(x, state, shown))
        if shown is not None:
            q, k, v, log_decay = hide(shown, q, k, v, log_decay)
        result = linear_attention(
            q,
            k,
            v,
            log_decay,
            scale=self.scale,
            initial_state=None if state is None else state.memory,
            return_state=state is not None,
            cu_seqlens=cu_seqlens,
            layout="bnhd",
        )
        if state is None:
            return self.finish(result, x)
        o, state.memory = result
        state.position = state.position + (x.shape[1] if shown is None else shown.sum(1))
        return self.finish(o, x)

    def step(self, x: Tensor, state: State) -> Tensor:
        """Applies the layer to one more token and updates the state in place; inference only.

        Args:
            x: [B, embed_dim], the token.
            state: the state after the tokens before x.

        Returns:
            y [B, embed_dim].

        Raises:
            NotImplementedError: a gradient is required.
        """
        x = x[:, None]
        q, k, v, log_decay = self.project(x, state.position[..., None])
        if log_decay is not None and log_decay.ndim == 3:
            log_decay = log_decay[:, 0]
        o = decode_step(q[:, 0], k[:, 0], v[:, 0], state.memory, log_decay, scale=self.scale)
        state.position = state.position + 1
        return self.finish(o[:, None], x)[:, 0]

    def new_state(self, batch_size: int) -> State:
        """The state before the first token of `batch_size` sequences, on the parameters' device."""
        like = next(self.parameters())
        exact = torch.float64 if like.dtype is torch.float64 else torch.float32
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        return State(
            torch.zeros(shape, dtype=exact, device=like.device),
            torch.zeros((), dtype=torch.int64, device=like.device),
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}, scale={self.scale:g}"


class LinearAttention(_Layer):
    """Linear attention as in MiniMax-Text-01 (arXiv:2501.08313).

    q, k, v = silu(W_qkv x) and y = W_o (sigmoid(W_g x) * norm(o)). Parameters have the names and
    shapes of transformers' MiniMaxLightningAttention, so its weights load.

    Args:
        embed_dim: size of x and y.
        num_heads: number of heads.
        head_dim: size of q, k and v per head. None: embed_dim / num_heads.
        log_decay: a number or [num_heads], <= 0; see `leetcore.decay`. None: no decay.
        eps: epsilon of the norm, which is over all heads together.

    Raises:
        ValueError: embed_dim is no multiple of num_heads, or log_decay breaks the rule above.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        log_decay: npt.ArrayLike | None = None,
        eps: float = 1e-6,
    ) -> None:
        head_dim = _share(embed_dim, num_heads) if head_dim is None else head_dim
        super().__init__(num_heads, head_dim, head_dim, 1.0, log_decay)
        width = num_heads * head_dim
        self.qkv_proj = nn.Linear(embed_dim, 3 * width, bias=False)
        self.output_gate = nn.Linear(embed_dim, width, bias=False)
        self.norm = nn.RMSNorm(width, eps)
        self.out_proj = nn.Linear(width, embed_dim, bias=False)

    def project(self, x: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v = F.silu(self.qkv_proj(x)).unflatten(-1, (self.num_heads, -1)).chunk(3, dim=-1)
        return q, k, v, self._decay_on(x.device)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.out_proj(torch.sigmoid(self.output_gate(x)) * self.norm(o.flatten(-2)))
        return y


class Lightning(LinearAttention):
    """`LinearAttention` with the decay of one layer of MiniMax-Text-01 (arXiv:2501.08313).

    Args:
        embed_dim: size of x and y.
        num_heads: number of heads.
        head_dim: size of q, k and v per head. None: embed_dim / num_heads.
        layer: index of the layer, from 0. The decay depends on it; see `leetcore.decay.minimax`.
        num_layers: number of layers of the model.
        eps: epsilon of the norm, which is over all heads together.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        layer: int,
        num_layers: int,
        eps: float = 1e-6,
    ) -> None:
        log_decay = decay.minimax(num_heads, layer, num_layers)
        super().__init__(embed_dim, num_heads, head_dim, log_decay=log_decay, eps=eps)


class Retention(_Layer):
    """Multi-scale retention of RetNet (arXiv:2307.08621).

    y = W_o (silu(W_g x) * norm_each_head(o)), where q and k are rotated. Parameters have the names
    and shapes of torchscale's MultiScaleRetention, so its weights load.

    Args:
        embed_dim: size of x and y.
        num_heads: number of heads of the model. Head h decays by 1 - 2^(-5 - h) per token.
        key_dim: size of q and k per head, even. None: embed_dim / num_heads.
        value_dim: size of v per head. None: 2 * key_dim.
        rotation: the angles of the rotation. Pair i of K / 2 turns by 10000^-x per token, with
            x = i / (K / 2 - 1) for "torchscale" and x = i / (K / 2) for "rope".
        heads: the heads that this layer computes, such as range(4, 8), in one process of a
            tensor-parallel model. The sum of y over the processes is y of the model. None: all
            heads.
        eps: epsilon of the norm.

    Raises:
        ValueError: an argument breaks the rules above.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        *,
        rotation: Literal["torchscale", "rope"] = "torchscale",
        heads: range | None = None,
        eps: float = 1e-6,
    ) -> None:
        key_dim = _share(embed_dim, num_heads) if key_dim is None else key_dim
        value_dim = 2 * key_dim if value_dim is None else value_dim
        if key_dim % 2:
            raise ValueError(f"key_dim: expected an even number, as pairs are rotated, got {key_dim}")
        if rotation not in ("torchscale", "rope"):
            raise ValueError(f"rotation: expected 'torchscale' or 'rope', got {rotation!r}")
        log_decay = decay.retnet(num_heads)
        if heads is not None:
            if not isinstance(heads, range) or heads.step != 1 or not 0 <= heads.start < heads.stop <= num_heads:
                raise ValueError(f"heads: expected a range with step 1 within range(0, {num_heads}), got {heads!r}")
            log_decay, num_heads = log_decay[heads.start : heads.stop], len(heads)
        super().__init__(num_heads, key_dim, value_dim, key_dim**-0.5, log_decay)
        self.rotation = rotation
        self.q_proj = nn.Linear(embed_dim, num_heads * key_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, num_heads * key_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, num_heads * value_dim, bias=False)
        self.g_proj = nn.Linear(embed_dim, num_heads * value_dim, bias=False)
        self.norm = nn.RMSNorm(value_dim, eps, elementwise_affine=False)
        self.out_proj = nn.Linear(num_heads * value_dim, embed_dim, bias=False)

    def project(self, x: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if position is None:
            position = torch.arange(x.shape[1], device=x.device)
        cos, sin = self._angles(position, x.dtype)
        q, k = (_rotate(p(x).unflatten(-1, (self.num_heads, -1)), cos, sin) for p in (self.q_proj, self.k_proj))
        return q, k, self.v_proj(x).unflatten(-1, (self.num_heads, -1)), self._decay_on(x.device)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.out_proj(F.silu(self.g_proj(x)) * self.norm(o).flatten(-2))
        return y

    def _angles(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [.., N, 1, key_dim / 2] of the angles, exact for large positions."""
        pairs = self.key_dim // 2
        steps = max(pairs - 1, 1) if self.rotation == "torchscale" else pairs
        exponents = torch.arange(pairs, dtype=torch.float64, device=position.device) / steps
        angles = position[..., None, None] * 10000.0**-exponents
        return angles.cos().to(dtype), angles.sin().to(dtype)


class GatedLinearAttention(_Layer):
    """Gated linear attention (arXiv:2312.06635) with a scalar gate, as in gated retention.

    y = W_o (silu(W_g x) * norm_each_head(o)). The decay of a head depends on the token.

    Args:
        embed_dim: size of x and y.
        num_heads: number of heads.
        key_dim: size of q and k per head. None: embed_dim / num_heads / 2.
        value_dim: size of v per head. None: embed_dim / num_heads.
        temperature: log_decay is log(sigmoid(W_a x + b)) / temperature. A larger temperature gives
            a longer memory.
        eps: epsilon of the norm.

    Raises:
        ValueError: embed_dim is no multiple of the number of heads, where a size is None.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        *,
        temperature: float = 16.0,
        eps: float = 1e-6,
    ) -> None:
        value_dim = _share(embed_dim, num_heads) if value_dim is None else value_dim
        key_dim = _share(embed_dim, 2 * num_heads) if key_dim is None else key_dim
        super().__init__(num_heads, key_dim, value_dim, key_dim**-0.5, None)
        self.temperature = temperature
        self.q_proj = nn.Linear(embed_dim, num_heads * key_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, num_heads * key_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, num_heads * value_dim, bias=False)
        self.decay_proj = nn.Linear(embed_dim, num_heads)
        self.g_proj = nn.Linear(embed_dim, num_heads * value_dim, bias=False)
        self.norm = nn.RMSNorm(value_dim, eps)
        self.out_proj = nn.Linear(num_heads * value_dim, embed_dim, bias=False)

    def project(self, x: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        logit = self.decay_proj(x)
        exact = logit.to(torch.promote_types(logit.dtype, torch.float32))
        return q, k, v, F.logsigmoid(exact) / self.temperature

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.out_proj(F.silu(self.g_proj(x)) * self.norm(o).flatten(-2))
        return y


def _require_none(name: str, value: fx.Proxy) -> None:
    """Makes a traced graph check that an argument, whose value torch.fx does not know, is None."""
    is_none = value.tracer.create_proxy("call_function", operator.is_, (value, None), {})
    torch._assert(is_none, f"{name}: expected None, as torch.fx traced the layer without it")


def _share(embed_dim: int, heads: int) -> int:
    if heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {heads}")
    if embed_dim % heads:
        raise ValueError(f"embed_dim: expected a multiple of {heads} where head dims are not given, got {embed_dim}")
    return embed_dim // heads


def _constant(log_decay: npt.ArrayLike, heads: int) -> npt.NDArray[np.float32]:
    """The caller's log_decay, checked, as float32."""
    if isinstance(log_decay, Tensor):
        if log_decay.requires_grad:
            raise ValueError(
                "log_decay: expected a constant, got a tensor with requires_grad; pass its detach(), or call "
                "leetcore.torch.linear_attention, where a decay is learned"
            )
        if log_decay.dtype not in (torch.float32, torch.float64) or log_decay.is_meta:
            given = "a tensor on the device meta" if log_decay.is_meta else str(log_decay.dtype)
            raise ValueError(f"log_decay: expected values in float32 or float64, got {given}")
        log_decay = log_decay.cpu().numpy()
    values = np.array(log_decay, np.float32)
    if values.shape not in ((), (heads,)):
        raise ValueError(f"log_decay: expected a number or shape [{heads}], got {list(values.shape)}")
    if not (values <= 0).all():  # calls do not check values on a GPU
        raise ValueError(f"log_decay: expected values <= 0, got {values.max():g}")
    return values


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbouring elements, each rotated by an angle."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
