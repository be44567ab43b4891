"""Chunkwise linear attention in plain torch, as well as it can be written: the rival to beat.

Per chunk of C tokens, with P the state before the chunk:   o = (Q K^T * mask) V + (Q * gamma^(i+1)) P
and over the chunks:                                        P' = gamma^C P + (K * gamma^(C-1-j))^T V
Every product is one bmm over (heads x chunks); `heads` heads go through at a time (all of them, or few enough that the
intermediates stay in cache). Tables and buffers are made once, outside the timing; table entries under 1e-30 are 0, as
they would make denormals. The scan over chunk states is one addcmul a chunk, or one small matrix product. 16-bit inputs
are converted to fp32 and back (in torch_chunk_half.py they are not); on a GPU their fp32 products may be TF32.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from harness import DecodeProblem, Factory, Problem
from torch import Tensor

NAME = "torch chunk"
KEEP = 2
CHUNKS = (32, 64, 128, 256)
MAX_MATMUL_SCAN = 128  # chunks; its work grows with their square


def flush(table: Tensor) -> Tensor:
    return torch.where(table < 1e-30, 0.0, table).float()


class Tables:
    """Powers of gamma [heads] for `count` chunks of `chunk` tokens; what meets a big product is in `dtype`."""

    def __init__(self, gamma: Tensor, chunk: int, count: int, dtype: torch.dtype) -> None:
        i = torch.arange(chunk, device=gamma.device)
        power = gamma[:, None] ** torch.arange(chunk + 1, device=gamma.device).double()  # [heads, chunk + 1]
        age = i[:, None] - i
        self.mask = flush(torch.where(age >= 0, power[:, age.clamp(min=0)], 0.0))[:, None].to(dtype)  # [heads, 1, C, C]
        self.query = flush(power[:, 1:])[:, None, :, None].to(dtype)  # [heads, 1, C, 1]
        self.key = flush(power[:, :-1].flip(1))[:, None, :, None].to(dtype)  # [heads, 1, C, 1]
        self.total = flush(power[:, -1])[:, None, None]  # [heads, 1, 1], fp32
        c = torch.arange(count, device=gamma.device)
        lag = c[:, None] - c - 1
        scan = torch.where(lag >= 0, power[:, -1, None, None] ** lag.clamp(min=0), 0.0)
        self.scan = flush(scan).to(dtype)  # [heads, n, n]


class ChunkForward:
    """One configuration: chunk length, heads at a time, kind of scan, dtype of the big products."""

    def __init__(self, p: Problem, chunk: int, heads: int, scan: str, matmul_dtype: torch.dtype) -> None:
        s = p.shape
        self.p, self.chunk, self.heads, self.scan = p, chunk, heads, scan
        self.count, self.tail = divmod(s.N, chunk)
        g, n, dtype = min(heads, s.B * s.H), self.count, matmul_dtype
        self.tables = Tables(p.gamma.repeat(s.B), chunk, n if scan == "matmul" else 0, dtype)  # of B * H heads
        self.cast = p.dtype != matmul_dtype
        empty = partial(torch.empty, dtype=dtype, device=p.device)
        self.inputs = [empty(g, s.N, d) for d in (s.K, s.K, s.V)] if self.cast else []
        self.scores = empty(g * n, chunk, chunk)
        self.weighted = empty(g * n, chunk, s.K)
        self.update = empty(g * n, s.K, s.V)
        self.before = empty(g * n, s.K, s.V).zero_()  # states before each chunk
        self.result = empty(g * n, chunk, s.V)

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
        q, k, v = (x.view(s.B * s.H, s.N, -1) for x in (self.p.q, self.p.k, self.p.v))
        o = torch.empty(s.B * s.H, s.N, s.V, dtype=self.p.dtype, device=self.p.device)
        for start in range(0, s.B * s.H, self.heads):
            self.group(slice(start, min(start + self.heads, s.B * s.H)), q, k, v, o)
        return o.view(s.B, s.H, s.N, s.V)

    def group(self, rows: slice, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
        """Heads `rows` of q, k, v [B H, N, K|V] into o."""
        n, C, t = self.count, self.chunk, self.tables
        g, body = rows.stop - rows.start, n * C
        q, k, v, o = q[rows], k[rows], v[rows], o[rows]
        if self.cast:
            q, k, v = (buffer[:g].copy_(x) for buffer, x in zip(self.inputs, (q, k, v), strict=True))
        last = None
        if n:
            Q, K, V = (x[:, :body].reshape(g * n, C, -1) for x in (q, k, v))
            scores, weighted, update, before = (
                x[: g * n] for x in (self.scores, self.weighted, self.update, self.before)
            )
            direct = not self.cast and (g == 1 or not self.tail)  # o's chunks can be written in place
            result = o[:, :body].view(g * n, C, -1) if direct else self.result[: g * n]
            torch.bmm(Q, K.transpose(1, 2), out=scores)
            scores.view(g, n, C, C).mul_(t.mask[rows])
            torch.mul(K.view(g, n, C, -1), t.key[rows], out=weighted.view(g, n, C, -1))
            torch.bmm(weighted.transpose(1, 2), V, out=update)
            last = self.scan_states(rows, update.view(g, n, *update.shape[1:]), before.view(g, n, *before.shape[1:]))
            torch.mul(Q.view(g, n, C, -1), t.query[rows], out=weighted.view(g, n, C, -1))
            torch.bmm(weighted, before, out=result)
            result.baddbmm_(scores, V)
            if not direct:
                o[:, :body].copy_(result.view(g, body, -1))
        if self.tail:
            m = self.tail
            Q, K, V = (x[:, body:] for x in (q, k, v))
            end = torch.bmm(torch.bmm(Q, K.transpose(1, 2)).mul_(t.mask[rows, 0, :m, :m]), V)
            if last is not None:
                end.baddbmm_(Q * t.query[rows, 0, :m], last.to(Q.dtype))
            o[:, body:].copy_(end)

    def scan_states(self, rows: slice, update: Tensor, before: Tensor) -> Tensor | None:
        """before[c] = sum_{d<c} total^(c-1-d) update[d]; returns the state after the last chunk if a tail needs it."""
        g, n = update.shape[:2]
        total = self.tables.total[rows]
        if self.scan == "matmul":
            torch.bmm(self.tables.scan[rows], update.view(g, n, -1), out=before.view(g, n, -1))
        elif update.dtype == torch.float32:
            for c in range(1, n):
                torch.addcmul(update[:, c - 1], total, before[:, c - 1], out=before[:, c])
        else:  # the carried state stays fp32: only what a product reads is rounded
            state = torch.zeros_like(update[:, 0], dtype=torch.float32)
            for c in range(1, n):
                state.mul_(total).add_(update[:, c - 1])
                before[:, c].copy_(state)
        return torch.addcmul(update[:, -1].float(), total, before[:, -1].float()) if self.tail else None


def configurations(p: Problem, dtype: torch.dtype, quick: bool) -> dict[str, Factory]:
    """Every configuration worth trying, with the big products in `dtype`."""
    s = p.shape
    few = () if p.device == "cuda" else (4,) if quick else (1, 2, 4, 8)  # a GPU wants all heads at once
    groups = sorted({min(g, s.B * s.H) for g in (*few, s.B * s.H)})
    candidates: dict[str, Factory] = {}
    for chunk, heads, scan in product((64, 128) if quick else CHUNKS, groups, ("loop", "matmul")):
        if scan == "loop" or s.N // chunk <= MAX_MATMUL_SCAN:
            name = f"C={chunk} heads={heads} scan={scan}"
            candidates[name] = partial(ChunkForward, p, chunk, heads, scan, dtype)
    return candidates


def forward(p: Problem, quick: bool = False) -> dict[str, Factory]:
    return configurations(p, torch.float32, quick)


def decode(p: DecodeProblem, quick: bool = False) -> dict[str, Factory]:
    return {}
