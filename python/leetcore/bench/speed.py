"""`leetcore bench`: every method timed, beside what the machine can do, after its answer was found to be right."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import rich.progress

import leetcore

from .. import reference
from ..arrays import library_of
from . import machine, options, tables
from .ceilings import Ceilings
from .problems import DTYPES, TOLERANCE, Case, Shape, parse_decay, refusal, wrong_kind
from .timing import Call, clock, interleave, stats

SHAPES = ("1,8,256,64,64", "1,8,1024,64,64", "1,8,4096,64,64")


@dataclass(eq=False)
class Row:
    """One method on one problem. status: ok, WRONG, or "failed", "refused", "skipped" with ": why"."""

    method: str
    kind: str  # leetcore, registered or rival
    shape: Shape
    dtype: str
    decay: str
    call: Call | None = None
    status: str = "ok"
    note: str = ""
    error: float | None = None  # of the output
    cost: Any = None  # leetcore.Cost, where there is a model
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)  # flop/s of the matrix products before and after
    copy: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        flop = None if self.cost is None else self.cost.flop
        status = "skipped: not reached" if self.status == "ok" and not self.seconds else self.status
        model = {} if self.cost is None else self.cost._asdict()
        return {
            **{name: getattr(self, name) for name in ("method", "kind", "dtype", "decay", "note", "peak_bytes")},
            **vars(self.shape),
            "status": status,
            "error": self.error if self.error is not None and math.isfinite(self.error) else None,
            **{name: model.get(name) for name in ("flop", "least_bytes", "bytes", "workspace", "microseconds")},
            "seconds": stats(self.seconds),
            "rate": flop and stats(flop / t for t in self.seconds),
            "fraction": flop and stats(flop / t / c for t, c in zip(self.seconds, self.beside, strict=True)),
            "samples": self.seconds,
            "beside": self.beside,
        }


def gate(row: Row, call: Call, case: Case, want: Any) -> float:
    """Runs a call for the first time, and fills the row's status and error; returns the seconds that it took."""
    start = time.perf_counter()
    try:
        o = call()
    except NotImplementedError as error:
        row.status = f"refused: {refusal(row.method, error)}"
        return 0.0
    except Exception as error:  # the others are timed still
        row.status = f"failed: {options.sentence(error)}"
        return 0.0
    took = time.perf_counter() - start
    with contextlib.suppress(TypeError):  # wrong_kind says so
        o = library_of(("o",), o).numpy(o)
    if wrong := wrong_kind("o", o, want.shape, DTYPES[case.dtype]):
        row.status = f"failed: {wrong}"
        return took
    row.error = reference.error(o, want)
    if row.error <= TOLERANCE[case.dtype][0]:
        row.call = call
    else:
        row.status, row.note = "WRONG", "" if math.isfinite(row.error) else "values that are not finite"
    return took


