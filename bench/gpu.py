"""The GPU benchmark of leetcore: `python bench/gpu.py --help`; bench/README.md says how to read
it."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import gpu_device
import gpu_report
import lab
import leetcore
import torch
from lab import DTYPES, DecodeProblem, Problem, Session, TrainingProblem
from lab_mamba2 import SsdDecodeProblem, SsdProblem, SsdShape, SsdTrainingProblem
from leetcore.bench import options
from leetcore.bench import results as of
from leetcore.bench.options import sentence
from leetcore.bench.problems import Shape
from leetcore.bench.session import Row
from leetcore.bench.speed import collect

HERE = Path(__file__).parent
SLOW_S = 0.1  # a call that takes longer, or is predicted to take longer, is not sampled
HOST_CALLS = 15
ROUNDS = 9

# In order of worth, as time may run out. The first four shapes have goals.
SHAPES = ("1,32,8192,128,128", "8,32,2048,128,128", "1,8,65536,64,64", "1,64,131072,128,128")
FEW_HEADS = ("1,4,65536,128,128", "1,16,16384,128,128")
SHORT = ("1,8,64,64,64", "1,32,1024,128,128")
DECODE = ("64,32,1,128,128", "1,32,1,128,128", "8,32,1,128,128", "256,32,1,128,128")
GROWTH = ((8, 64, range(8, 16)), (32, 128, range(9, 15)))  # heads, K = V, log2 of N
CHOICE = tuple(f"1,{h},{n},{d},{d}" for n in (100, 3000, 24000) for h in (1, 6, 48, 200) for d in (64, 128))
GATED = "8,32,2048,128,128"  # a decay per token, whose gradient is wanted too
MAMBA2 = (
    "1,128,8192,128,64 G=1",
    "1,48,4096,128,64 G=1",
    "1,32,4096,256,64 G=1",
    "1,96,4096,128,80 G=8",
    "1,128,8192,128,64 G=8",
)
MAMBA2_DECODE = ("64,80,1,128,64 G=1", "1,80,1,128,64 G=1", "8,80,1,128,64 G=1")
TINY = {
    "forward": ("1,2,200,16,24",),
    "decode": ("3,2,1,16,16",),
    "backward": ("1,2,256,16,24",),
    "gated": ("2,2,128,16,8",),
    "mamba2": ("2,4,150,16,24 G=2",),
    "mamba2_training": ("1,4,150,16,24 G=1",),
    "mamba2_decode": ("3,4,1,16,24 G=2",),
    "growth": ("1,1,64,8,8", "1,1,128,8,8"),
}
PROBLEMS: dict[str, type[Problem]] = {
    "decode": DecodeProblem,
    "backward": TrainingProblem,
    "gated": TrainingProblem,
    "mamba2": SsdProblem,
    "mamba2_training": SsdTrainingProblem,
    "mamba2_decode": SsdDecodeProblem,
}  # the other sections: Problem
SECTIONS = ("forward", *PROBLEMS, "growth", "choice")
METHODS = {
    "decode": ("decode_step",),
    "backward": ("training", "backward"),
    "gated": ("training", "backward"),
    "mamba2": ("auto", "chunk", "scan"),
    "mamba2_training": ("training",),
    "mamba2_decode": ("ssd_step",),
}  # the other sections: all


@dataclass(frozen=True)
class Group:
    """The methods of one problem, which are sampled in turn."""

    section: str
    shape: Shape
    dtype: str = "bfloat16"
    methods: tuple[str, ...] = ()  # an empty tuple: those of METHODS
    rivals: bool = True

    def __str__(self) -> str:
        return f"{self.section} {self.shape} {self.dtype}"

    @classmethod
    def parse(cls, section: str, shape: str, dtype: str = "bfloat16", **fields: Any) -> Group:
        return cls(section, (SsdShape if "G=" in shape else Shape).parse(shape), dtype, **fields)


def groups(tiny: bool) -> Iterator[Group]:
    """All groups, the most telling first."""
    if tiny:
        for section, texts in TINY.items():
            yield from (Group.parse(section, text, "float32", rivals=section != "growth") for text in texts)
        return
    yield Group.parse("forward", SHAPES[0])
    yield Group.parse("mamba2", MAMBA2[0])
    yield Group.parse("forward", SHAPES[1])
    yield Group.parse("decode", DECODE[0])
    yield Group.parse("backward", SHAPES[0])
    yield Group.parse("mamba2_training", MAMBA2[0])
    yield Group.parse("mamba2_decode", MAMBA2_DECODE[0])
    for text in (*SHAPES[2:], *FEW_HEADS):
        yield Group.parse("forward", text)
    yield Group.parse("gated", GATED)
    for text in MAMBA2[1:]:
        yield Group.parse("mamba2", text)
    yield Group.parse("mamba2_training", MAMBA2[1])
    for text in MAMBA2_DECODE[1:]:
        yield Group.parse("mamba2_decode", text)
    for text in (SHAPES[1], SHAPES[2], *FEW_HEADS, SHAPES[3]):
        yield Group.parse("backward", text)
    for text in SHORT:
        yield Group.parse("forward", text)
    for text in DECODE[1:]:
        yield Group.parse("decode", text, rivals=False)
    for dtype in ("float16", "float32"):
        for text in (SHAPES[0], SHAPES[2]):
            yield Group.parse("forward", text, dtype, methods=("auto", "chunk", "scan"))
    for heads, dim, powers in GROWTH:
        for power in powers:
            yield Group("growth", Shape(1, heads, 2**power, dim, dim), rivals=False)
    for text in CHOICE:
        yield Group.parse("choice", text, rivals=False)


class Lost(Exception):
    """The device's context broke; the text says where."""


