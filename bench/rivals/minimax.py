"""The core of MiniMaxLightningAttention as in transformers 5.23
(models/minimax/modeling_minimax.py), restated.

Per block of 256 tokens: (q * query_decay) @ state + (q k^T * diagonal_decay) @ v, then the state
takes the block in. Everything is in the dtype of the inputs, as in the module. Its tables are
buffers, so they are made outside the timing. test_bench.py compares this code with the real module.
"""

from __future__ import annotations

from typing import Any

import torch
from leetcore.bench.session import Factory
from leetcore.bench.timing import Call
from torch import Tensor

BLOCK = 256


class Core:
    """`slope` [H] is -log_decay; tables are computed, and kept, in `dtype`."""

    def __init__(self, slope: Tensor, dtype: torch.dtype) -> None:
        self.slope = slope.to(dtype)[:, None, None]
        i = torch.arange(1, BLOCK + 1, device=slope.device)
        age = self.slope * (i[:, None] - i)
        self.query_decay = torch.exp(-self.slope * i[:, None])
        self.key_decay = torch.exp(-self.slope * (BLOCK - i[:, None]))
        self.diagonal_decay = torch.exp(torch.where(age >= 0, -age, float("-inf")))
        self.ratio = torch.exp(-self.slope)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        blocks = []
        for start in range(0, q.shape[2], BLOCK):
            Q, K, V = (x[:, :, start : start + BLOCK] for x in (q, k, v))
            n = Q.shape[2]
            within = torch.matmul(torch.matmul(Q, K.transpose(2, 3)) * self.diagonal_decay[:, :n, :n], V)
            across = torch.matmul(Q * self.query_decay[:, :n], state)
            blocks.append(across + within)
            state = state * torch.exp(-self.slope * n) + torch.matmul((K * self.key_decay[:, -n:]).transpose(2, 3), V)
        return torch.cat(blocks, dim=2), state

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.ratio * state + torch.matmul(k.transpose(2, 3), v)
        return torch.matmul(q, state), state


def forward(p: Any, quick: bool = False) -> dict[str, Factory]:
    if p.per_token or bool(((p.log_decay == 0) | p.log_decay.isinf()).any()):
        return {}  # outside its domain: slope 0 lets the future through its mask, an infinite slope gives inf * 0

    def make(dtype: torch.dtype) -> Call:
        core = Core(-p.log_decay, dtype)

        @torch.inference_mode()
        def call() -> Tensor:
            return core.prefill(p.q.to(dtype), p.k.to(dtype), p.v.to(dtype))[0].to(p.dtype)

        return call

    if p.dtype == torch.float32:
        return {"": lambda: make(p.dtype)}
    return {"": lambda: make(p.dtype), "float32 inside": lambda: make(torch.float32)}


def decode(p: Any, quick: bool = False) -> dict[str, Factory]:
    def make() -> Call:
        core, state = Core(-p.log_decay, torch.float32), p.initial_state.clone()

        @torch.inference_mode()
        def call() -> Tensor:
            nonlocal state
            q, k, v = (x.float().unsqueeze(2) for x in (p.q, p.k, p.v))
            o, state = core.step(q, k, v, state)
            return o.squeeze(2).to(p.dtype)

        return call

    return {"": make}
