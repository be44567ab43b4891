"""Competitors of Mamba-2: the Triton kernels of the package mamba_ssm, where it is installed and
there is a GPU, and the bare operator, `leetcore.torch.linear_attention` at the same sizes.

The bare operator has a log-decay per token and no lengths, skip or softplus. Its ratio shows what
these cost.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from leetcore.bench.session import Factory
from leetcore.bench.timing import Call
from leetcore.torch import linear_attention
from torch import Tensor

from rivals import training_step


def bare(p: Any, quick: bool = False) -> dict[str, Factory]:
    def call() -> dict[str, Tensor]:
        return {"o": linear_attention(p.q, p.k, p.v, p.log_decay, layout="bnhd", return_state=True)[0]}

    return {"": lambda: call}


def chunks(p: Any, quick: bool) -> tuple[int, ...]:
    """Chunk lengths to try; models use 256 tokens."""
    if p.device != "cuda" or find_spec("mamba_ssm") is None:
        return ()
    return (256,) if quick else (64, 128, 256)


def scan(chunk: int) -> Callable[..., Any]:
    """A function of x, dt, A, B, C, D and dt_bias."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return partial(mamba_chunk_scan_combined, chunk_size=chunk, dt_softplus=True)


def forward(p: Any, quick: bool = False) -> dict[str, Factory]:
    def make(chunk: int) -> Call:
        fn = scan(chunk)

        @torch.inference_mode()
        def call() -> dict[str, Tensor]:
            y, state = fn(**p.given, return_final_states=True)
            return {"y": y, "state": state}

        return call

    return {f"chunk_size={chunk}": partial(make, chunk) for chunk in chunks(p, quick)}


def training(p: Any, quick: bool = False) -> dict[str, Factory]:
    def make(chunk: int) -> Call:
        fn, leaves = scan(chunk), p.leaves()
        return lambda: training_step(fn, leaves, p.d_o)

    return {f"chunk_size={chunk}": partial(make, chunk) for chunk in chunks(p, quick)}


def decode(p: Any, quick: bool = False) -> dict[str, Factory]:
    def make() -> Call:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        given, state, s = p.given, p.new_state(), p.shape
        per_head = {name: given[name][:, None].expand(-1, s.V) for name in ("D", "dt_bias")}
        per_head |= {"dt": given["dt"][..., None].expand(-1, -1, s.V)}
        per_head |= {"A": given["A"][:, None, None].expand(-1, s.V, s.K)}

        @torch.inference_mode()
        def call() -> Tensor:
            y: Tensor = selective_state_update(state, **given | per_head, dt_softplus=True)
            return y

        return call

    return {"": make} if chunks(p, quick) else {}
