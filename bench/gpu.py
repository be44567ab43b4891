"""The GPU benchmark of leetcore: `python bench/gpu.py --help`; how to read it is in bench/README.md."""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import gpu_device
import gpu_report
import harness
import leetcore
import machine
import ours
import torch
from harness import DTYPES, DecodeProblem, Problem, Row, Shape, TrainingProblem, alibi, gates
from leetcore.bench.options import listed, sentence
from leetcore.bench.problems import refusal
from session import Session

SLOW_S = 0.1  # a call that takes longer, or is predicted to, is not sampled
HOST_CALLS = 15
ROUNDS = 9

# In order of worth, as time may run out. The first four are those that have goals.
SHAPES = ("1,32,8192,128,128", "8,32,2048,128,128", "1,8,65536,64,64", "1,64,131072,128,128")
FEW_HEADS = ("1,4,65536,128,128", "1,16,16384,128,128")
SHORT = ("1,8,64,64,64", "1,32,1024,128,128")
DECODE = ("64,32,1,128,128", "1,32,1,128,128", "8,32,1,128,128", "256,32,1,128,128")
GROWTH = ((8, 64, range(8, 16)), (32, 128, range(9, 15)))  # heads, K = V, log2 of N
CHOICE = tuple(f"1,{h},{n},{d},{d}" for n in (100, 3000, 24000) for h in (1, 6, 48, 200) for d in (64, 128))
GATED = "8,32,2048,128,128"  # a decay per token, whose gradient is wanted too
SECTIONS = ("forward", "decode", "backward", "gated", "growth", "choice")
TINY = {
    "forward": ("1,2,200,16,24",),
    "decode": ("3,2,1,16,16",),
    "backward": ("1,2,256,16,24",),
    "gated": ("2,2,128,16,8",),
    "growth": ("1,1,64,8,8", "1,1,128,8,8"),
}
PROBLEMS = {"decode": DecodeProblem, "backward": TrainingProblem, "gated": TrainingProblem}  # else Problem


@dataclass(frozen=True)
class Group:
    """Methods that are sampled in turn: all of one problem."""

    section: str
    shape: Shape
    dtype: str = "bfloat16"
    methods: tuple[str, ...] = ()  # none: all
    rivals: bool = True

    def __str__(self) -> str:
        return f"{self.section} {self.shape} {self.dtype}"


def groups(tiny: bool) -> Iterator[Group]:
    """What there is to measure, the most telling first."""
    if tiny:
        for section, texts in TINY.items():
            yield from (Group(section, Shape.parse(text), "float32", rivals=section != "growth") for text in texts)
        return
    for text in SHAPES[:2]:
        yield Group("forward", Shape.parse(text))
    yield Group("decode", Shape.parse(DECODE[0]))
    yield Group("backward", Shape.parse(SHAPES[0]))
    for text in (*SHAPES[2:], *FEW_HEADS):
        yield Group("forward", Shape.parse(text))
    yield Group("gated", Shape.parse(GATED))
    for text in (SHAPES[1], SHAPES[2], *FEW_HEADS, SHAPES[3]):
        yield Group("backward", Shape.parse(text))
    for text in SHORT:
        yield Group("forward", Shape.parse(text))
    for text in DECODE[1:]:
        yield Group("decode", Shape.parse(text), rivals=False)
    for dtype in ("float16", "float32"):
        for text in (SHAPES[0], SHAPES[2]):
            yield Group("forward", Shape.parse(text), dtype, ("auto", "chunk", "scan"))
    for heads, dim, powers in GROWTH:
        for power in powers:
            yield Group("growth", Shape(1, heads, 2**power, dim, dim), rivals=False)
    for text in CHOICE:
        yield Group("choice", Shape.parse(text), rivals=False)


class Lost(Exception):
    """The device's context broke; the text says in what."""