@dataclass(eq=False)
class Session:
    """What was asked for, and what was measured so far."""

    methods: list[str]
    problems: list[tuple[Shape, str, str]]
    rounds: int
    rivals: dict[str, Callable[[dict[str, Any]], Iterator[tuple[str, Call]]]]
    slow: float  # seconds a call
    ceilings: Ceilings
    deadline: float = math.inf
    tick: Call = lambda: None
    rows: list[Row] = field(default_factory=list)

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def run(self) -> None:
        """Problem by problem; an interrupt leaves the rows that there are."""
        registered = {m.name for m in leetcore.methods() if m.device == "python"}
        for shape, dtype, decay in self.problems:
            rows = [
                Row(m, "registered" if m in registered else "leetcore", shape, dtype, decay) for m in self.methods
            ] + [Row(name, "rival", shape, dtype, decay) for name in self.rivals]
            self.rows += rows
            if self.late():
                for row in rows:
                    row.status = "skipped: --time-limit is over"
                continue
            case = Case.of(shape, dtype, decay)
            given = case.arguments()
            want, _ = case.expected(given)
            for row in rows:
                (self.prepare_rival if row.kind == "rival" else self.prepare)(row, case, given, want)
                self.tick()
            interleave(rows, self.rounds, self.ceilings.matmul, self.ceilings.round, self.tick, self.late)
            for row in rows:
                row.call = None  # frees what it holds

    def prepare(self, row: Row, case: Case, given: dict[str, Any], want: Any) -> None:
        s, method = row.shape, row.method
        if row.kind == "leetcore":
            try:
                row.cost = leetcore.cost(
                    method, B=s.B, H=s.H, N=s.N, K=s.K, V=s.V, dtype=row.dtype, per_token=row.decay == "token"
                )
            except NotImplementedError as error:
                row.status = f"refused: {refusal(method, error)}"
                return
            if method == "auto":
                row.note = row.cost.method
            if row.cost.microseconds > 1e6 * self.slow:
                row.status = f"skipped: predicted {row.cost.microseconds / 1e6:.2g} s a call (--slow {self.slow:g})"
                return
        self.admit(row, gate(row, lambda: leetcore.linear_attention(**given, method=method), case, want))
        if row.cost is not None:
            row.peak_bytes = row.cost.workspace + want.size * given["v"].dtype.itemsize

    def prepare_rival(self, row: Row, case: Case, given: dict[str, Any], want: Any) -> None:
        """The fastest of its variants that is right."""
        best, took = Row(row.method, row.kind, row.shape, row.dtype, row.decay, status="refused: too large"), math.inf
        try:
            for note, call in self.rivals[row.method](given):
                tried = Row(row.method, row.kind, row.shape, row.dtype, row.decay, note=note)
                seconds = gate(tried, call, case, want)
                if tried.call:
                    seconds = min(clock(call), clock(call)) if seconds < self.slow else seconds
                if tried.call is None and best.call is None:
                    best = tried  # if nothing else: why it is not in the table
                elif tried.call and seconds < took:
                    best, took = tried, seconds
        except (RuntimeError, MemoryError) as error:  # torch's word for no memory
            best.status = best.status if best.call else f"failed: {options.sentence(error)}"
        row.call, row.status, row.note, row.error = best.call, best.status, best.note, best.error
        self.admit(row, took if row.call else 0.0)

    def admit(self, row: Row, took: float) -> None:
        """Leaves out what is slow, and measures the memory of what has no model."""
        if row.call is None:
            return
        if took > self.slow:
            row.status, row.call = f"skipped: took {took:.2g} s a call (--slow {self.slow:g})", None
        elif row.kind != "leetcore":
            row.peak_bytes = machine.extra_memory(row.call)


def collect(session: Session, rounds: int, interrupted: bool) -> dict[str, Any]:
    """The file of results; `tables` has its schema's name and version."""
    return {
        "schema": tables.SCHEMA,
        "version": tables.VERSION,
        **machine.conditions(),
        "rounds": rounds,
        "interrupted": interrupted,
        "ceilings": session.ceilings.to_json(),
        "rows": [row.to_json() for row in session.rows],
    }


