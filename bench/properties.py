"""The smaller sections of the CPU benchmark: functions that measure one property of leetcore
each."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import lab
import leetcore
import numpy as np
import torch
from lab import Problem, Session
from leetcore.bench import timing
from leetcore.bench.ceilings import Ceilings
from leetcore.bench.machine import cores
from leetcore.bench.problems import Shape
from leetcore.bench.session import Row

BASE = "1,8,2048,64,64"
WIDE = "1,8,2048,128,128"


def gamma(session: Session) -> None:
    """Time against the decay: denormal numbers must not show."""
    if session.begin(f"gamma {BASE}"):
        shape = Shape.parse(BASE)
        problems = [Problem(shape, torch.float32, decay) for decay in ("alibi", "1", "0.5", "0.001", "0")]
        session.measure([session.leetcore("gamma", p) for p in problems], 2 * session.rounds)


def odd(session: Session) -> None:
    """Odd N, K, V and their even neighbours; the report compares rates, interpolated in K + V
    between two of these."""
    peers: dict[str, list[str]] = {BASE: [], WIDE: [], "1,8,1024,64,64": [], "1,8,1000,64,64": ["1,8,1024,64,64"]}
    peers |= {f"1,8,{n},64,64": [BASE] for n in (2047, 2049)}
    peers |= {f"1,8,2048,{d},{d}": [BASE, WIDE] for d in (65, 80, 96, 100, 127)}
    peers |= {"1,8,2048,63,63": [BASE], "1,8,2048,129,129": [WIDE], "1,8,2048,80,96": [BASE, WIDE]}
    if session.begin("odd shapes"):
        problems = {text: Problem(Shape.parse(text), torch.float32) for text in peers}
        session.measure([session.leetcore("odd", p, peers=peers[text]) for text, p in problems.items()])


def growth(session: Session) -> None:
    """Time against N by octaves."""
    top = 13 if session.quick else 16
    for heads, dim in ((8, 64), (4, 128)):
        if not session.begin(f"growth H={heads} K=V={dim}"):
            continue
        rows = []
        for n in (2**e for e in range(9, top + 1)):
            p = Problem(Shape(1, heads, n, dim, dim), torch.float32)
            rows.append(session.leetcore("growth", p))
            p.__dict__.pop("wanted", None)
        session.measure(rows)


def one_head(session: Session) -> None:
    """As many tokens in one head as in eight: a single sequence must use the whole machine."""
    if session.begin("one head"):
        problems = [Problem(Shape.parse(text), torch.float32) for text in ("1,1,65536,128,128", "1,8,8192,128,128")]
        session.measure([session.leetcore("one_head", p) for p in problems])


def threads(session: Session) -> None:
    """One thread and all threads, each with the matrix product's rate at the same number of
    threads."""
    if not session.begin("threads"):
        return
    groups: dict[int, list[Row]] = {n: [] for n in sorted({1, cores()})}
    for text in (BASE, "1,32,1024,128,128"):
        p = Problem(Shape.parse(text), torch.float32)
        for n, rows in groups.items():
            rows.append(session.leetcore(f"threads {n}", p))
    session.rows += [row for rows in groups.values() for row in rows if session.wants(row.method)]
    rates = {n: Ceilings(n, ("torch",)) for n in groups if n != cores()} | {cores(): session.ceilings}
    try:
        for _ in range(4):
            for n, rows in groups.items():
                lab.set_threads(n)
                rounds = math.ceil(session.rounds / 4)
                timing.interleave(rows, rounds, rates[n].matmul, rates[n].copy, session.tick)
    finally:
        lab.set_threads(cores())


def overhead(session: Session) -> None:
    """Microseconds of a call that has next to nothing to compute."""
    if not session.begin("overhead"):
        return
    a, t = np.ones((1, 1, 1, 4), np.float32), torch.ones(1, 1, 1, 4)
    square, d = np.ones((1, 1, 4, 4), np.float32), torch.ones(1, 1, 4)
    state, ao, to, do = torch.ones(1, 1, 4, 4), np.empty_like(a), torch.empty_like(t), torch.empty_like(d)
    asd, aso = np.ones((1, 1, 4), np.float32), np.empty((1, 1, 4), np.float32)
    run, step = leetcore.linear_attention, leetcore.decode_step
    calls: dict[str, Callable[[], Any]] = {
        "numpy": lambda: run(a, a, a, -0.1),
        "numpy out=": lambda: run(a, a, a, -0.1, out=ao),
        "torch": lambda: run(t, t, t, -0.1),
        "torch out=": lambda: run(t, t, t, -0.1, out=to),
        "decode numpy": lambda: step(asd, asd, asd, square, -0.1),
        "decode numpy out=": lambda: step(asd, asd, asd, square, -0.1, out=aso),
        "decode torch": lambda: step(d, d, d, state, -0.1),
        "decode torch out=": lambda: step(d, d, d, state, -0.1, out=do),
        "(numpy.matmul of 4 x 4)": lambda: np.matmul(square, square),
        "(torch.matmul of 4 x 4)": lambda: torch.matmul(state, state),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        timing.clock(call, 100)
    for _ in range(20 if session.quick else 60):
        for name, call in calls.items():
            samples[name].append(timing.clock(call, 100))
        session.tick()
    session.facts["overhead_seconds"] = {name: timing.stats(values) for name, values in samples.items()}


# Prints, for each N, by how many bytes one call with out= raises the peak of resident memory;
# inputs and output exist.
_PROBE = """
import leetcore, sys, numpy as np
from leetcore.bench.machine import extra_memory
for n in (256, *map(int, sys.argv[1:])):  # threads, code and tables come with the first call
    q, k, v, out = (np.ones((1, 8, n, 64), np.float32) for _ in range(4))
    print(extra_memory(lambda: leetcore.linear_attention(q, k, v, -0.1, method="chunk", out=out)))
"""


def workspace(session: Session) -> None:
    """Scratch against N: the model's, and the growth of the peak of memory in a new process with
    the usual malloc."""
    if not session.begin("workspace"):
        return
    lengths = (1024, 8192) if session.quick else (1024, 8192, 65536)
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, "-c", _PROBE, *map(str, lengths)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    session.facts["workspace"] = [
        {"shape": f"1,8,{n},64,64", "peak_growth_bytes": int(grown)}
        | {"model_bytes": leetcore.cost("chunk", H=8, N=n, K=64).workspace}
        for n, grown in zip(lengths, done.stdout.split()[1:], strict=True)
    ]
