"""Training in plain torch: the chunkwise products of `leetcore.bench.rivals` out of place,
differentiated by autograd.

It computes the gradients of q, k and v, and of log_decay where tokens have their own. Weights of a
constant decay are made once, outside the timing. A variant is a chunk length, heads at a time, and
the scan over chunk states as a loop or as one small matrix product. States are float32 in the loop;
what a product reads is in the dtype of the inputs.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from leetcore.bench.rivals import CHUNKS, MOST_SCAN, Weights, weights
from leetcore.bench.session import Factory
from torch import Tensor

from rivals import training_step


class Training:
    """Forward and backward pass of one configuration; N is a multiple of `chunk`."""

    def __init__(self, p: Any, chunk: int, heads: int, scan: str) -> None:
        self.p, self.chunk, self.heads, self.scan = p, chunk, heads, scan
        self.leaves = p.leaves()
        self.count = p.shape.N // chunk if scan == "matmul" else 0
        self.ready = None if p.per_token else weights(p.decays(), chunk, self.count, p.dtype)

    def __call__(self) -> dict[str, Tensor]:
        return training_step(self.forward, self.leaves, self.p.d_o)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
        w = self.ready
        if log_decay is not None:
            w = weights(log_decay.flatten(0, 1), self.chunk, self.count, q.dtype, flush=False)
        assert w
        Q, K, V = (x.flatten(0, 1).unflatten(1, (-1, self.chunk)) for x in (q, k, v))
        groups = [slice(h, h + self.heads) for h in range(0, len(Q), self.heads)]
        parts = [self.group(Q[rows], K[rows], V[rows], rows, w) for rows in groups]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).view_as(v)

    def group(self, Q: Tensor, K: Tensor, V: Tensor, rows: slice, w: Weights) -> Tensor:
        update = torch.matmul((K * w.key[rows]).mT, V)
        if self.scan == "matmul":
            before = torch.bmm(w.scan[rows], update.flatten(2)).view_as(update)
        else:
            total = w.total[rows].expand(-1, update.shape[1], -1, -1)
            states = [torch.zeros_like(update[:, 0], dtype=torch.float32)]
            for c in range(update.shape[1] - 1):
                states.append(torch.addcmul(update[:, c].float(), total[:, c], states[-1]))
            before = torch.stack(states, dim=1).to(V.dtype)
        return torch.matmul(torch.matmul(Q, K.mT) * w.mask[rows], V) + torch.matmul(Q * w.query[rows], before)


def training(p: Any, quick: bool = False) -> dict[str, Factory]:
    s = p.shape
    few = () if p.device == "cuda" else (1, min(4, s.B * s.H))  # a GPU wants all heads at once
    candidates: dict[str, Factory] = {}
    for chunk, heads, scan in product((64, 128) if quick else CHUNKS, sorted({*few, s.B * s.H}), ("loop", "matmul")):
        if s.N % chunk == 0 and (scan == "loop" or s.N // chunk <= MOST_SCAN):
            name = f"C={chunk} heads={heads} scan={scan}"
            candidates[name] = partial(Training, p, chunk, heads, scan)
    return candidates
