"""Training in plain torch: the chunkwise products of torch_chunk.py, differentiated by autograd, all out of place.

It computes the gradients of q, k and v, and of log_decay where tokens have their own; weights of a constant decay are
made once, outside the timing. A candidate is a chunk length, heads at a time, and the scan over chunk states as a loop
or one small matrix product. States are float32 in the loop, and what a product reads is in the dtype of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from harness import Factory, TrainingProblem, training_step
from torch import Tensor

from rivals.torch_chunk import CHUNKS, MAX_MATMUL_SCAN, Tables

NAME = "torch autograd"
KEEP = 2


@dataclass
class Weights:
    """Factors of n chunks of C tokens, [heads, n or 1, ...]: mask [C, C], query and key [C, 1], total [1, 1] of a whole
    chunk; scan [heads, n, n], from updates to the states before each chunk."""

    mask: Tensor
    query: Tensor
    key: Tensor
    total: Tensor
    scan: Tensor


def constant(p: TrainingProblem, chunk: int) -> Weights:
    count = p.shape.N // chunk
    t = Tables(p.gamma.repeat(p.shape.B), chunk, count if count <= MAX_MATMUL_SCAN else 0, p.dtype)
    return Weights(t.mask, t.query, t.key, t.total[:, None].expand(-1, count, -1, -1), t.scan)


def gated(log_decay: Tensor, chunk: int, dtype: torch.dtype) -> Weights:
    """Of log_decay [B, H, N], differentiable."""
    sums = log_decay.flatten(0, 1).unflatten(1, (-1, chunk)).cumsum(2)[..., None]  # [heads, n, C, 1]
    end = sums[:, :, -1:]
    scan = torch.nn.functional.pad(between(end[:, :, 0].cumsum(1))[:, :-1], (0, 0, 1, 0))
    mask, query, key = between(sums), sums.exp(), (end - sums).exp()
    return Weights(mask.to(dtype), query.to(dtype), key.to(dtype), end.exp(), scan.to(dtype))


def between(sums: Tensor) -> Tensor:
    """exp(sums[i] - sums[j]) of [..., n, 1] for j <= i, else 0."""
    difference = sums - sums.mT
    above = torch.ones_like(difference, dtype=torch.bool).triu(1)
    return difference.masked_fill(above, float("-inf")).exp()


class Training:
    """Forward and backward pass of one configuration; N is a multiple of `chunk`."""

    def __init__(self, p: TrainingProblem, chunk: int, heads: int, scan: str) -> None:
        self.p, self.chunk, self.heads, self.scan = p, chunk, heads, scan
        self.leaves = p.leaves()
        self.weights = None if "log_decay" in self.leaves else constant(p, chunk)

    def __call__(self) -> dict[str, Tensor]:
        return training_step(self.forward, self.leaves, self.p.d_o)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
        weights = self.weights if log_decay is None else gated(log_decay, self.chunk, q.dtype)
        assert weights
        Q, K, V = (x.flatten(0, 1).unflatten(1, (-1, self.chunk)) for x in (q, k, v))
        groups = [slice(h, h + self.heads) for h in range(0, len(Q), self.heads)]
        parts = [self.group(Q[rows], K[rows], V[rows], rows, weights) for rows in groups]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).view_as(v)

    def group(self, Q: Tensor, K: Tensor, V: Tensor, rows: slice, w: Weights) -> Tensor:
        update = torch.matmul((K * w.key[rows]).mT, V)
        if self.scan == "matmul":
            before = torch.bmm(w.scan[rows], update.flatten(2)).view_as(update)
        else:
            total = w.total[rows]
            states = [torch.zeros_like(update[:, 0], dtype=torch.float32)]
            for c in range(update.shape[1] - 1):
                states.append(torch.addcmul(update[:, c].float(), total[:, c], states[-1]))
            before = torch.stack(states, dim=1).to(V.dtype)
        return torch.matmul(torch.matmul(Q, K.mT) * w.mask[rows], V) + torch.matmul(Q * w.query[rows], before)


def training(p: TrainingProblem, quick: bool = False) -> dict[str, Factory]:
    s = p.shape
    few = () if p.device == "cuda" else (1, min(4, s.B * s.H))  # a GPU wants all heads at once
    candidates: dict[str, Factory] = {}
    for chunk, heads, scan in product((64, 128) if quick else CHUNKS, sorted({*few, s.B * s.H}), ("loop", "matmul")):
        if s.N % chunk == 0 and (scan == "loop" or s.N // chunk <= MAX_MATMUL_SCAN):
            name = f"C={chunk} heads={heads} scan={scan}"
            candidates[name] = partial(Training, p, chunk, heads, scan)
    return candidates