@dataclass(eq=False)
class GpuSession(Session):
    """A session on a device, in which every method is credited with the bytes of the memory
    floor."""

    device: Any = None
    slow: float = SLOW_S
    broken: list[str] = field(default_factory=list)  # methods, or "rivals", that are not to be called any more

    def row(self, section: str, method: str, p: Problem, kind: str = "leetcore", **fields: Any) -> Row:
        made = super().row(section, method, p, kind, **fields)
        made.work, made.unit, made.dense_work = made.least_bytes, "bytes", None
        return made

    def measure_group(self, group: Group) -> None:
        s, dtype = group.shape, DTYPES[group.dtype]
        # The comparison with float64 has operands of all heads, also where heads share B and C.
        needed = 12 * Shape.token_bytes(s, dtype.itemsize) + 10 * s.state_bytes()
        decay = "gates" if group.section == "gated" else "alibi"
        if not self.device.fits(needed):
            status = f"skipped: it needs {needed / 2**30:.0f} GiB"
            self.rows.append(Row("auto", "leetcore", s, group.dtype, decay, group.section, status=status))
            return
        p = PROBLEMS.get(group.section, Problem)(s, dtype, decay, self.device.name)
        rows = [self.leetcore_row(group.section, p, method) for method in self.methods(group)]
        if group.rivals and "rivals" not in self.broken:
            rows += self.rival_rows(group.section, p)
            self.require("rivals", group)
        p.__dict__.pop("wanted", None)
        for row in rows:
            if row.call and group.section in ("forward", *PROBLEMS):
                row.host = self.device.host(row.call, HOST_CALLS)
                row.peak_bytes = self.device.peak(row.call)
        self.device.matmul()
        self.measure(rows, ceiling=self.device.copy)
        for row in rows:
            if row.status.startswith("failed"):
                self.require("rivals" if row.kind == "rival" else row.method, group)

    def methods(self, group: Group) -> list[str]:
        names = group.methods or METHODS.get(group.section) or ("auto", *lab.methods(self.device.name))
        return [name for name in names if name not in self.broken and self.wants(name)]

    def leetcore_row(self, section: str, p: Problem, method: str) -> Row:
        """A row that has passed the gate and whose call is not slow; else its status says why."""
        note, seconds = "", 0.0
        if not isinstance(p, SsdProblem):  # the model of costs knows the operator alone
            with contextlib.suppress(NotImplementedError):  # the call says why
                cost = lab.predicted(p, "auto" if method in ("training", "backward", "decode_step") else method)
                note = cost.method if method in ("auto", "training") else ""
                seconds = 1e-6 * cost.microseconds if type(p) is Problem else 0.0
        if seconds > self.slow:
            return self.row(section, method, p, note=note, status=f"skipped: predicted {seconds:.2g} s")
        row = self.leetcore(section, p, method, note=note)
        if row.status.startswith("failed"):
            self.require(method, row)
        if row.call and (took := self.timer.clock(row.call, 1)) > self.slow:
            row.status, row.call = f"skipped: took {took:.2g} s", None
        return row

    def require(self, name: str, where: Any) -> None:
        """Raises Lost, and adds `name` to the broken ones, if the device's context is broken."""
        if self.device.lost():
            self.broken.append(name)
            raise Lost(f"{name} broke the device's context in {where}")