@dataclass(eq=False)
class GpuSession(Session):
    """A Session that credits every method with the bytes of the memory floor, on the device it is given."""

    device: Any = None
    broken: list[str] = field(default_factory=list)  # methods, or "rivals", that are not to be called any more

    def row(self, section: str, method: str, p: Problem | DecodeProblem, **fields: Any) -> Row:
        work = p.shape.token_bytes(p.dtype)
        if isinstance(p, DecodeProblem):
            work += 2 * p.shape.state_bytes()
        elif isinstance(p, TrainingProblem):
            forward = 0 if method == ours.label("backward") else work + p.decay_bytes()
            work = forward + p.backward_bytes()
        return super().row(section, method, p, **{"work": float(work), "dense_work": 0.0} | fields)

    def measure_group(self, group: Group) -> None:
        s, dtype = group.shape, DTYPES[group.dtype]
        needed = 12 * s.token_bytes(dtype) + 10 * s.state_bytes()
        if not self.device.fits(needed):
            self.rows.append(Row(group.section, "", s, group.dtype, status=f"skipped: wants {needed / 2**30:.0f} GiB"))
            return
        decay = gates(s) if group.section == "gated" else alibi(s.H)
        p = PROBLEMS.get(group.section, Problem)(s, dtype, decay, device=self.device.name)
        rows = [self.leetcore_row(group.section, p, method) for method in self.methods(group)]
        if group.rivals and "rivals" not in self.broken:
            rows += self.rival_rows(group.section, p)
            self.require("rivals", group)
        for oracle in ("references", "wanted"):
            p.__dict__.pop(oracle, None)
        for row in rows:
            if row.call and group.section in ("forward", *PROBLEMS):
                row.host_us = [1e6 * t for t in self.device.host(row.call, HOST_CALLS)]
                row.peak_bytes = self.device.peak(row.call)
        self.device.matmul()
        self.measure(rows, ceiling=self.device.copy)
        for row in rows:
            if row.status.startswith("failed"):
                leetcore_s = row.method.startswith("leetcore ")
                self.require(row.method.removeprefix("leetcore ") if leetcore_s else "rivals", group)

    def methods(self, group: Group) -> list[str]:
        names = group.methods or ("auto", *ours.methods(self.device.name))
        if group.section == "decode":
            names = ("decode_step",)
        elif PROBLEMS.get(group.section) is TrainingProblem:
            names = ("training", "backward")
        return [name for name in names if name not in self.broken and self.wants(ours.label(name))]

    def leetcore_row(self, section: str, p: Problem | DecodeProblem, method: str) -> Row:
        """Gated; a status says why there is nothing to time."""
        row = self.row(section, ours.label(method), p)
        try:
            if isinstance(p, Problem):
                row.note = ours.chosen(p) if method in ("auto", "training") else ""
                predicted = 1e-6 * (ours.explained(p, row.note or method, "predicted") or 0.0)
                if predicted > SLOW_S:
                    row.status = f"skipped: predicted {predicted:.2g} s"
                    return row
            row.call = ours.call(p, method)
            harness.gate(row, p, self.timer)
        except NotImplementedError as error:
            row.status, row.call = f"refused: {refusal(method, error)}", None
        except Exception as error:  # a failure is a result, and the others are measured still
            row.status, row.call = f"failed: {sentence(error)}", None
            self.require(method, row)
        if row.call and row.status == "ok" and (took := self.timer.clock(row.call, 1)) > SLOW_S:
            row.status, row.call = f"skipped: took {took:.2g} s", None
        return row

    def require(self, name: str, where: Any) -> None:
        """Raises Lost, with `name` among the broken ones, if the device is."""
        if self.device.lost():
            self.broken.append(name)
            raise Lost(f"{name} broke the device's context in {where}")


def collect(session: GpuSession, earlier: dict[str, Any], commit: str) -> dict[str, Any]:
    """All that is written: conditions, every row that got anywhere, facts."""
    versions = {"python": sys.version.split()[0], "leetcore": leetcore.__version__}
    for name in ("torch", "triton", "fla-core", "flash-linear-attention", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or machine.commit(),
        "device": earlier.get("device") or session.device.facts(),
        "versions": versions,
        "leetcore": {key: leetcore.build_info()[key] for key in ("compiler", "cuda")},
        "chunk": session.chunk,
        "rounds": session.rounds,
        "copy": harness.stats(session.device.copies) or earlier.get("copy"),
        "matmul": harness.stats(session.device.products) or earlier.get("matmul"),
        "rows": session.imported + [row.to_json() for row in session.rows],
        "left_out": earlier.get("left_out", []) + session.left_out,
        "facts": session.facts,
        "broken": session.broken,
    }


