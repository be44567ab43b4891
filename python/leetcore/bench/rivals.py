"""Baselines in plain torch, as fast as they can be written: the only rivals that need nothing but
torch.

A rival is a function of a `Problem` that returns factories by label, none where it cannot serve. A
factory prepares tables and buffers outside the timing and returns the call that is timed. The call
returns o, freshly allocated, in the dtype of v. 16-bit inputs are converted to float32 and back.

Chunkwise (arXiv:2405.21060, 2401.04658), with P the state before a chunk of C tokens:

    o = (Q K^T * mask) V + (Q * query) P        P' = total P + (K * key)^T V

Every product is one bmm over (heads x chunks). The scan over the states of chunks is one addcmul
per chunk, or one small matrix product. Table entries below TINY are 0, as they would make
denormals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import TORCH
from .problems import Shape

Factories = dict[str, Callable[[], Callable[[], Tensor]]]

CHUNKS = (32, 64, 128, 256)
MOST_SCAN = 128  # chunks of a scan by a matrix product, whose work grows with their square
MOST_MASK_BYTES = 4 << 30  # of the quadratic form
TINY = 1e-30


class Problem:
    """Inputs of a forward call: q, k [B, H, N, K], v [B, H, N, V]; log_decay [H] or [B, H, N];
    scale."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float = 1.0) -> None:
        B, H, N, K = q.shape
        self.shape = Shape(B, H, N, K, v.shape[3])
        self.q, self.k, self.v, self.log_decay, self.scale = q, k, v, log_decay, scale
        self.dtype, self.device = v.dtype, v.device.type

    @classmethod
    def of(cls, given: dict[str, Any]) -> Problem:
        """The problem with the arguments that `Case.arguments` returns."""
        q, k, v = (TORCH.from_numpy(given[name]) for name in "qkv")
        g = given["log_decay"]
        g = np.asarray(0.0 if g is None else g, np.float64)
        g = g if g.ndim == 3 else np.broadcast_to(g, (q.shape[1],)).copy()
        return cls(q, k, v, torch.from_numpy(g), given["scale"])

    @property
    def per_token(self) -> bool:
        return self.log_decay.ndim == 3

    def decays(self) -> Tensor:
        """Float64 logarithms, finite so that they have differences: [B H], or [B H, N] with one
        decay per token."""
        g = self.log_decay.double().clamp(min=-1e4)
        return g.flatten(0, 1) if self.per_token else g.repeat(self.shape.B)


@dataclass
class Weights:
    """Factors of n chunks of C tokens, [heads, n or 1, ...]; n is 1 where all chunks share them.

    mask [C, C], query and key [C, 1], total [1, 1]; scan [heads, n, n]: from updates to the states
    before chunks.
    """

    mask: Tensor
    query: Tensor
    key: Tensor
    total: Tensor
    scan: Tensor


def lags(sums: Tensor) -> Tensor:
    """exp(sums[i] - sums[j]) of [..., n, 1] for j <= i, else 0."""
    difference = sums - sums.mT
    later = torch.ones_like(difference, dtype=torch.bool).triu(1)
    return difference.masked_fill(later, float("-inf")).exp()