def collected(session: GpuSession, earlier: dict[str, Any], commit: str) -> dict[str, Any]:
    """The file of results, with the rows of processes before this one."""
    results = collect(session, "gpu", HERE, broken=session.broken)
    results["device"] |= earlier.get("device") or session.device.facts()
    if commit:
        results["commit"], results["dirty"] = commit.removesuffix("+"), commit.endswith("+")
    if of.copy(results) is None and earlier.get("ceilings"):  # nothing was measured in this process
        results["ceilings"] = earlier["ceilings"]
    results["rows"] = session.imported + results["rows"]
    results["left_out"] = earlier.get("left_out", []) + results["left_out"]
    results["facts"]["cuda"] = leetcore.build_info()["cuda"]
    results["warnings"] = of.warnings(results)
    return results


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes each file whole or not at all, so that the program may be stopped at any time."""
    of.write(path, results)
    options.write(path.with_suffix(".md"), gpu_report.markdown(results))


def restart(left_s: float) -> None:
    """Restarts this program, as a broken context stays broken in its process; it resumes from the
    written file."""
    again = ["--resume", f"--time-limit={left_s}"]  # the last one of repeated options counts
    os.execv(sys.executable, [sys.executable, *sys.argv, *again])


def run(session: GpuSession, todo: list[Group], save: Callable[[], None], say: Callable[[str], Any]) -> None:
    """Measures group by group.

    Where it raises Lost, a row that says why replaces those of the unfinished group.
    """
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
            name = session.broken[-1]
            kind = "rival" if name == "rivals" else "leetcore"
            status = f"failed: {lost}"
            session.rows.append(Row(name, kind, group.shape, group.dtype, "", group.section, status=status))
            raise
        except Exception as error:  # the other groups are measured still; the report names this one
            session.facts.setdefault("failed", {})[str(group)] = sentence(error)
        session.facts.setdefault("done", []).append(str(group))
        if session.device.lost():
            raise Lost(f"the device's context broke in {group}")
        save()
        wrong = [row.method for row in session.rows[rows:] if row.status.startswith(("wrong", "failed"))]
        say(f"{group}: {len(session.rows) - rows} rows" + (f"; BAD: {', '.join(wrong)}" if wrong else ""))


@click.command()
@click.option("--device", type=click.Choice(list(gpu_device.DEVICES)), default="cuda", show_default=True)
@click.option("--sections", default="", help=f"Comma-separated, of {', '.join(SECTIONS)}.  [default: all]")
@click.option("--methods", default="*", help="Glob of the methods to time, such as 'leetcore*' or 'fla'.")
@click.option("--rounds", type=click.IntRange(min=1), default=ROUNDS, show_default=True, help="Samples per method.")
@click.option("--tiny", is_flag=True, help="A few tiny problems, as a test of the benchmark.")
@click.option("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="Begin nothing after this time.")
@click.option("--commit", default="", help="The commit, where git cannot be asked.")
@click.option("--resume", is_flag=True, help="Add to what OUTPUT has.")
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
    """Time every method of leetcore and its rivals on this GPU, sample by sample in turn, after a
    correctness gate.

    The JSON and its tables (.md) are written after every problem. The exit status is 1 if a method
    was wrong or failed.
    """
    deadline = time.monotonic() + time_limit
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA device")
    if device not in {m.device for m in leetcore.methods()}:
        raise click.ClickException(f"this leetcore has no methods for {device} (cuda: {leetcore.build_info()['cuda']})")
    wanted = options.choose(sections or ",".join(SECTIONS), SECTIONS, "--sections")
    earlier: dict[str, Any] = of.read(output) if resume else {}
    gpu = gpu_device.DEVICES[device]()
    session = GpuSession(
        rounds,
        gpu,
        gpu.timer,
        deadline,
        quick=True,
        pattern=methods,
        device=gpu,
        slow=math.inf if tiny else SLOW_S,
        imported=earlier.get("rows", []),
        facts={k: v for k, v in earlier.get("facts", {}).items() if k != "not reached"},
        broken=earlier.get("broken", []),
    )
    earlier.setdefault("device", gpu.facts())

    def save() -> None:
        write(output, collected(session, earlier, commit))

    done = session.facts.get("done", [])
    todo = [g for g in groups(tiny) if g.section in wanted and str(g) not in done]
    start = time.monotonic()
    try:
        run(session, todo, save, lambda text: click.echo(f"{time.monotonic() - start:6.1f} s  {text}", err=True))
    except Lost as lost:
        click.echo(f"{lost}: resuming in a new process", err=True)
        save()
        restart(deadline - time.monotonic())
    except KeyboardInterrupt:
        click.echo("Interrupted: what was measured so far is kept.", err=True)
    save()
    results = of.read(output)
    click.echo(gpu_report.goals_section(results))
    if bad := gpu_report.bad(results):
        raise click.ClickException(f"wrong or failed: {', '.join(sorted({row['method'] for row in bad}))}")


if __name__ == "__main__":
    main()
