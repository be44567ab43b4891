"""The functions of mamba_ssm. chunk_size and state_dtype are ignored: see the package."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...options import Activation
from ...torch import ssd, ssd_step
from ...torch.mamba2_layer import gated_rms_norm
from ...torch.packing import one_row, packed
from ..causal_conv1d import causal_conv1d_fn, has_gradient, write_states


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """The scan of Mamba-2 over a sequence.

    Args:
        x: [B, N, H, P]. float64, float32, float16 or bfloat16, the same for B, C and z.
        dt: [B, N, H] of any float dtype.
        A: [H], <= 0.
        B, C: [B, N, G, K].
        chunk_size: ignored.
        D: [H] or [H, P]. None: no skip.
        z: [B, N, H, P]. None: no gate.
        dt_bias: [H] or None.
        initial_states: [B, H, P, K], of the first sequence of each row. None: zeros.
        seq_idx: [B, N] integers: the sequence of each token, where rows are packed.
        cu_seqlens: [S + 1], int32 or int64: start offsets of S packed sequences; B is 1. Upstream
            reads it for return_varlen_states only, and needs seq_idx too.
        dt_softplus: whether the step size is softplus(dt + dt_bias).
        dt_limit: the limits of the step size.
        return_final_states: whether to return the state after each row.
        return_varlen_states: whether to return the state after each sequence of cu_seqlens.
        state_dtype: ignored.

    Returns:
        y [B, N, H, P] of x's dtype; or a tuple of y, final states [B, H, P, K] and states
        [S, H, P, K], with the states that were asked for, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: return_varlen_states without cu_seqlens, or as in `leetcore.torch.ssd`.
        TypeError, NotImplementedError: as in `leetcore.torch.ssd`.
    """
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("cu_seqlens: expected start offsets with return_varlen_states, got None")
    exact = torch.promote_types(x.dtype, torch.float32)
    rows = packed(seq_idx, cu_seqlens, x.shape[:2])
    shape, states = x.shape, initial_states
    if rows is not None:
        x, dt, B, C = one_row(x), one_row(dt), one_row(B), one_row(C)
        z = None if z is None else one_row(z)
        if states is not None:
            before = states.new_zeros(rows.cu_seqlens.shape[0] - 1, *states.shape[1:])
            states = before.index_copy(0, rows.first.to(before.device), states)
    y, states = ssd(
        x,
        dt if dt.dtype == x.dtype else dt.to(exact),
        A,
        B,
        C,
        D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=states,
        return_state=True,
        cu_seqlens=None if rows is None else rows.cu_seqlens,
    )
    results = [y.reshape(shape)]
    if return_final_states:
        results.append(states if rows is None else states[rows.last])
    if return_varlen_states:
        results.append(states)
    return tuple(results) if len(results) > 1 else results[0]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of Mamba-2, which updates the state in place.

    dt, A and dt_bias are expanded from one number per head, as every Mamba-2 layer has them: they
    have stride 0. The tensors of Mamba-1, which has one decay per channel and state, are refused.
    Where a gradient is required, y has one, and the state is updated without.

    Args:
        state: [slots, H, P, K], float32, float16 or bfloat16 (float64 with float64 inputs).
        x: [B, H, P]. float64, float32, float16 or bfloat16, the same for B, C and z.
        dt: [B, H, P], expanded from [B, H].
        A: [H, P, K], expanded from [H]; <= 0.
        B, C: [B, G, K].
        D: [H, P]. None: no skip.
        z: [B, H, P]. None: no gate.
        dt_bias: [H, P], expanded from [H]. None: zeros.
        dt_softplus: whether the step size is softplus(dt + dt_bias).
        state_batch_indices: [B], int32 or int64, the slot of each sequence; -1 skips a sequence.
            None: sequence b uses slot b.

    Returns:
        y [B, H, P] of x's dtype.

    Raises:
        ValueError: a tensor is of Mamba-1, or as in `leetcore.torch.ssd_step`.
        TypeError: as in `leetcore.torch.ssd_step`.
    """
    if state.ndim != 4:
        raise ValueError(f"state: expected shape [slots, H, P, K] of Mamba-2, got {list(state.shape)}")
    dt, A = _per_head("dt", dt, 1), _per_head("A", A, 2)
    dt_bias = None if dt_bias is None else _per_head("dt_bias", dt_bias, 1)
    exact = torch.promote_types(x.dtype, torch.float32)
    dt = dt if dt.dtype == x.dtype else dt.to(exact)
    options: dict[str, Any] = {"dt_bias": dt_bias, "dt_softplus": dt_softplus}
    if not has_gradient(state, x, dt, A, B, C, D, z, dt_bias):
        y: Tensor = ssd_step(x, dt, A, B, C, state, D, z=z, state_indices=state_batch_indices, **options)
        return y
    slots = None if state_batch_indices is None else state_batch_indices.long()
    before = (state if slots is None else state[slots]).to(exact, copy=True)
    gate = None if z is None else z[:, None]
    y, after = ssd(
        x[:, None],
        dt[:, None],
        A,
        B[:, None],
        C[:, None],
        D,
        z=gate,
        initial_state=before,
        return_state=True,
        **options,
    )
    write_states(state, slots, after)
    return y[:, 0]


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: Activation | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """A Mamba-2 layer after its input projection: convolution, scan, gated norm and projection.

    With W the width of the convolution, G groups, H heads and C = H P + 2 G K:

    Args:
        zxbcdt: [B, N, 2 M + H P + C + H], the gate, x, B, C and dt, after 2 M channels of a gated
            MLP; M is usually 0.
        conv1d_weight: [C, W].
        conv1d_bias: [C] or None.
        dt_bias: [H].
        A: [H], <= 0.
        D: [H] or [H, P].
        chunk_size: ignored.
        initial_states: [B, H, P, K], of the first sequence of each row. None: zeros.
        seq_idx: [B, N] integers: the sequence of each token, where rows are packed.
        dt_limit: the limits of the step size.
        return_final_states: whether to return the state after each row.
        activation: of the convolution.
        rmsnorm_weight: [H P], the weight of a norm per group. None: the gate alone.
        rmsnorm_eps: epsilon of the norm.
        outproj_weight: [out, M + H P]. None: no projection.
        outproj_bias: [out] or None.
        headdim: P. It may be None if D is [H, P].
        ngroups: G.
        norm_before_gate: whether the norm precedes the gate.
        state_dtype: ignored.

    Returns:
        y [B, N, out] or [B, N, M + H P]; (y, final states [B, H, P, K]) with return_final_states.

    Raises:
        ValueError: a width does not fit, or as in `leetcore.torch.ssd` and `causal_conv1d`.
        TypeError, NotImplementedError: as in `leetcore.torch.ssd`.
    """
    heads, P = D.shape[0], headdim if D.ndim == 1 else D.shape[1]
    if P is None:
        raise ValueError("headdim: expected the size of a head, as D has one value per head, got None")
    if outproj_weight is None and outproj_bias is not None:
        raise ValueError("outproj_bias: expected None without outproj_weight, got a tensor")
    width, channels = heads * P, conv1d_weight.shape[0]
    mlp = (zxbcdt.shape[-1] - width - channels - heads) // 2
    if mlp < 0 or zxbcdt.shape[-1] != 2 * mlp + width + channels + heads or (channels - width) % (2 * ngroups):
        raise ValueError(
            f"zxbcdt: expected {width} + {channels} + {heads} channels, or an even number more, with "
            f"{width} + 2 ngroups d_state in the convolution, got {zxbcdt.shape[-1]}"
        )
    up, z, xBC, dt = zxbcdt.split([2 * mlp, width, channels, heads], dim=-1)
    xBC = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    x, B, C = xBC.transpose(1, 2).split([width, *[(channels - width) // 2] * 2], dim=-1)
    y, states = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, P)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D,
        z.unflatten(-1, (heads, P)) if rmsnorm_weight is None else None,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, width // ngroups, norm_before_gate)
    if mlp:
        gate, value = up.chunk(2, dim=-1)
        y = torch.cat([F.silu(gate) * value, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, states) if return_final_states else y


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMS norm of groups of channels with a gate silu(z), computed in float32 at least.

    Args:
        x: [.., C].
        weight: [C].
        bias: [C] or None.
        z: [.., C], the gate. None: no gate.
        eps: epsilon of the norm.
        group_size: number of channels that are normed together. None: all C.
        norm_before_gate: whether the result is norm(x) silu(z), and not norm(x silu(z)).

    Returns:
        [.., C] of x's dtype.
    """
    return gated_rms_norm(x, weight, bias, z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate)


def _per_head(name: str, x: Tensor, expanded: int) -> Tensor:
    """One value per head of a tensor whose last dimensions are expanded from it."""
    sizes = zip(x.shape[-expanded:], x.stride()[-expanded:], strict=True)
    if x.ndim < expanded + 1 or any(size != 1 and stride != 0 for size, stride in sizes):
        raise ValueError(
            f"{name}: expected one value per head, expanded with stride 0, as in Mamba-2, got shape {list(x.shape)} "
            f"with strides {list(x.stride())}; values per channel are of Mamba-1, which leetcore does not compute"
        )
    for _ in range(expanded):
        x = x[..., 0]
    return x
