"""The quadratic form in plain torch, with the decay mask cached outside the timing: o = (Q K^T * mask) V."""

from __future__ import annotations

import torch
from harness import Call, DecodeProblem, Factory, Problem
from torch import Tensor

NAME = "torch quadratic"
KEEP = 1
MAX_BYTES = 4 << 30  # of the mask, N x N x H in fp32


def forward(p: Problem, quick: bool = False) -> dict[str, Factory]:
    s = p.shape
    mask_bytes = 4 * s.N * s.N * s.H
    if mask_bytes > (MAX_BYTES // 16 if quick else MAX_BYTES):
        return {}

    def make(dtype: torch.dtype) -> Call:
        i = torch.arange(s.N, device=p.device)
        age = (i[:, None] - i).float()
        mask = torch.empty(s.H, s.N, s.N, dtype=dtype, device=p.device)
        for h in range(s.H):  # exact at gamma = 0: 0^0 = 1
            power = (p.gamma[h] ** i.double()).float()
            power[power < 1e-30] = 0.0
            mask[h] = power[age.clamp(min=0).long()].mul_(age >= 0)

        @torch.inference_mode()
        def call() -> Tensor:
            q, k, v = (x.to(dtype) for x in (p.q, p.k, p.v))
            return torch.matmul(torch.matmul(q, k.transpose(2, 3)).mul_(mask), v).to(p.dtype)

        return call

    if p.dtype == torch.float32:
        return {"": lambda: make(p.dtype)}
    return {"": lambda: make(p.dtype), "fp32 inside": lambda: make(torch.float32)}


def decode(p: DecodeProblem, quick: bool = False) -> dict[str, Factory]:
    return {}
