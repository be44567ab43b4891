"""The tables of the CPU benchmark: leetcore against its rivals, and leetcore on each instruction
set."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import lab
import leetcore
import torch
from lab import DTYPES, DecodeProblem, Problem, Session, TrainingProblem
from leetcore.bench import results as of
from leetcore.bench.machine import extra_memory
from leetcore.bench.problems import Shape
from leetcore.bench.session import Row
from leetcore.bench.timing import clock_ceiling

SHAPES = (
    "1,8,2048,64,64",
    "1,32,1024,128,128",
    "1,8,8192,128,128",
    "1,8,512,64,64",
    "2,12,1000,80,96",
    "1,32,2048,128,128",
    "1,4,32768,64,64",
    "1,1,65536,128,128",
)
QUICK_SHAPES = (SHAPES[3], SHAPES[0], SHAPES[1])
DECODE = "16,32,1,128,128"
TRAINING = ("1,8,2048,64,64", "1,32,1024,128,128", "1,8,8192,128,128")
MAX_PREDICTED_S = 1.0  # slower methods are skipped


def leetcore_rows(session: Session, p: Problem) -> list[Row]:
    """Rows of chunk, with a fresh and with a reused output, and of every other method that is fast
    enough."""
    limit = MAX_PREDICTED_S / (10 if session.quick else 1)
    rows = []
    for method in lab.methods():
        for reuse in (False, True) if method == "chunk" else (False,):
            if not session.wants(f"{method} out=" if reuse else method):
                continue
            seconds = 1e-6 * lab.predicted(p, method).microseconds
            if seconds > limit:
                rows.append(session.row("forward", method, p, status=f"skipped: predicted {seconds:.1f} s"))
            else:
                rows.append(session.leetcore("forward", p, method, reuse))
    return rows


def forward(session: Session) -> None:
    """Every method on a shape, in all dtypes, sampled in turn."""
    for shape in session.shapes:
        rows: list[Row] = []
        if not session.begin(f"forward {shape}"):
            continue
        for dtype in session.dtypes:
            p = Problem(shape, DTYPES[dtype])
            rows += leetcore_rows(session, p) + session.rival_rows("forward", p)
            p.__dict__.pop("wanted", None)
        session.measure(rows)


def decode(session: Session) -> None:
    """One token per sequence. The ceiling is a copy of a buffer as large as all states."""
    if not session.begin(f"decode {DECODE}"):
        return
    shape = Shape.parse(DECODE)
    pool, other = (torch.ones(shape.state_bytes() // 4) for _ in range(2))
    rows: list[Row] = []
    for dtype in session.dtypes:
        p = DecodeProblem(shape, DTYPES[dtype])
        rows += [session.leetcore("decode", p, "decode_step", reuse) for reuse in (False, True)]
        rows += session.rival_rows("decode", p)
    rows.append(session.row("decode", "(mul_ of all states)", p, "rival", call=partial(pool.mul_, 1.0)))

    def copy() -> float:
        return 2 * pool.nbytes / clock_ceiling(lambda: other.copy_(pool))

    session.measure(rows, 2 * session.rounds, ceiling=copy)


def training(session: Session) -> None:
    """A forward and a backward pass by autograd; the backward pass alone.

    Memory includes results.
    """
    for text in TRAINING[:1] if session.quick else TRAINING:
        if not session.begin(f"training {text}"):
            continue
        p = TrainingProblem(Shape.parse(text), torch.float32)
        rows = [session.leetcore("training", p, method) for method in ("training", "backward")]
        rows += session.rival_rows("training", p)
        for row in rows:
            row.peak_bytes = extra_memory(row.call) if row.call else None
        session.measure(rows)


def isa(session: Session) -> None:
    """chunk on the other instruction sets: a child process each, as the set is chosen when leetcore
    is loaded."""
    info = leetcore.build_info()
    for name in info["isas"].split():
        if name == info["isa"] or not session.begin(f"instruction set {name}"):
            continue
        # The generic code is there to be right: one small shape is enough.
        smallest = min(session.shapes, key=lambda s: s.exact_flop(64))
        shapes = [smallest] if name == "generic" else session.shapes[:3]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "isa.json"
            command = [sys.executable, str(Path(__file__).with_name("run.py")), *session.argv, "--sections", "forward"]
            command += ["--methods", "leetcore chunk", "-o", str(path), "--no-report"]
            command += [part for s in shapes for part in ("--shapes", str(s))]
            done = subprocess.run(command, env=os.environ | {"LEETCORE_ISA": name}, capture_output=True, text=True)
            if done.returncode:
                session.facts.setdefault("failed", {})[f"isa {name}"] = done.stderr.strip().splitlines()[-1]
                continue
            child = of.read(path)
        assert child["isa"] == name, "the child measured another instruction set"
        session.imported += [row | {"section": f"isa {name}"} for row in child["rows"]]
