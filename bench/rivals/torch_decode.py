"""One decode step in plain torch, float32 state in place: mul_, addition of an outer product,
matrix-vector product.

The variants are eager code, over all states or a sequence at a time (so that the three passes over
a state find it in cache), and torch.compile.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from leetcore.bench.session import Factory
from leetcore.bench.timing import Call
from torch import Tensor

MAX_COMPILE_S = 10.0


def eager(p: Any, outer: str, sequences: int) -> Call:
    s = p.shape
    heads = sequences * s.H
    gamma = p.decays().exp().float()[:, None, None]
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


def compiled(p: Any) -> Call:
    """torch.compile of the plain expression; raises TimeoutError if compiling takes over
    MAX_COMPILE_S."""
    gamma, state = p.log_decay.exp()[:, None, None], p.initial_state.clone()

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


def decode(p: Any, quick: bool = False) -> dict[str, Factory]:
    candidates: dict[str, Factory] = {}
    for outer in ("baddbmm", "addcmul"):
        for sequences in sorted({1, p.shape.B}):
            name = f"mul_+{outer}_+bmm" + ("" if sequences == p.shape.B else ", a sequence at a time")
            candidates[name] = partial(eager, p, outer, sequences)
    candidates["torch.compile"] = partial(compiled, p)
    return candidates
