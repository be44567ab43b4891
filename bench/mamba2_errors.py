"""The record mamba2: errors of the operators that a Mamba-2 layer calls, against the definition in
float64 on the same rounded inputs.

Prefill is one call. Decoding is one call per token from a state of zeros, which is float32 in both,
as it is in a cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mamba2_calls as calls
import torch
import transformers
from leetcore import reference
from leetcore.bench import results as of
from mamba2_calls import DTYPES, Heads, exact

GRANITE = Heads(B=1, H=48, N=2048, K=128, V=64)  # of Granite-4-H-tiny


def errors(dtype: str) -> list[dict[str, Any]]:
    """A row for each method."""
    given, kind, s = calls.inputs(GRANITE, DTYPES[dtype]), DTYPES[dtype], GRANITE
    want = reference.ssd(**{name: exact(value) for name, value in given.items()}, dt_softplus=True, fast=True)
    prefills = {
        "transformers, prefill": calls.prefill_of_transformers(given),
        "leetcore, prefill": calls.prefill(given),
    }
    rows = []
    for method, call in prefills.items():
        y, state = call()
        rows.append(row(method, dtype, y.to(kind), state, want))
    steps = {"transformers, decoding": calls.their_step, "leetcore, decoding": calls.our_step}
    for method, step in steps.items():
        y, state = torch.empty(1, s.N, s.H, s.V, dtype=kind), torch.zeros(1, s.H, s.V, s.K)
        for t in range(s.N):
            y[:, t] = step(**calls.part(given, t), state=state)
        rows.append(row(method, dtype, y, state, want))
    return rows


def row(method: str, dtype: str, y: Any, state: Any, want: Any) -> dict[str, Any]:
    found = (float(f"{reference.error(exact(a), b):.3g}") for a, b in zip((y, state), want, strict=True))
    return {"method": method, "dtype": dtype, "N": GRANITE.N, "decay": "new layers"} | dict(
        zip(("output", "state"), found, strict=True)
    )


def measure() -> of.Results:
    """The file of results."""
    shape = {name: getattr(GRANITE, dim) for name, dim in {"H": "H", "P": "V", "K": "K", "G": "G"}.items()}
    facts = {"transformers": transformers.__version__, "shape": shape}
    return of.new("mamba2", Path(__file__).parent, errors=[e for dtype in DTYPES for e in errors(dtype)], facts=facts)
