"""The tables: leetcore against its rivals, forward and decode, and leetcore on each instruction set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import ours
import torch
from harness import DTYPES, DecodeProblem, Problem, Row, alibi, copy_rate
from session import Session

SHAPES = (
    "1,8,512,64,64",
    "1,8,2048,64,64",
    "1,32,1024,128,128",
    "1,32,2048,128,128",
    "1,8,8192,128,128",
    "1,4,32768,64,64",
    "1,1,65536,128,128",
    "2,12,1000,80,96",
)
QUICK_SHAPES = SHAPES[:3]
DECODE_SHAPES = ("16,32,1,128,128",)


def leetcore_rows(session: Session, p: Problem) -> list[Row]:
    """The chunk method with fresh and with reused output, and every other method that is fast enough to wait for."""
    limit = ours.MAX_PREDICTED_S / (10 if session.quick else 1)
    rows = []
    for method, reuse_out in [("chunk", False), ("chunk", True), *((m, False) for m in ours.methods() if m != "chunk")]:
        if not session.wants(ours.label(method, reuse_out)):
            continue
        seconds = 1e-6 * (ours.explained(p, method, "predicted") or 0.0)
        if seconds > limit:
            status = f"skipped: predicted {seconds:.1f} s"
            rows.append(session.row("forward", ours.label(method), p, status=status))
        else:
            rows.append(session.leetcore("forward", p, method, reuse_out))
    return rows


def forward(session: Session) -> None:
    """Every method of a shape, all dtypes of it, in one interleaved group."""
    for shape in session.shapes:
        rows: list[Row] = []
        for dtype in session.dtypes:
            session.say(f"forward {shape} {dtype}: oracle, gate and tuning")
            p = Problem(shape, DTYPES[dtype], alibi(shape.H))
            rows += leetcore_rows(session, p)
            rows += session.rival_rows("forward", p)
            p.__dict__.pop("references", None)
        session.say(f"forward {shape}: {len(rows)} methods in turn")
        session.measure(rows)


def decode(session: Session) -> None:
    """One token a sequence; the ceiling is a copy of a buffer as large as the state pool."""
    for shape in session.decode_shapes:
        pool, other = (torch.ones(shape.state_bytes() // 4) for _ in range(2))
        rows: list[Row] = []
        for dtype in session.dtypes:
            session.say(f"decode {shape} {dtype}: gate and tuning")
            p = DecodeProblem(shape, DTYPES[dtype], alibi(shape.H))
            rows += [session.leetcore("decode", p), session.leetcore("decode", p, reuse_out=True)]
            rows += session.rival_rows("decode", p)
        rows.append(session.row("decode", "(torch mul_ of the pool, in place)", p, call=partial(pool.mul_, 1.0)))
        session.say(f"decode {shape}: {len(rows)} methods in turn")
        session.measure(rows, 2 * session.rounds, ceiling=partial(copy_rate, pool, other))


def isa(session: Session) -> None:
    """The chunk method on the instruction sets not in use here: a child process each, as the choice is made at load."""
    used, available = ours.isas()
    for name in available:
        if name == used:
            continue
        # The portable code is there to be right: one small shape tells enough.
        shapes = [s for s in session.shapes if name != "generic"] or [
            min(session.shapes, key=lambda s: s.exact_flop(64))
        ]
        session.say(f"isa {name}: {len(shapes)} shapes in a child process")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "isa.json"
            command = [sys.executable, str(Path(__file__).with_name("run.py")), *session.argv, "--sections", "forward"]
            command += ["--methods", "leetcore chunk", "-o", str(path), "--no-report"]
            command += [part for s in shapes for part in ("--shapes", str(s))]
            done = subprocess.run(command, env=os.environ | {"LEETCORE_ISA": name}, capture_output=True, text=True)
            if done.returncode:
                session.facts.setdefault("failed", {})[f"isa {name}"] = done.stderr.strip().splitlines()[-1]
                continue
            child = json.loads(path.read_text())
        assert child["leetcore"]["isa"] == name, "the child measured another instruction set"
        session.imported += [row | {"section": f"isa {name}"} for row in child["rows"]]
