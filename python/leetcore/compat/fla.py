"""Operators of flash-linear-attention, served by leetcore.

The library is github.com/fla-org/flash-linear-attention, fla-core 0.6.

Signatures, layouts ([B, T, H, D]), scale (K^-0.5) and decays are fla's. `leetcore.torch` computes
the results, on any device, without graph breaks, and with gradients for a constant decay too.

`chunk_`, `fused_chunk_` and `fused_recurrent_` name the same operator. These functions return (o,
final_state), where final_state is None unless output_final_state is set. `parallel_` functions
return (o, weights), where weights is None unless output_attentions is set. chunk_size and
cu_seqlens_cpu only choose among fla's kernels and are ignored. An unknown argument raises
TypeError.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..torch.ops import linear_attention

__all__ = [
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
    "parallel_retention",
    "parallel_simple_gla",
]


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a scalar decay per head.

    Args:
        q, k: [B, T, H, K]. float64, float32, float16 or bfloat16, the same for q, k and v.
        v: [B, T, H, V].
        g: [B, T, H], log decay of each token, <= 0. Give at most one of g and g_gamma.
        g_gamma: [H], log decay of each head, <= 0. It has a gradient, which fla's has not.
        scale: a number that multiplies the output. None: K^-0.5.
        initial_state: [B, H, K, V], or [S, H, K, V] with cu_seqlens. None: zeros.
        output_final_state: whether to return the state after the last token.
        state_v_first: whether both states are [.., V, K].
        cu_seqlens: [S + 1], int32 or int64: start offsets of S sequences packed along T, from 0 to
            T; B is 1.
        cu_seqlens_cpu: ignored.
        chunk_size: ignored.

    Returns:
        (o [B, T, H, V], final_state), where final_state is None unless output_final_state is set.

    Raises:
        ValueError, TypeError: as in `leetcore.linear_attention`, whose log_decay is g or g_gamma.
    """
    return _simple_gla(q, k, v, g, g_gamma, scale, initial_state, output_final_state, False, state_v_first, cu_seqlens)


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla`. With reverse, it runs from the last token to the first.

    transpose_state_layout is fla's deprecated name of state_v_first.
    """
    state_v_first = _state_v_first(state_v_first, transpose_state_layout)
    return _simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, reverse, state_v_first, cu_seqlens
    )


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same as `chunk_simple_gla`."""
    return _simple_gla(q, k, v, g, g_gamma, scale, initial_state, output_final_state, False, False, cu_seqlens)


def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` without states.

    With output_attentions, it also returns the weights [B, H, T, T], which have no gradients.
    """
    return _parallel(q, k, v, g, None, scale, output_attentions, cu_seqlens)


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` with RetNet's decays: 1 - 2^(-5 - h) for head h.

    q must have all heads of the model, because the decays depend on the number of heads before a
    head.
    """
    return _simple_gla(
        q, k, v, None, _retention_decay(q), scale, initial_state, output_final_state, False, False, cu_seqlens
    )


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_retention`. With reverse, it runs from the last token to the first.

    transpose_state_layout is fla's deprecated name of state_v_first.
    """
    state_v_first = _state_v_first(state_v_first, transpose_state_layout)
    return _simple_gla(
        q, k, v, None, _retention_decay(q), scale, initial_state, output_final_state, reverse, state_v_first, cu_seqlens
    )


def fused_chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same as `chunk_retention`."""
    return chunk_retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens)


def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`parallel_simple_gla` with the decays of `chunk_retention`."""
    return _parallel(q, k, v, None, _retention_decay(q), scale, output_attentions, cu_seqlens)


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` with fla's decays: exp(-8 h / H (1 - layer_idx / num_layers)) for head h.

    MiniMax and TransNormerLLM have other decays. For their weights use `chunk_simple_gla` with
    g_gamma from `leetcore.decay.minimax` and scale=1.
    """
    return _simple_gla(
        q,
        k,
        v,
        None,
        _lightning_decay(q, layer_idx, num_layers),
        scale,
        initial_state,
        output_final_state,
        False,
        False,
        cu_seqlens,
    )


def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_lightning_attn`. With reverse, it runs from the last token to the first."""
    return _simple_gla(
        q,
        k,
        v,
        None,
        _lightning_decay(q, layer_idx, num_layers),
        scale,
        initial_state,
        output_final_state,
        reverse,
        False,
        cu_seqlens,
    )


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:
    """Linear attention without decay.

    With normalize, o is divided by the sum of the weights, scale * q_t . (k_1 + ... + k_t), and
    states are pairs (kv [B, H, K, V], z [B, 1, H, K]), where z is the sum of the keys.
    """
    return _linear_attn(q, k, v, scale, initial_state, output_final_state, False, normalize, cu_seqlens)