@click.command()
@click.argument("methods", nargs=-1)
@click.option("--shapes", multiple=True, help=f"B,H,N,K,V; repeat it, or 'A B'.  [default: {' '.join(SHAPES)}]")
@click.option("--dtypes", default="float32", show_default=True, help=f"Comma-separated, of {', '.join(DTYPES)}.")
@click.option(
    "--decays",
    default="alibi",
    show_default=True,
    help="Comma-separated: none, alibi, retnet, a factor from 0 to 1, slope20, mixed, or token (one for each).",
)
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Samples of each row.")
@click.option("--rivals", is_flag=True, help="Also torch, chunk by chunk and as the quadratic form.")
@click.option(
    "--slow", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Skip calls of so many seconds."
)
@click.option("--time-limit", type=click.FloatRange(min=0), help="Stop after so many seconds, with what is there.")
@click.option("--threads", type=click.IntRange(min=1), help="Of leetcore and torch.  [default: one per core]")
@options.output_file("--json", help="Write everything, for `leetcore plot` and --compare.")
@options.output_file("--csv", help="Write the table.")
@options.output_file("--markdown", help="Write the table.")
@click.option(
    "--compare", type=click.Path(dir_okay=False, path_type=Path), metavar="OLD.json", help="Beside an earlier --json."
)
@options.imports
def bench(
    methods: tuple[str, ...],
    shapes: tuple[str, ...],
    dtypes: str,
    decays: str,
    rounds: int,
    rivals: bool,
    slow: float,
    time_limit: float | None,
    threads: int | None,
    json: Path | None,
    csv: Path | None,
    markdown: Path | None,
    compare: Path | None,
    imported: tuple[str, ...],
) -> None:
    """Time METHODS (default: all; "auto" too if named) on numpy arrays, beside what this machine can do.

    A method's output is first compared with the definition in float64: one that is wrong is listed so, without a speed,
    and the exit status is 1. Samples of all methods are taken in turn, in an order that rotates; short calls are
    repeated for 10 ms. Figures are medians, with the 10th and 90th percentile. Ctrl-C keeps what was measured.

    "of matmul" is the rate (flop of the method's own cost model) over that of a float32 matrix product of 1024^3 by
    numpy or torch, whichever is faster, measured before and after each sample. "memory" is what a call needs besides
    its inputs: for leetcore's methods the scratch of its model and the output; for registered functions and rivals by
    how much one call raised the peak of resident memory, after freed memory was given back (Linux only).

    It starts itself anew in an environment (written to --json) in which malloc keeps freed memory, so that large
    temporaries cost no page faults, and idle threads of OpenBLAS do not keep cores busy while others are timed.
    """
    machine.restart_undisturbed()
    options.import_first(imported)
    chosen = options.choose_methods(methods, ["auto"])
    kinds = options.choose(dtypes, DTYPES, "--dtypes")
    sizes = options.parsed([text for given in shapes or SHAPES for text in given.split()], Shape.parse, "--shapes")
    rates = options.parsed(options.listed(decays), parse_decay, "--decays")
    options.require_writable(json, csv, markdown)
    old = tables.read(compare) if compare else None
    if rivals and not machine.installed("torch"):
        raise click.ClickException("--rivals: torch is not installed")
    if threads:
        leetcore.set_num_threads(threads)
    opponents = {}
    if rivals:
        from . import rivals as of_torch

        opponents = of_torch.ALL
    problems = [(shape, dtype, decay) for shape in sizes for dtype in kinds for decay in rates]
    interrupted = False
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn())
    with (
        np.errstate(all="ignore"),
        rich.progress.Progress(*columns, console=options.console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("timing", total=len(problems) * (len(chosen) + len(opponents) + rounds))
        session = Session(chosen, problems, rounds, opponents, slow, Ceilings(leetcore.num_threads()))
        session.deadline = time.monotonic() + (time_limit or math.inf)
        session.tick = lambda: bar.advance(task)
        try:
            session.run()
        except KeyboardInterrupt:
            interrupted = True
    results = collect(session, rounds, interrupted)
    out = options.console()
    tables.show(results, out)
    if json:
        options.write_json(json, results)
    if csv:
        options.write(csv, tables.csv_text(results))
    if markdown:
        options.write(markdown, tables.markdown(results))
    if old:
        tables.show_comparison(old, results, out)
    if interrupted:
        click.echo("Interrupted: this is what was measured so far.", err=True)
        sys.exit(130)
    if broken := list(dict.fromkeys(r.method for r in session.rows if r.status.startswith(("WRONG", "failed")))):
        raise click.ClickException(f"{', '.join(broken)}: wrong or failed")
