"""The smaller sections: one property of leetcore each, every one of them a function of the session."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import leetcore
import numpy as np
import ours
import torch
from harness import Problem, Row, Shape, alibi
from session import Session

BASE = "1,8,2048,64,64"
WIDE = "1,8,2048,128,128"


def gamma(session: Session) -> None:
    """Time against the decay: denormals must not show."""
    shape = Shape.parse(BASE)
    decays = {"ALiBi": alibi(shape.H)}
    decays |= {str(g): torch.full([shape.H], math.log(g) if g else -math.inf) for g in (1, 0.5, 1e-3, 0)}
    session.say(f"gamma {shape}: {', '.join(decays)}")
    problems = {name: Problem(shape, torch.float32, log_decay) for name, log_decay in decays.items()}
    session.measure(
        [session.leetcore("gamma", p, note=f"gamma={name}") for name, p in problems.items()], 2 * session.rounds
    )


def odd(session: Session) -> None:
    """Ragged N, K, V beside their even neighbours; the report compares rates, interpolated in K + V between two."""
    peers: dict[str, list[str]] = {BASE: [], WIDE: [], "1,8,1024,64,64": [], "1,8,1000,64,64": ["1,8,1024,64,64"]}
    peers |= {f"1,8,{n},64,64": [BASE] for n in (2047, 2049)}
    peers |= {f"1,8,2048,{d},{d}": [BASE, WIDE] for d in (65, 80, 96, 100, 127)}
    peers |= {"1,8,2048,63,63": [BASE], "1,8,2048,129,129": [WIDE], "1,8,2048,80,96": [BASE, WIDE]}
    rows = []
    for text, neighbours in peers.items():
        session.say(f"odd shapes: {text}")
        shape = Shape.parse(text)
        p = Problem(shape, torch.float32, alibi(shape.H))
        rows.append(session.leetcore("odd", p, peers=neighbours))
    session.measure(rows)


def growth(session: Session) -> None:
    """Time against N by octaves."""
    top = 13 if session.quick else 16
    for heads, dim in ((8, 64), (4, 128)):
        rows = []
        for n in (2**e for e in range(9, top + 1)):
            session.say(f"growth: H={heads} K=V={dim} N={n}")
            p = Problem(Shape(1, heads, n, dim, dim), torch.float32, alibi(heads))
            rows.append(session.leetcore("growth", p))
            p.__dict__.pop("references", None)
        session.measure(rows)


def one_head(session: Session) -> None:
    """As many tokens in one head as in eight: a single sequence must use the whole machine."""
    rows = []
    for text in ("1,1,65536,128,128", "1,8,8192,128,128"):
        shape = Shape.parse(text)
        session.say(f"one head: {shape}")
        p = Problem(shape, torch.float32, alibi(shape.H))
        rows.append(session.leetcore("one_head", p))
        p.__dict__.pop("references", None)
    session.measure(rows)


def threads(session: Session) -> None:
    """One thread against all, the matmul ceiling at the same number of threads."""
    available = ours.available_threads()
    counts = sorted({1, available})
    groups: dict[int, list[Row]] = {n: [] for n in counts}
    for text in (BASE, "1,32,1024,128,128"):
        shape = Shape.parse(text)
        p = Problem(shape, torch.float32, alibi(shape.H))
        for n in counts:
            groups[n].append(session.leetcore("threads", p, note=f"threads={n}"))
    session.rows += [row for rows in groups.values() for row in rows]
    session.say(f"threads: {counts}")
    try:
        for _ in range(4):
            for n, rows in groups.items():
                ours.set_threads(n)
                harness.interleave(
                    rows, math.ceil(session.rounds / 4), session.ceilings.matmul, session.ceilings.copy, session.tick
                )
    finally:
        ours.set_threads(available)


def overhead(session: Session) -> None:
    """Microseconds of a call that has next to nothing to compute."""
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
    session.say("overhead")
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        harness.clock(call, 100)
    for _ in range(20 if session.quick else 60):
        for name, call in calls.items():
            samples[name].append(1e6 * harness.clock(call, 100))
        session.tick()
    session.facts["overhead_us"] = {name: harness.stats(values) for name, values in samples.items()}


def workspace(session: Session) -> None:
    """Scratch against N: what leetcore says, else how far a call with out= raises the peak of a fresh process."""
    lengths = (1024, 8192) if session.quick else (1024, 8192, 65536)
    session.say("workspace")
    probe = Path(__file__).with_name("probe_workspace.py")
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, str(probe), *map(str, lengths)], env=env, capture_output=True, text=True, check=True
    )
    grown = [int(line) for line in done.stdout.split()]
    problems = [Problem(Shape(1, 8, n, 64, 64), torch.float32, alibi(8)) for n in lengths]
    said = [ours.explained(p, "chunk", "workspace") for p in problems]
    session.facts["workspace"] = [
        {"shape": f"1,8,{n},64,64", "peak_growth_bytes": g, "explained_bytes": s}
        for n, g, s in zip(lengths, grown, said, strict=True)
    ]
