"""`leetcore bench`: times every method whose answer is right, next to what the machine can do."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import rich.progress

import leetcore

from .. import reference
from ..arrays import library_of
from . import machine, options, session, tables
from . import results as results_file
from .ceilings import Ceilings
from .problems import DTYPES, TOLERANCE, Case, Shape, parse_decay, refusal, wrong_kind
from .session import Row, WrongKind, gate
from .timing import Call

SHAPES = ("1,8,256,64,64", "1,8,1024,64,64", "1,8,4096,64,64")
Problem = tuple[Shape, str, str]  # with dtype and decay


def judge(case: Case, want: Any) -> session.Judge:
    """Compares the output of a call with float64; the call may return an array of any library."""

    def judged(call: Call) -> tuple[float, bool]:
        o = call()
        with contextlib.suppress(TypeError):  # wrong_kind names the type
            o = library_of(("o",), o).numpy(o)
        if wrong := wrong_kind("o", o, want.shape, DTYPES[case.dtype]):
            raise WrongKind(wrong)
        error = reference.error(o, want)
        return error, error <= TOLERANCE[case.dtype][0]

    return judged


@dataclass(eq=False)
class Session(session.Session):
    """Methods and rivals on problems of numpy arrays."""

    methods: list[str] = field(default_factory=list)
    rivals: dict[str, Callable[[Any, bool], dict[str, session.Factory]]] = field(default_factory=dict)
    slow: float = math.inf  # seconds of a call that is not sampled

    def run(self, problems: list[Problem]) -> None:
        """Problem by problem; an interrupt leaves the rows that there are."""
        registered = {m.name for m in leetcore.methods() if m.device == "python"}
        for shape, dtype, decay in problems:
            kinds = {m: "registered" if m in registered else "leetcore" for m in self.methods}
            kinds |= dict.fromkeys(self.rivals, "rival")
            case = Case.of(shape, dtype, decay)
            operands = float(shape.token_bytes(np.dtype(DTYPES[dtype]).itemsize))
            rows = [Row(name, kind, shape, dtype, decay, least_bytes=operands) for name, kind in kinds.items()]
            self.rows += rows
            if self.late():
                for row in rows:
                    row.status = "skipped: --time-limit is over"
                continue
            given = case.arguments()
            want, _ = case.expected(given)
            for row in rows:
                (self.prepare_rival if row.kind == "rival" else self.prepare)(row, case, given, want)
                self.tick()
            self.measure(rows)

    def prepare(self, row: Row, case: Case, given: dict[str, Any], want: Any) -> None:
        s, method = row.shape, row.method
        if row.kind == "leetcore":
            per_token = row.decay == "token"
            try:
                row.cost = leetcore.cost(method, **vars(s), dtype=row.dtype, per_token=per_token)
            except NotImplementedError as error:
                row.status = f"refused: {refusal(method, error)}"
                return
            row.work, row.least_bytes = row.cost.flop, row.cost.least_bytes
            if method == "auto":
                row.note = row.cost.method
            if row.cost.microseconds > 1e6 * self.slow:
                row.status = f"skipped: predicted {row.cost.microseconds / 1e6:.2g} s a call (--slow {self.slow:g})"
                return
        self.admit(gate(row, lambda: leetcore.linear_attention(**given, method=method), judge(case, want)))
        if row.cost is not None:
            row.peak_bytes = row.cost.workspace + want.size * given["v"].dtype.itemsize

    def prepare_rival(self, row: Row, case: Case, given: dict[str, Any], want: Any) -> None:
        """Takes the fastest variant whose answer is right."""
        from .rivals import Problem

        def tried(note: str) -> Row:
            return Row(row.method, row.kind, row.shape, row.dtype, row.decay, note=note)

        try:
            factories = self.rivals[row.method](Problem.of(given), True)
            candidates = [(tried(note), factory) for note, factory in factories.items()]
            kept, failed = session.tune(candidates, judge(case, want))
        except (RuntimeError, MemoryError) as error:  # torch raises the former where memory is short
            row.status = f"failed: {options.sentence(error)}"
            return
        for found in (*kept, *failed)[:1]:  # where no variant is right, the first one says why
            row.call, row.status, row.note, row.error, row.took = (
                getattr(found, name) for name in ("call", "status", "note", "error", "took")
            )
        if not kept and not failed:
            row.status = "refused: too large"
        self.admit(row)

    def admit(self, row: Row) -> None:
        """Leaves out a slow row, and measures the memory of a row without a model."""
        if row.call is None:
            return
        if row.took > self.slow:
            row.status, row.call = f"skipped: took {row.took:.2g} s a call (--slow {self.slow:g})", None
        elif row.kind != "leetcore":
            row.peak_bytes = machine.extra_memory(row.call)


def collect(session: session.Session, kind: str, folder: Path | None = None, **content: Any) -> dict[str, Any]:
    """The file of results; folder: the checkout whose commit it names."""
    return results_file.new(
        kind,
        folder,
        rounds=session.rounds,
        ceilings=session.ceilings.to_json(),
        rows=[row.to_json() for row in session.rows],
        facts=session.facts,
        left_out=session.left_out,
        **content,
    )


@click.command()
@click.argument("methods", nargs=-1)
@click.option("--shapes", multiple=True, help=f"B,H,N,K,V; repeat it, or 'A B'.  [default: {' '.join(SHAPES)}]")
@click.option("--dtypes", default="float32", show_default=True, help=f"Comma-separated, of {', '.join(DTYPES)}.")
@click.option(
    "--decays",
    default="alibi",
    show_default=True,
    help="Comma-separated: none, alibi, retnet, a factor from 0 to 1, slope20, mixed, or token (one for each token).",
)
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Samples of each row.")
@click.option("--rivals", is_flag=True, help="Also time torch, chunk by chunk and as the quadratic form.")
@click.option(
    "--slow",
    type=click.FloatRange(min=0),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Skip methods whose call takes longer.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Stop after this time; what was measured is kept.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of leetcore and torch.  [default: one per core]")
@options.output_file("--json", help="Write everything, for `leetcore plot` and --compare.")
@options.output_file("--csv", help="Write the table.")
@options.output_file("--markdown", help="Write the table.")
@click.option(
    "--compare",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="OLD.json",
    help="Compare with an earlier file of results.",
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
    """Time METHODS (default: all; "auto" only if named) on numpy arrays, next to what this machine
    can do.

    Before a method is timed, its output is compared with the definition in float64. A wrong method
    is listed without a time, and the exit status is 1. Samples of all methods are taken in turn, in
    an order that rotates; short calls are repeated for 10 ms. Figures are medians, with the 10th
    and 90th percentiles. Ctrl-C keeps what was measured.

    The floors are least times of a call: "memory floor" that of reading and writing its operands
    once, at the bandwidth of a copy; "compute floor" that of its flop at the rate of a float32
    matrix product of 1024^3. Both rates are measured during the run, by numpy or torch, whichever
    is faster. The flop are those of the method's own cost model; "of matmul" is their rate over
    that of the matrix product before and after each sample. "memory" is what a call needs besides
    its inputs: for leetcore's methods the scratch of the model and the output; for registered
    functions and rivals the growth of the peak of resident memory during one call (Linux only).

    The command restarts itself in an environment (written to --json) in which malloc keeps freed
    memory, so that large temporaries cost no page faults, and idle threads of OpenBLAS do not keep
    cores busy while others are timed.
    """
    machine.restart_undisturbed()
    options.import_first(imported)
    chosen = options.choose_methods(methods, ["auto"])
    kinds = options.choose(dtypes, DTYPES, "--dtypes")
    sizes = options.parsed([text for given in shapes or SHAPES for text in given.split()], Shape.parse, "--shapes")
    rates = options.parsed(options.listed(decays), parse_decay, "--decays")
    options.require_writable(json, csv, markdown)
    old = results_file.read(compare) if compare else None
    if rivals and not machine.installed("torch"):
        raise click.ClickException("--rivals: torch is not installed")
    if threads:
        leetcore.set_num_threads(threads)
    opponents: dict[str, Any] = {}
    if rivals:
        from . import rivals as of_torch

        opponents = dict(of_torch.ALL)
    problems = [(shape, dtype, decay) for shape in sizes for dtype in kinds for decay in rates]
    interrupted = False
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn())
    with (
        np.errstate(all="ignore"),
        rich.progress.Progress(*columns, console=options.console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("timing", total=len(problems) * (len(chosen) + len(opponents) + rounds))
        session = Session(rounds, Ceilings(leetcore.num_threads()), methods=chosen, rivals=opponents, slow=slow)
        session.deadline = time.monotonic() + (time_limit or math.inf)
        session.tick = lambda: bar.advance(task)
        try:
            session.run(problems)
        except KeyboardInterrupt:
            interrupted = True
    results = collect(session, "bench", interrupted=interrupted)
    out = options.console()
    tables.show(results, out)
    if json:
        results_file.write(json, results)
    if csv:
        options.write(csv, tables.csv_text(results))
    if markdown:
        options.write(markdown, tables.markdown(results))
    if old:
        tables.show_comparison(old, results, out)
    if interrupted:
        click.echo("Interrupted: what was measured so far is kept.", err=True)
        sys.exit(130)
    if broken := list(dict.fromkeys(row["method"] for row in results["rows"] if results_file.wrong(row))):
        raise click.ClickException(f"{', '.join(broken)}: wrong or failed")
