"""leetcore's own calls, and the few things the benchmark asks it about itself."""

from __future__ import annotations

import os
import re
from functools import partial

import leetcore
import torch
from harness import Call, DecodeProblem, Problem, TrainingProblem, training_step
from leetcore.torch import linear_attention
from torch import Tensor

MAX_PREDICTED_S = 4.0


def chunk_size() -> int:
    """C of the chunk method: what its own description says, else 64."""
    ideas = [m.idea for m in leetcore.methods() if m.name == "chunk"]
    found = re.search(r"chunks of (\d+) tokens", " ".join(ideas))
    return int(found[1]) if found else 64


def explained(p: Problem, method: str, what: str) -> float | None:
    """The number that explain() gives for a method, e.g. after "predicted" (us) or "workspace" (bytes)."""
    text = leetcore.explain(p.q, p.k, p.v, p.log_decay)
    found = re.search(rf"^\W*{method}\s.*\b{what} ([\d.e+]+)", text, re.MULTILINE)
    return float(found[1]) if found else None


def chosen(p: Problem) -> str:
    """The method that "auto" takes."""
    found = re.search(r"^\* (\w+)", leetcore.explain(p.q, p.k, p.v, p.log_decay), re.MULTILINE)
    assert found, "explain marks no method"
    return found[1]


def label(method: str, reuse_out: bool = False) -> str:
    """Name of a row; reuse_out: the output is preallocated."""
    return f"leetcore {method}" + (" out=" if reuse_out else "")


def methods(device: str = "cpu") -> list[str]:
    return [m.name for m in leetcore.methods() if m.device == device]


def isas() -> tuple[str, list[str]]:
    """The instruction set in use, and all that the build has and the machine can run."""
    info = leetcore.build_info()
    return info["isa"], info["isas"].split()


def set_threads(n: int) -> None:
    torch.set_num_threads(n)
    leetcore.set_num_threads(n)


def available_threads() -> int:
    return len(os.sched_getaffinity(0))


def forward(p: Problem, method: str = "chunk", out: Tensor | None = None) -> Call:
    return lambda: leetcore.linear_attention(p.q, p.k, p.v, p.log_decay, method=method, out=out)


def training(p: TrainingProblem) -> Call:
    """A forward and a backward pass by torch's autograd."""
    leaves = p.leaves()
    operator = linear_attention if "log_decay" in leaves else partial(linear_attention, log_decay=p.log_decay)
    return lambda: training_step(operator, leaves, p.d_o)


def backward(p: TrainingProblem, wants: list[str] | None = None) -> Call:
    """A backward pass alone, of the gradients that the problem wants or others."""
    names = wants or [f"d_{name}" for name in p.leaves()]

    def call() -> dict[str, Tensor]:
        d = leetcore.linear_attention_backward(p.q, p.k, p.v, p.log_decay, d_o=p.d_o, wants=names)
        return {name: getattr(d, name) for name in names}

    return call


def decode(p: DecodeProblem, out: Tensor | None = None) -> Call:
    state = p.initial_state.clone()
    return lambda: leetcore.decode_step(p.q, p.k, p.v, state, p.log_decay, out=out)


def call(p: Problem | DecodeProblem, method: str) -> Call:
    """Of a training problem: "training", or "backward" alone."""
    if isinstance(p, TrainingProblem):
        return backward(p) if method == "backward" else training(p)
    return decode(p) if isinstance(p, DecodeProblem) else forward(p, method)