def weights(g: Tensor, chunk: int, count: int, dtype: torch.dtype, scale: float = 1.0, flush: bool = True) -> Weights:
    """Weights of log-decays [heads], or [heads, n * chunk] with one per token; differentiable
    without `flush`.

    count: chunks of the scan's matrix; 0 where it is not used.
    """
    g = g[:, None].expand(-1, chunk) if g.ndim == 1 else g
    sums = g.unflatten(1, (-1, chunk)).cumsum(2)[..., None]  # [heads, n or 1, C, 1]
    end = sums[:, :, -1:]
    ends = (end[:, :, 0] if count else end[:, :0, 0]).expand(-1, count, 1).cumsum(1)
    scan = torch.nn.functional.pad(lags(ends)[:, :-1], (0, 0, 1, 0))
    tables = [scale * lags(sums), scale * sums.exp(), (end - sums).exp(), end.exp(), scan]
    if flush:
        tables = [torch.where(x < TINY, 0.0, x) for x in tables]
    mask, query, key, total, scan = tables
    return Weights(mask.to(dtype), query.to(dtype), key.to(dtype), total.to(wide(dtype)), scan.to(dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, and of products where 16-bit inputs are converted."""
    return dtype if dtype == torch.float64 else torch.float32


class Chunkwise:
    """One configuration: chunk length, heads at a time, kind of scan (loop or matmul), dtype of the
    big products."""

    def __init__(self, p: Problem, chunk: int, heads: int, scan: str, dtype: torch.dtype) -> None:
        s = p.shape
        self.p, self.chunk, self.heads, self.scan, self.dtype = p, chunk, heads, scan, dtype
        self.count, self.tail = divmod(s.N, chunk)
        self.cast = p.dtype != dtype
        g, n, empty = min(heads, s.B * s.H), self.count, partial(torch.empty, dtype=dtype, device=p.device)
        self.ready = None if p.per_token else self.tables()  # decays per token are inputs: their tables are timed
        self.inputs = [empty(g, s.N, d) for d in (s.K, s.K, s.V)] if self.cast else []
        self.scores = empty(g * n, chunk, chunk)
        self.weighted = empty(g * n, chunk, s.K)
        self.update = empty(g * n, s.K, s.V)
        self.before = empty(g * n, s.K, s.V).zero_()  # states before each chunk
        self.result = empty(g * n, chunk, s.V)

    def tables(self) -> tuple[Weights, Weights]:
        """Weights of whole chunks, and of the tail of fewer tokens."""
        g, body = self.p.decays(), self.count * self.chunk
        whole, rest = (g[:, :body], g[:, body:]) if self.p.per_token else (g, g)
        count = self.count if self.scan == "matmul" else 0
        made = partial(weights, dtype=self.dtype, scale=self.p.scale)
        return made(whole, self.chunk, count), made(rest, max(self.tail, 1), 0) if self.tail else made(g[:0], 1, 0)

    def __call__(self) -> Tensor:
        cuda = torch.backends.cuda.matmul
        cuda.allow_tf32 = self.cast
        try:
            return self.run()
        finally:
            cuda.allow_tf32 = False

    @torch.inference_mode()
    def run(self) -> Tensor:
        s = self.p.shape
        body, tail = self.ready or self.tables()
        q, k, v = (x.reshape(s.B * s.H, s.N, -1) for x in (self.p.q, self.p.k, self.p.v))
        o = torch.empty(s.B * s.H, s.N, s.V, dtype=self.p.dtype, device=self.p.device)
        for start in range(0, s.B * s.H, self.heads):
            self.group(slice(start, min(start + self.heads, s.B * s.H)), q, k, v, o, body, tail)
        return o.view(s.B, s.H, s.N, s.V)

    def group(self, rows: slice, q: Tensor, k: Tensor, v: Tensor, o: Tensor, w: Weights, end: Weights) -> None:
        """Heads `rows` of q, k, v [B H, N, K|V] into o."""
        n, C = self.count, self.chunk
        g, body = rows.stop - rows.start, n * C
        q, k, v, o = q[rows], k[rows], v[rows], o[rows]
        if self.cast:
            q, k, v = (buffer[:g].copy_(x) for buffer, x in zip(self.inputs, (q, k, v), strict=True))
        last = None
        if n:
            Q, K, V = (x[:, :body].reshape(g * n, C, -1) for x in (q, k, v))
            buffers = (self.scores, self.weighted, self.update, self.before)
            scores, weighted, update, before = (x[: g * n] for x in buffers)
            direct = not self.cast and (g == 1 or not self.tail)  # o's chunks can be written in place
            result = o[:, :body].view(g * n, C, -1) if direct else self.result[: g * n]
            torch.bmm(Q, K.transpose(1, 2), out=scores)
            scores.view(g, n, C, C).mul_(w.mask[rows])
            torch.mul(K.view(g, n, C, -1), w.key[rows], out=weighted.view(g, n, C, -1))
            torch.bmm(weighted.transpose(1, 2), V, out=update)
            states = update.view(g, n, *update.shape[1:]), before.view(g, n, *before.shape[1:])
            last = self.scan_states(w.scan[rows], w.total[rows], *states)
            torch.mul(Q.view(g, n, C, -1), w.query[rows], out=weighted.view(g, n, C, -1))
            torch.bmm(weighted, before, out=result)
            result.baddbmm_(scores, V)
            if not direct:
                o[:, :body].copy_(result.view(g, body, -1))
        if self.tail:
            Q, K, V = (x[:, body:] for x in (q, k, v))
            rest = torch.bmm(torch.bmm(Q, K.transpose(1, 2)).mul_(end.mask[rows, 0]), V)
            if last is not None:
                rest.baddbmm_(Q * end.query[rows, 0], last.to(Q.dtype))
            o[:, body:].copy_(rest)

    def scan_states(self, scan: Tensor, total: Tensor, update: Tensor, before: Tensor) -> Tensor | None:
        """Fills `before` with the states before chunks; returns the state after the last chunk if a
        tail needs it."""
        g, n = update.shape[:2]
        total = total.expand(-1, n, -1, -1)
        if self.scan == "matmul":
            torch.bmm(scan, update.view(g, n, -1), out=before.view(g, n, -1))
        elif update.dtype == total.dtype:
            for c in range(1, n):
                torch.addcmul(update[:, c - 1], total[:, c - 1], before[:, c - 1], out=before[:, c])
        else:  # the carried state stays float32: only what a product reads is rounded
            state = torch.zeros_like(update[:, 0], dtype=total.dtype)
            for c in range(1, n):
                state.mul_(total[:, c - 1]).add_(update[:, c - 1])
                before[:, c].copy_(state)
        if not self.tail:
            return None
        return torch.addcmul(update[:, -1].to(total.dtype), total[:, -1], before[:, -1].to(total.dtype))


def configurations(p: Problem, dtype: torch.dtype, quick: bool) -> Factories:
    """Every configuration worth trying, with the big products in `dtype`."""
    s = p.shape
    few = () if p.device == "cuda" else (4,) if quick else (1, 2, 4, 8)  # a GPU wants all heads at once
    groups = sorted({min(g, s.B * s.H) for g in (*few, s.B * s.H)})
    candidates: Factories = {}
    for chunk, heads, scan in product((64, 128) if quick else CHUNKS, groups, ("loop", "matmul")):
        if scan == "loop" or s.N // chunk <= MOST_SCAN:
            candidates[f"C={chunk} heads={heads} scan={scan}"] = partial(Chunkwise, p, chunk, heads, scan, dtype)
    return candidates


def chunk(p: Problem, quick: bool = False) -> Factories:
    return configurations(p, wide(p.dtype), quick)


def quadratic(p: Problem, quick: bool = False) -> Factories:
    """o = (Q K^T * mask) V with the whole mask.

    It is prepared outside the timing where all tokens share a decay.
    """
    s = p.shape
    mask_bytes = wide(p.dtype).itemsize * s.N * s.N * s.H * (s.B if p.per_token else 1)
    if mask_bytes > (MOST_MASK_BYTES // 8 if quick else MOST_MASK_BYTES):
        return {}

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        def masks() -> Tensor:
            g = p.decays() if p.per_token else p.decays()[: s.H]
            return weights(g, s.N, 0, dtype, p.scale).mask.view(-1, s.H, s.N, s.N)

        ready = None if p.per_token else masks()

        @torch.inference_mode()
        def call() -> Tensor:
            mask = masks() if ready is None else ready
            q, k, v = (x.to(dtype) for x in (p.q, p.k, p.v))
            return torch.matmul(torch.matmul(q, k.mT).mul_(mask), v).to(p.dtype)

        return call

    if p.dtype == wide(p.dtype):
        return {"": partial(make, p.dtype)}
    return {"": partial(make, p.dtype), "float32 inside": partial(make, torch.float32)}


ALL: dict[str, Callable[[Problem, bool], Factories]] = {"torch chunk": chunk, "torch quadratic": quadratic}
