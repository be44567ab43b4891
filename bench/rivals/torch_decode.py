"""One decode step in plain torch, state fp32 and in place: mul_, an outer product added, a matrix-vector product.

Eagerly, over the whole pool or a few sequences at a time (so that three passes over a state meet in cache), and
compiled by torch.compile.
"""

from __future__ import annotations

import time
from functools import partial

import torch
from harness import Call, DecodeProblem, Factory, Problem
from torch import Tensor

NAME = "torch decode"
KEEP = 2
MAX_COMPILE_S = 10.0


def forward(p: Problem, quick: bool = False) -> dict[str, Factory]:
    return {}


def eager(p: DecodeProblem, outer: str, sequences: int) -> Call:
    s = p.shape
    heads = sequences * s.H
    gamma = p.gamma.float().repeat(s.B)[:, None, None]
    state = p.initial_state.clone().view(s.B * s.H, s.K, s.V)

    @torch.inference_mode()
    def call() -> Tensor:
        q = p.q.reshape(-1, 1, s.K).float()
        k = p.k.reshape(-1, s.K, 1).float()
        v = p.v.reshape(-1, 1, s.V).float()
        o = torch.empty(s.B * s.H, 1, s.V, device=p.device)
        for start in range(0, s.B * s.H, heads):
            part = slice(start, start + heads)
            pool = state[part].mul_(gamma[part])
            if outer == "baddbmm":
                pool.baddbmm_(k[part], v[part])
            else:
                pool.addcmul_(k[part], v[part])
            torch.bmm(q[part], pool, out=o[part])
        return o.view(s.B, s.H, s.V).to(p.dtype)

    return call


def compiled(p: DecodeProblem) -> Call:
    """torch.compile of the plain expression; raises TimeoutError when compiling took over MAX_COMPILE_S."""
    gamma, state = p.gamma.float()[:, None, None], p.initial_state.clone()

    def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, gamma: Tensor) -> Tensor:
        state.mul_(gamma).add_(k.float()[..., None] * v.float()[..., None, :])
        return (q.float()[..., None] * state).sum(2).to(q.dtype)

    fast = torch.compile(step, dynamic=False)
    start = time.perf_counter()
    with torch.inference_mode():
        fast(p.q, p.k, p.v, state.clone(), gamma)
    if time.perf_counter() - start > MAX_COMPILE_S:
        raise TimeoutError(f"torch.compile took over {MAX_COMPILE_S:.0f} s")

    @torch.inference_mode()
    def call() -> Tensor:
        return fast(p.q, p.k, p.v, state, gamma)

    return call


def decode(p: DecodeProblem, quick: bool = False) -> dict[str, Factory]:
    candidates: dict[str, Factory] = {}
    for outer in ("baddbmm", "addcmul"):
        for sequences in sorted({1, p.shape.B}):
            name = f"mul_+{outer}_+bmm" + ("" if sequences == p.shape.B else ", a sequence at a time")
            candidates[name] = partial(eager, p, outer, sequences)
    candidates["torch.compile"] = partial(compiled, p)
    return candidates
