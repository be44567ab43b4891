"""leetcore's own calls, and the few things the benchmark asks it about itself."""

from __future__ import annotations

import os
import re

import leetcore
import torch
from harness import Call, DecodeProblem, Problem, Shape
from torch import Tensor

MAX_PREDICTED_S = 4.0


def chunk_size() -> int:
    """C of the chunk method, from build_info() or explain() if either tells it, else 64."""
    x = torch.zeros(1, 1, 256, 64)
    for text in (leetcore.build_info().get("chunk", ""), leetcore.explain(x, x, x, -0.1)):
        if found := re.search(r"^(\d+)$|\b(?:C|chunk_size|chunk size) ?= ?(\d+)", text):
            return int(found[1] or found[2])
    return 64


def workspace_bytes(q: Tensor, k: Tensor, v: Tensor) -> int | None:
    """Scratch of the chosen method in bytes, if explain() tells it."""
    found = re.search(r"\*? *chunk\b.*?workspace[ =:]+(\d+)", leetcore.explain(q, k, v, -0.1, method="chunk"))
    return int(found[1]) if found else None


def label(method: str, reuse_out: bool = False) -> str:
    """Name of a row; reuse_out: the output is preallocated."""
    return f"leetcore {method}" + (" out=" if reuse_out else "")


def methods() -> list[str]:
    return [m.name for m in leetcore.methods() if m.device == "cpu"]


def isas() -> tuple[str, list[str]]:
    """The instruction set in use, and all that the build has and the machine can run."""
    info = leetcore.build_info()
    return info["isa"], info["isas"].split()


def set_threads(n: int) -> None:
    torch.set_num_threads(n)
    leetcore.set_num_threads(n)


def available_threads() -> int:
    return len(os.sched_getaffinity(0))


def predicted_seconds(method: str, s: Shape, matmul_rate: float) -> float:
    """A cautious guess, only to leave out what would take all day: arithmetic at a tenth of the matmul rate, or a
    quarter where it is a chain of products."""
    if method == "parallel":
        return s.B * s.H * s.N * (s.N + 1) * (s.K + s.V) / (0.25 * matmul_rate)
    if method == "recurrent":
        return s.B * s.H * s.N * 4 * s.K * s.V / (0.1 * matmul_rate)
    return 0.0


def forward(p: Problem, method: str = "chunk", out: Tensor | None = None) -> Call:
    return lambda: leetcore.linear_attention(p.q, p.k, p.v, p.log_decay, method=method, out=out)


def decode(p: DecodeProblem, out: Tensor | None = None) -> Call:
    state = p.initial_state.clone()
    return lambda: leetcore.decode_step(p.q, p.k, p.v, state, p.log_decay, out=out)
