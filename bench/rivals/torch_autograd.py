"""Training in plain torch: the chunkwise products of torch_chunk.py, differentiated by autograd, all out of place.

It computes the gradients of q, k and v; decays are constants here. Tables are made once, outside the timing. A
candidate is a chunk length, heads at a time, and the scan over chunk states as a loop or one small matrix product.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from harness import Factory, Problem
from torch import Tensor

from rivals.torch_chunk import CHUNKS, MAX_MATMUL_SCAN, Tables

NAME = "torch autograd"


class Training:
    """Forward and backward pass of one configuration; N is a multiple of `chunk`."""

    def __init__(self, p: Problem, d_o: Tensor, chunk: int, heads: int, scan: str) -> None:
        s = p.shape
        self.chunk, self.heads, self.scan, self.d_o = chunk, heads, scan, d_o
        self.tables = Tables(p.gamma.repeat(s.B), chunk, s.N // chunk, p.dtype)
        self.inputs = [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v)]

    def __call__(self) -> list[Tensor]:
        q, k, v = (x.flatten(0, 1).unflatten(1, (-1, self.chunk)) for x in self.inputs)
        parts = [self.group(slice(h, h + self.heads), q, k, v) for h in range(0, len(q), self.heads)]
        o = (torch.cat(parts) if len(parts) > 1 else parts[0]).view_as(self.d_o)
        return [o.detach(), *torch.autograd.grad(o, self.inputs, self.d_o)]

    def group(self, rows: slice, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = self.tables
        Q, K, V = q[rows], k[rows], v[rows]
        update = torch.matmul((K * t.key[rows]).mT, V)
        if self.scan == "matmul":
            before = torch.bmm(t.scan[rows], update.flatten(2)).view_as(update)
        else:
            states = [torch.zeros_like(update[:, 0])]
            for c in range(update.shape[1] - 1):
                states.append(torch.addcmul(update[:, c], t.total[rows], states[-1]))
            before = torch.stack(states, dim=1)
        return torch.matmul(torch.matmul(Q, K.mT) * t.mask[rows], V) + torch.matmul(Q * t.query[rows], before)


def training(p: Problem, d_o: Tensor) -> dict[str, Factory]:
    s = p.shape
    candidates: dict[str, Factory] = {}
    for chunk, heads, scan in product(CHUNKS, sorted({1, min(4, s.B * s.H), s.B * s.H}), ("loop", "matmul")):
        if s.N % chunk == 0 and (scan == "loop" or s.N // chunk <= MAX_MATMUL_SCAN):
            name = f"C={chunk} heads={heads} scan={scan}"
            candidates[name] = partial(Training, p, d_o, chunk, heads, scan)
    return candidates
