"""What surrounds the scan of a Mamba-2 layer: convolution, padding, gated norm; and the layer.

`mix` and `mix_step` are the middle of every Mamba-2 layer, between its two projections. `Mamba2`
uses them (`leetcore.torch.nn` exports it), and so do the layers of transformers that
`leetcore.torch.integrations.transformers` patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import causal_conv1d, causal_conv1d_step, ssd, ssd_step
from .masks import masked_tokens, tokens_last


class Parts(NamedTuple):
    """The tensors of a layer that `mix` and `mix_step` read.

    H heads of size P share G groups of B and C, whose size is K. C = H P + 2 G K channels pass the
    convolution.

    Attributes:
        conv_weight: [C, W].
        conv_bias: [C] or None.
        A_log: [H]; A is -exp(A_log).
        D: [H] or [H, P].
        dt_bias: [H].
        head_dim: P.
        groups: G.
        dt_limit: the limits of the step sizes.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    A_log: Tensor
    D: Tensor
    dt_bias: Tensor
    head_dim: int
    groups: int
    dt_limit: tuple[float, float]

    def A(self) -> Tensor:
        """-exp(A_log) in float32 at least."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [.., H, P], B and C [.., G, K] of channels [.., C]."""
        width = self.A_log.shape[0] * self.head_dim
        x, B, C = xBC.split([width, *[(xBC.shape[-1] - width) // 2] * 2], dim=-1)
        return (
            x.unflatten(-1, (-1, self.head_dim)),
            B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)),
        )


def mix(
    parts: Parts,
    xBC: Tensor,
    dt: Tensor,
    z: Tensor | None = None,
    *,
    conv_state: Tensor | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Convolution and scan of a sequence, with gradients.

    Args:
        parts: the tensors of the layer.
        xBC: [B, N, C], channels before the convolution.
        dt: [B, N, H], step sizes before dt_bias and softplus.
        z: [B, N, H, P], a gate of the result, or None.
        conv_state: [B, C, L], L >= W - 1, the inputs of the convolution before xBC. None: no such
            inputs, and no states are returned.
        state: [B, H, P, K], the state of the scan before xBC. None: zeros.
        mask: bool [B, N], False at padding, which may be anywhere. Padding enters no state and no
            result of another token.
        cu_seqlens: [S + 1], start offsets of S packed sequences; B is 1, and states are of S.

    Returns:
        y [B, N, H, P], and both states after the tokens; they are None if conv_state is None.
    """
    options: dict[str, Any] = {"dt_bias": parts.dt_bias, "dt_softplus": True, "dt_limit": parts.dt_limit}
    if mask is None:
        u = xBC.transpose(1, 2)
        u = causal_conv1d(
            u,
            parts.conv_weight,
            parts.conv_bias,
            activation="silu",
            initial_state=conv_state,
            return_state=conv_state is not None,
            cu_seqlens=cu_seqlens,
        )
        if conv_state is not None:
            u, conv_state = u
        u = u.transpose(1, 2)
    else:
        inputs, place = tokens_last(mask, xBC, conv_state)
        u = causal_conv1d(inputs.transpose(1, 2), parts.conv_weight, parts.conv_bias, activation="silu").transpose(1, 2)
        u = u.gather(1, place[..., None].expand_as(xBC))
        if conv_state is not None:
            conv_state = inputs[:, inputs.shape[1] - conv_state.shape[2] :].transpose(1, 2)
        # The step size of padding is 0. No dt gives it, as softplus is positive and limits may be.
        dt = dt.to(torch.promote_types(dt.dtype, torch.float32)) + parts.dt_bias
        dt, options = torch.where(mask[..., None], F.softplus(dt).clamp(*parts.dt_limit), 0), {}
    x, B, C = parts.split(u)
    y = ssd(
        x,
        dt,
        parts.A(),
        B,
        C,
        parts.D,
        z=z,
        initial_state=state,
        return_state=conv_state is not None,
        cu_seqlens=cu_seqlens,
        **options,
    )
    if conv_state is None:
        return y, None, None
    y, state = y
    return y, conv_state, state


def mix_step(
    parts: Parts, xBC: Tensor, dt: Tensor, z: Tensor | None = None, *, conv_state: Tensor, state: Tensor
) -> Tensor:
    """`mix` of one more token, which updates both states in place; inference only.

    Args:
        parts: the tensors of the layer.
        xBC: [B, C].
        dt: [B, H].
        z: [B, H, P] or None.
        conv_state: [B, C, L].
        state: [B, H, P, K].

    Returns:
        y [B, H, P].
    """
    options: dict[str, Any] = {"dt_bias": parts.dt_bias, "dt_softplus": True, "dt_limit": parts.dt_limit}
    u = causal_conv1d_step(xBC, parts.conv_weight, conv_state, parts.conv_bias, activation="silu")
    x, B, C = parts.split(u)
    y: Tensor = ssd_step(x, dt, parts.A(), B, C, state, parts.D, z=z, **options)
    return y


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool,
) -> Tensor:
    """RMS norm of groups of channels with a gate silu(z), computed in float32 at least.

    Args:
        x: [.., C].
        weight, bias: [C], which scale and shift the normed values.
        z: [.., C], the gate. None: no gate.
        eps: epsilon of the norm.
        group_size: number of channels that are normed together. None: all C.
        norm_before_gate: whether the result is norm(x) silu(z), and not norm(x silu(z)).

    Returns:
        [.., C] of x's dtype.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    y = x.to(exact)
    gate = None if z is None else F.silu(z.to(exact))
    if gate is not None and not norm_before_gate:
        y = y * gate
    size = x.shape[-1] if group_size is None else group_size
    y = F.rms_norm(y.unflatten(-1, (-1, size)), (size,), eps=eps).flatten(-2) * weight.to(exact)
    if bias is not None:
        y = y + bias.to(exact)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


class RMSNormGated(nn.Module):
    """`gated_rms_norm` with a weight, with the arguments of mamba_ssm's RMSNorm.

    Args:
        hidden_size: number of channels.
        eps: epsilon of the norm.
        group_size: number of channels that are normed together. None: all.
        norm_before_gate: whether the norm precedes the gate.
        device, dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """The norm of x [.., C] with the gate silu(z); z is [.., C] or None."""
        return gated_rms_norm(
            x, self.weight, z=z, eps=self.eps, group_size=self.group_size, norm_before_gate=self.norm_before_gate
        )


@dataclass
class Mamba2State:
    """The state of a Mamba-2 layer after the tokens it has processed.

    Attributes:
        memory: [B, H, P, K], or [S, H, P, K] with cu_seqlens; float32, or float64 in a float64
            layer.
        conv: [B, C, W - 1] or [S, C, W - 1], the last inputs of the convolution.
    """

    memory: Tensor
    conv: Tensor

    def select(self, indices: Tensor) -> Mamba2State:
        """A copy of the state of some sequences, such as the beams that a search keeps."""
        return Mamba2State(self.memory[indices], self.conv[indices])

    def detach(self) -> Mamba2State:
        """The state detached from the autograd graph, for training on pieces of a long text."""
        return Mamba2State(self.memory.detach(), self.conv.detach())


torch.serialization.add_safe_globals([Mamba2State])  # lets torch.load read it with weights_only=True


class Mamba2(nn.Module):
    """The layer of Mamba-2 (arXiv:2405.21060).

    [z, x, B, C, dt] = W_in u; x, B and C pass a causal convolution and silu; y = W_out
    norm(ssd(x, dt, A, B, C, D) silu(z)). Parameters have the names and shapes of mamba_ssm's
    Mamba2 and of transformers' Mamba2Mixer, so the weights of both load. H = expand d_model /
    headdim is the number of heads.

    Args:
        d_model: size of u and y.
        d_state: K, size of B and C per group.
        d_conv: W, width of the convolution, 2 to 8.
        expand: the scan has expand * d_model channels.
        headdim: P, number of channels per head.
        ngroups: G, number of groups of heads that share B and C. The norm is per group.
        A_init_range: -A of new layers is uniform in this range.
        D_has_hdim: whether D has one value per channel, and not per head.
        rmsnorm: whether a norm follows the scan. Without it, the gate is applied alone.
        norm_before_gate: whether the norm precedes the gate.
        dt_min, dt_max, dt_init_floor: step sizes of new layers are log-uniform from dt_min to
            dt_max, and at least dt_init_floor.
        dt_limit: the limits of the step sizes.
        bias: whether the projections have biases.
        conv_bias: whether the convolution has a bias.
        eps: epsilon of the norm.

    Raises:
        ValueError: expand * d_model is no multiple of headdim, or the number of heads is no
            multiple of ngroups.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        *,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        width = expand * d_model
        if headdim < 1 or width % headdim:
            raise ValueError(f"headdim: expected a divisor of expand * d_model = {width}, got {headdim}")
        heads = width // headdim
        if ngroups < 1 or heads % ngroups:
            raise ValueError(f"ngroups: expected a divisor of the number of heads, {heads}, got {ngroups}")
        self.d_model, self.d_state, self.headdim, self.ngroups = d_model, d_state, headdim, ngroups
        self.num_heads, self.rmsnorm, self.D_has_hdim, self.dt_limit = heads, rmsnorm, D_has_hdim, dt_limit
        channels = width + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, width + channels + heads, bias=bias)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, bias=conv_bias)
        dt = torch.exp(torch.empty(heads).uniform_(math.log(dt_min), math.log(dt_max))).clamp(min=dt_init_floor)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) is dt
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(width if D_has_hdim else heads))
        if rmsnorm:
            self.norm = RMSNormGated(width, eps, width // ngroups, norm_before_gate)
        self.out_proj = nn.Linear(width, d_model, bias=bias)

    def forward(
        self,
        u: Tensor,
        state: Mamba2State | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Applies the layer to a sequence, or to its continuation if a state is given.

        Args:
            u: [B, N, d_model], the tokens.
            state: the state after the tokens before u, from `new_state` or from an earlier call.
                The call updates it; its tensors are differentiable. None: u begins the sequence.
            cu_seqlens: [S + 1], int32 or int64: start offsets of S sequences packed along N, from 0
                to N; B is 1.
            mask: [B, N], bool or integers: False or 0 at padding, which may be anywhere. y of the
                other tokens, the state and gradients are the same as without padding.

        Returns:
            y [B, N, d_model].

        Raises:
            ValueError, TypeError: an argument breaks the rules above.
        """
        shown = None if mask is None else masked_tokens("mask", mask, u)
        if shown is not None and cu_seqlens is not None:
            raise ValueError("mask: expected None with cu_seqlens, got both; packed sequences have no padding")
        if shown is not None:
            u = torch.where(shown[..., None], u, 0)
        z, xBC, dt = self._project(u)
        y, conv, memory = mix(
            self._parts(),
            xBC,
            dt,
            self._scan_gate(z),
            conv_state=None if state is None else state.conv,
            state=None if state is None else state.memory,
            mask=shown,
            cu_seqlens=cu_seqlens,
        )
        if state is not None:
            assert conv is not None and memory is not None
            state.conv, state.memory = conv, memory
        return self._finish(y, z)

    def step(self, u: Tensor, state: Mamba2State) -> Tensor:
        """Applies the layer to one more token and updates the state in place; inference only.

        Args:
            u: [B, d_model], the token.
            state: the state after the tokens before u.

        Returns:
            y [B, d_model].

        Raises:
            NotImplementedError: a gradient is required.
        """
        z, xBC, dt = self._project(u)
        y = mix_step(self._parts(), xBC, dt, self._scan_gate(z), conv_state=state.conv, state=state.memory)
        return self._finish(y, z)

    def new_state(self, batch_size: int) -> Mamba2State:
        """The state before the first token of `batch_size` sequences, on the parameters' device."""
        like, (channels, _, width) = self.in_proj.weight, self.conv1d.weight.shape
        exact = torch.promote_types(like.dtype, torch.float32)
        return Mamba2State(
            torch.zeros(batch_size, self.num_heads, self.headdim, self.d_state, dtype=exact, device=like.device),
            torch.zeros(batch_size, channels, width - 1, dtype=like.dtype, device=like.device),
        )

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [.., H P], xBC [.., C] and dt [.., H] of u [.., d_model]."""
        z, xBC, dt = self.in_proj(u).split(
            [self.num_heads * self.headdim, self.conv1d.weight.shape[0], self.num_heads], dim=-1
        )
        return z, xBC, dt

    def _parts(self) -> Parts:
        D = self.D.view(self.num_heads, self.headdim) if self.D_has_hdim else self.D
        weight = self.conv1d.weight[:, 0]
        return Parts(weight, self.conv1d.bias, self.A_log, D, self.dt_bias, self.headdim, self.ngroups, self.dt_limit)

    def _scan_gate(self, z: Tensor) -> Tensor | None:
        return None if self.rmsnorm else z.unflatten(-1, (-1, self.headdim))

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        y = y.flatten(-2)
        result: Tensor = self.out_proj(self.norm(y, z) if self.rmsnorm else y)
        return result

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, headdim={self.headdim}, d_state={self.d_state}, ngroups={self.ngroups}"