def fused_chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:
    """The same as `chunk_linear_attn`."""
    return _linear_attn(q, k, v, scale, initial_state, output_final_state, False, normalize, cu_seqlens)


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:
    """`chunk_linear_attn` with normalize=False by default.

    With reverse, it runs from the last token to the first.
    """
    return _linear_attn(q, k, v, scale, initial_state, output_final_state, reverse, normalize, cu_seqlens)


def _linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None,
    output_final_state: bool,
    reverse: bool,
    normalize: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:
    if isinstance(initial_state, tuple) and not normalize:
        raise TypeError("initial_state: expected a tensor where normalize is False, got a tuple")
    kv, z = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    o, final = _simple_gla(q, k, v, None, None, scale, kv, output_final_state, reverse, False, cu_seqlens)
    if not normalize:
        return o, final
    # The sum of the weights is attention to values of 1; z is the state of this attention.
    z = None if z is None else z.transpose(1, 2).transpose(2, 3)  # [B, H, K, 1]
    ones = torch.ones_like(v[..., :1])
    total, sums = _simple_gla(q, k, ones, None, None, scale, z, output_final_state, reverse, False, cu_seqlens)
    o = (o / (total + 1e-10)).to(o.dtype)
    if final is None or sums is None:
        return o, None
    return o, (final, sums.transpose(2, 3).transpose(1, 2))


def _parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    scale: float | None,
    output_attentions: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    if output_attentions and cu_seqlens is not None:
        raise ValueError("output_attentions: expected False with cu_seqlens, got True")
    o, _ = _simple_gla(q, k, v, g, g_gamma, scale, None, False, False, False, cu_seqlens)
    if not output_attentions:
        return o, None
    with torch.no_grad():  # The weights are attention to the rows of the identity matrix.
        rows = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)[None, :, None].expand(*v.shape[:3], -1)
        weights, _ = _simple_gla(q, k, rows, g, g_gamma, scale, None, False, False, False, None)
    return o, weights.transpose(1, 2)


def _simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    reverse: bool,
    state_v_first: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    if g is not None and g_gamma is not None:
        raise ValueError("g_gamma: expected None where g is given, got both")
    log_decay = g if g_gamma is None else g_gamma
    if log_decay is not None:
        log_decay = _exact(log_decay, q)
    if initial_state is not None:
        initial_state = _exact(initial_state, q)
        initial_state = initial_state.transpose(2, 3) if state_v_first else initial_state
    if reverse:
        q, k, v = (x.flip(1) for x in (q, k, v))
        log_decay = log_decay.flip(1) if log_decay is not None and log_decay.ndim == 3 else log_decay
        cu_seqlens, initial_state = _reversed(cu_seqlens, initial_state)
    result = linear_attention(
        q,
        k,
        v,
        log_decay,
        scale=k.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        return_state=output_final_state,
        cu_seqlens=cu_seqlens,
        layout="bnhd",
    )
    o, state = result if output_final_state else (result, None)
    if reverse:
        o, state = o.flip(1), _reversed(cu_seqlens, state)[1]
    return o, state.transpose(2, 3) if state is not None and state_v_first else state


def _state_v_first(state_v_first: bool, older: bool | None) -> bool:
    if older is None:
        return state_v_first
    if state_v_first:
        raise ValueError("transpose_state_layout: expected None with state_v_first, its newer name, got both")
    warnings.warn("transpose_state_layout is fla's deprecated name of state_v_first", DeprecationWarning, stacklevel=3)
    return older


def _reversed(cu_seqlens: Tensor | None, state: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The bounds and states of packed sequences in reverse order."""
    if cu_seqlens is None:
        return None, state
    return cu_seqlens[-1] - cu_seqlens.flip(0), None if state is None else state.flip(0)


def _exact(x: Tensor, q: Tensor) -> Tensor:
    if not isinstance(x, Tensor):  # for the operator to refuse
        return x
    return x.to(torch.float64 if q.dtype is torch.float64 else torch.float32)


def _retention_decay(q: Tensor) -> Tensor:
    heads = torch.arange(q.shape[2], dtype=torch.float64, device=q.device)
    return torch.log1p(-torch.exp2(-5 - heads))


def _lightning_decay(q: Tensor, layer_idx: int, num_layers: int) -> Tensor:
    heads = torch.arange(q.shape[2], dtype=torch.float64, device=q.device)
    return -8 / q.shape[2] * (1 - layer_idx / num_layers) * heads + 0.0
