"""flash-linear-attention's Triton kernels of the same operator (simple_gla), where it is installed
and there is a GPU.

Its layout is [B, N, H, D]. The inputs are copied to this layout outside the timing; the output
keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from leetcore.bench.session import Factory
from leetcore.bench.timing import Call
from torch import Tensor

from rivals import training_step


def simple_gla(function: str) -> Callable[..., Any] | None:
    """A function of fla.ops.simple_gla."""
    if not torch.cuda.is_available() or find_spec("fla") is None:
        return None
    from fla.ops import simple_gla

    return getattr(simple_gla, function, None)


def forward(p: Any, quick: bool = False) -> dict[str, Factory]:
    def make(fn: Callable[..., Any]) -> Call:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (p.q, p.k, p.v))

        @torch.inference_mode()
        def call() -> Tensor:
            return fn(q, k, v, g_gamma=p.log_decay, scale=1.0)[0].transpose(1, 2)

        return call

    functions = {"chunk": "chunk_simple_gla", "recurrent": "fused_recurrent_simple_gla"}
    found = {label: fn for label, name in functions.items() if p.device == "cuda" and (fn := simple_gla(name))}
    return {label: lambda fn=fn: make(fn) for label, fn in found.items()}


def training(p: Any, quick: bool = False) -> dict[str, Factory]:
    fn = simple_gla("chunk_simple_gla") if p.device == "cuda" else None
    if fn is None:
        return {}

    def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
        decay = {"g_gamma": p.log_decay} if log_decay is None else {"g": log_decay}
        return fn(q, k, v, **decay, scale=1.0)[0]

    def make() -> Call:
        leaves = {name: x.detach().transpose(1, 2).contiguous().requires_grad_() for name, x in p.leaves().items()}
        d_o = p.d_o.transpose(1, 2).contiguous()

        def call() -> dict[str, Tensor]:
            return {name: x.transpose(1, 2) for name, x in training_step(forward, leaves, d_o).items()}

        return call

    return {"chunk": make}


def decode(p: Any, quick: bool = False) -> dict[str, Factory]:
    fn = simple_gla("fused_recurrent_simple_gla") if p.device == "cuda" else None
    if fn is None:
        return {}

    def make() -> Call:
        q, k, v = (x.unsqueeze(1) for x in (p.q, p.k, p.v))
        state = p.initial_state.clone()

        @torch.inference_mode()
        def call() -> Tensor:
            nonlocal state
            o, state = fn(
                q, k, v, g_gamma=p.log_decay, scale=1.0, initial_state=state, output_final_state=True
            )  # a new state each time: it has no way to update one in place
            return o.squeeze(1)

        return call

    return {"recurrent": make}