def write(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all: whoever stops this program finds the last state of it."""
    texts = {path: json.dumps(results, indent=1) + "\n", path.with_suffix(".md"): gpu_report.markdown(results)}
    for file, text in texts.items():
        part = file.with_name(file.name + ".part")
        part.write_text(text)
        part.replace(file)


def restart(left_s: float) -> None:
    """This program anew, as what broke a device's context broke it for the process: it goes on from what is written."""
    again = ["--resume", f"--time-limit={left_s}"]  # of an option given twice, the last counts
    os.execv(sys.executable, [sys.executable, *sys.argv, *again])


def run(session: GpuSession, todo: list[Group], save: Callable[[], None], say: Callable[[str], Any]) -> None:
    """Group by group; raises Lost with nothing of a group that is to be done again but a row that says why."""
    for i, group in enumerate(todo):
        if session.late():
            session.facts["not reached"] = [str(group) for group in todo[i:]]
            say(f"Time is up: {len(todo) - i} groups are left.")
            break
        rows, left_out = len(session.rows), len(session.left_out)
        try:
            session.measure_group(group)
        except Lost as lost:
            del session.rows[rows:], session.left_out[left_out:]
            name = ours.label(session.broken[-1])
            session.rows.append(Row(group.section, name, group.shape, group.dtype, status=f"failed: {lost}"))
            raise
        except Exception as error:  # the other groups are worth having; the report names this one
            session.facts.setdefault("failed", {})[str(group)] = sentence(error)
        session.facts.setdefault("done", []).append(str(group))
        if session.device.lost():
            raise Lost(f"the device's context broke in {group}")
        save()
        wrong = [row.method for row in session.rows[rows:] if row.status.startswith(("wrong", "not finite", "failed"))]
        say(f"{group}: {len(session.rows) - rows} rows" + (f"; BAD: {', '.join(wrong)}" if wrong else ""))


@click.command()
@click.option("--device", type=click.Choice(list(gpu_device.DEVICES)), default="cuda", show_default=True)
@click.option("--sections", default="", help=f"Comma-separated, of: {', '.join(SECTIONS)}.  [default: all]")
@click.option("--methods", default="*", help="Glob of the methods to time, e.g. 'leetcore*' or 'fla'.")
@click.option("--rounds", type=click.IntRange(min=1), default=ROUNDS, show_default=True, help="Samples per method.")
@click.option("--tiny", is_flag=True, help="A few tiny problems: to see that it works.")
@click.option("--time-limit", type=float, default=math.inf, help="Begin nothing new after so many seconds.")
@click.option("--commit", default="", help="Of the working tree, where git cannot be asked.")
@click.option("--resume", is_flag=True, help="Go on with what OUTPUT has.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="JSON.")
def main(
    device: str,
    sections: str,
    methods: str,
    rounds: int,
    tiny: bool,
    time_limit: float,
    commit: str,
    resume: bool,
    output: Path,
) -> None:
    """Times every method of leetcore and its rivals on this GPU, sample by sample in turn, after a correctness gate.

    Results, and their tables (.md) beside them, are written after every problem. Exits with 1 if a method was wrong or
    failed.
    """
    deadline = time.monotonic() + time_limit
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA device")
    if device not in {m.device for m in leetcore.methods()}:
        raise click.ClickException(f"this leetcore has no methods for {device} (cuda: {leetcore.build_info()['cuda']})")
    earlier: dict[str, Any] = json.loads(output.read_text()) if resume else {}
    gpu = gpu_device.DEVICES[device]()
    session = GpuSession(
        shapes=[],
        decode_shapes=[],
        dtypes=[],
        rounds=rounds,
        quick=True,
        pattern=methods,
        argv=[],
        ceilings=gpu,
        timer=gpu.timer,
        device=gpu,
        imported=earlier.get("rows", []),
        facts={k: v for k, v in earlier.get("facts", {}).items() if k != "not reached"},
        broken=earlier.get("broken", []),
        late=lambda: time.monotonic() > deadline,
    )
    earlier.setdefault("device", gpu.facts())

    def save() -> None:
        write(output, collect(session, earlier, commit))

    wanted, done = listed(sections), session.facts.get("done", [])
    todo = [g for g in groups(tiny) if (not wanted or g.section in wanted) and str(g) not in done]
    start = time.monotonic()
    try:
        run(session, todo, save, lambda text: click.echo(f"{time.monotonic() - start:6.1f} s  {text}", err=True))
    except Lost as lost:
        click.echo(f"{lost}: going on in a new process", err=True)
        save()
        restart(deadline - time.monotonic())
    except KeyboardInterrupt:
        click.echo("Interrupted: what was measured so far is kept.", err=True)
    save()
    results = json.loads(output.read_text())
    click.echo(gpu_report.goals_section(results))
    if bad := gpu_report.bad(results):
        raise click.ClickException(f"wrong or failed: {', '.join(sorted({row['method'] for row in bad}))}")


if __name__ == "__main__":
    main()
