"""Baselines in plain torch, as well as they can be written: the only rivals that need nothing but torch.

Each is a function of a problem's arguments that prepares tables outside the timing and yields calls to choose from;
a call returns o, freshly allocated, as a torch tensor of v's dtype. 16-bit inputs are converted to float32 and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import TORCH

CHUNKS = (32, 64, 128, 256)
MOST_MASK_BYTES = 2 << 30
TINY = 1e-30  # smaller table entries are 0: they would make denormals


def inputs(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """q, k, v [B, H, N, *] as torch tensors; log_decay [B or 1, H, N] in float64; whether it is one for each token."""
    q, k, v = (TORCH.from_numpy(given[name]) for name in "qkv")
    g = given["log_decay"]
    g = np.asarray(0.0 if g is None else g, np.float64)
    per_token = g.ndim == 3
    g = g if per_token else np.broadcast_to(g[..., None], (1, q.shape[1], q.shape[2]))
    return q, k, v, torch.from_numpy(np.maximum(g, -1e4)), per_token


def weights(cum: Tensor) -> Tensor:
    """exp(cum_i - cum_j) for j <= i, else 0: [..., n] to [..., n, n]."""
    w = torch.exp((cum[..., :, None] - cum[..., None, :]).clamp_(max=0)).tril_()
    return torch.where(w < TINY, 0.0, w)


def compute_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float64, torch.float32) else torch.float32


def chunk(given: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Products of matrices inside chunks and between them, all chunks and heads at once; one pass over the states.

    o = (Q K^T * mask) V + (Q * from_start) S,  S' = total S + (K * to_end)^T V: arXiv:2405.21060, 2401.04658.
    """
    for C in CHUNKS:
        if max(CHUNKS[0], 2 * given["q"].shape[2]) >= C:
            yield f"C={C}", _chunk(given, C)


def _chunk(given: dict[str, Any], C: int) -> Callable[[], Tensor]:
    q, k, v, g, per_token = inputs(given)
    (B, H, N, _), V, scale, dtype = q.shape, v.shape[3], given["scale"], compute_dtype(q)
    count = -(-N // C)
    pad = count * C - N

    def tables() -> tuple[Tensor, ...]:
        cum = torch.nn.functional.pad(g, (0, pad)).reshape(g.shape[0], H, count, C).cumsum(3)
        if not per_token:
            cum = cum[:, :, :1]
        mask = weights(cum).mul_(scale)
        from_start, to_end = torch.exp(cum).mul_(scale), torch.exp(cum[..., -1:] - cum)
        total = torch.exp(cum[..., -1]).expand(-1, -1, count)
        return tuple(x.to(dtype) for x in (mask, from_start[..., None], to_end[..., None], total[..., None, None]))

    ready = None if per_token else tables()  # a decay for each token is an input: its tables are part of the call

    def split(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, 0, 0, pad)) if pad else x
        return x.to(dtype).reshape(B, H, count, C, x.shape[3])

    @torch.inference_mode()
    def call() -> Tensor:
        mask, from_start, to_end, total = ready or tables()
        Q, K, X = split(q), split(k), split(v)
        o = torch.matmul((Q @ K.mT).mul_(mask), X)
        if count > 1:
            updates = (K * to_end).mT @ X  # [B, H, count, K, V]: of each chunk
            states = torch.empty_like(updates)  # before each chunk
            states[:, :, 0] = 0
            for c in range(1, count):
                torch.addcmul(updates[:, :, c - 1], total[:, :, c - 1], states[:, :, c - 1], out=states[:, :, c])
            o.view(-1, C, V).baddbmm_((Q * from_start).view(-1, C, Q.shape[4]), states.view(-1, *states.shape[3:]))
        return o.view(B, H, count * C, V)[:, :, :N].to(v.dtype)

    return call


def quadratic(given: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """o = (Q K^T * mask) V with the whole mask, prepared outside the timing where the decay is not an input."""
    q, k, v, g, per_token = inputs(given)
    B, H, N, _ = q.shape
    dtype = compute_dtype(q)
    if 8 * N * N * H * (B if per_token else 1) > MOST_MASK_BYTES:
        return

    def masks() -> Tensor:
        return weights(g.cumsum(2)).mul_(given["scale"]).to(dtype)

    ready = None if per_token else masks()

    @torch.inference_mode()
    def call() -> Tensor:
        mask = masks() if ready is None else ready
        Q, K, X = (x.to(dtype) for x in (q, k, v))
        return torch.matmul((Q @ K.mT).mul_(mask), X).to(v.dtype)

    yield "", call


ALL: dict[str, Callable[[dict[str, Any]], Iterator[tuple[str, Callable[[], Tensor]]]]] = {
    "torch chunk": chunk,
    "torch quadratic": quadratic,
}
