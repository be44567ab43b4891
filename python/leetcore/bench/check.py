"""`leetcore check`: every method against the definition in float64, on problems made to break
it."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import rich.box
import rich.markup
import rich.progress
import rich.table

import leetcore

from .. import arrays, reference
from ..options import Layout
from . import options
from . import results as results_file
from .problems import DECAYS, DTYPES, TOLERANCE, Case, refusal, wrong_kind

LENGTHS = {"quick": (1, 64, 65, 500), "default": (1, 2, 63, 64, 65, 127, 500, 1000)}
LENGTHS["full"] = (*LENGTHS["default"], 8192)
DIMS = (16, 80, 1, 64, 33, 128)  # neighbours differ much
LAYOUTS: tuple[Layout, ...] = ("bhnd", "bnhd")
HEADS = ((2, 2, 2), (4, 2, 1), (1, 4, 2), (4, 1, 1))  # of q, k, v
SHOWN = 5  # misses of a method that are printed; the file has all of them
WHAT = ("output", "state")


def grid(dtypes: list[str], level: str) -> Iterator[Case]:
    """Lengths x decays, dims x dims, and features x features; the other fields take turns."""
    for dtype in dtypes:
        for (i, N), (j, decay) in itertools.product(enumerate(LENGTHS[level]), enumerate(DECAYS)):
            turn = i + j
            K, V = DIMS[turn % 6], DIMS[(i + 2 * j + 1) % 6]
            # A single product of three numbers can be too small for float16 to hold.
            yield Case(N, max(K, 16) if N < 3 else K, V, dtype, decay, 1 + turn % 2, state=turn % 3 > 0)
        if level != "quick":
            for (i, K), (j, V) in itertools.product(enumerate(DIMS), repeat=2):
                for N in (100,) if level == "default" else (100, 65, 500):
                    yield Case(N, K, V, dtype, ("mixed", "token")[(i + j) % 2], state=True)
        for heads, layout, packed, state, decay in itertools.product(
            HEADS, LAYOUTS, (False, True), (False, True), ("mixed", "token")
        ):
            N = 127 if level != "quick" else 65
            bounds = (0, 0, N // 3, N) if packed else None  # the first sequence is empty
            yield Case(N, 33, 16, dtype, decay, 1 if packed else 2, heads, state, layout, bounds)


@dataclass(frozen=True)
class Miss:
    """A wrong result; text: the error and its tolerance, or a sentence."""

    method: str
    case: Case
    text: str


@dataclass(eq=False)
class Findings:
    """Worst errors [output, state] by (method, dtype, decay), refusals by (method, reason), and
    misses."""

    worst: dict[tuple[str, str, str], list[float | None]] = field(default_factory=dict)
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    misses: list[Miss] = field(default_factory=list)
    interrupted: bool = False

    def add(self, method: str, case: Case, errors: list[float | None]) -> None:
        """errors: of output and state; None where there is no state."""
        key = (method, case.dtype, case.decay)
        old = self.worst.setdefault(key, [None, None])
        pairs = zip(old, errors, strict=True)
        self.worst[key] = [max((x for x in pair if x is not None), default=None) for pair in pairs]
        self.counts[key] += 1
        for what, error, tolerance in zip(WHAT, errors, TOLERANCE[case.dtype], strict=True):
            if error is not None and error > tolerance:
                found = "values that are not finite" if math.isinf(error) else f"error {error:.2e}"
                self.misses.append(Miss(method, case, f"{what}: {found}, allowed {tolerance:.0e}"))

    @property
    def exact(self) -> bool:
        """Whether some results are not rounded to 16 bits."""
        return any("16" not in dtype for _, dtype, _ in self.worst)

    def select(self, method: str, dtype: str | None = None, decay: str | None = None) -> list[tuple[str, list[Any]]]:
        """The worst errors as (dtype, [output, state])."""
        wanted = (method, dtype, decay)
        return [
            (key[1], errors)
            for key, errors in self.worst.items()
            if all(want in (None, have) for want, have in zip(wanted, key, strict=True))
        ]


@contextlib.contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Fills arrays that leetcore allocates for results with NaN, so that an element that is never
    written shows."""
    empty = arrays.NumPy.empty

    def poisoned(self: Any, shape: Any, like: Any, float_bits: int) -> Any:
        array = empty(self, shape, like, float_bits)
        array[...] = np.nan
        return array

    arrays.NumPy.empty = poisoned  # type: ignore[method-assign]
    try:
        yield
    finally:
        arrays.NumPy.empty = empty  # type: ignore[method-assign]


def examine(method: str, case: Case, given: dict[str, Any], want: tuple[Any, Any], found: Findings) -> None:
    """One method on one problem."""
    dtype = DTYPES[case.dtype]

    def call(states: bool) -> tuple[Any, Any]:
        out = np.full(want[0].shape, np.nan, dtype)
        got = leetcore.linear_attention(**given, method=method, return_state=states, out=out)
        return got if states else (got, None)

    try:
        try:
            o, state = call(True)
        except NotImplementedError:
            if case.state:
                raise
            o, state = call(False)  # the method may refuse the state alone
    except NotImplementedError as error:
        found.refused[method, refusal(method, error)] += 1
        return
    except Exception as error:  # a method's failure is a finding; the other methods are examined still
        found.misses.append(Miss(method, case, options.sentence(error)))
        return
    errors: list[float | None] = []
    for what, got, expected, kind in zip(WHAT, (o, state), want, (dtype, case.state_dtype), strict=True):
        if what == "state" and got is None:
            errors.append(None)
        elif wrong := wrong_kind(what, got, expected.shape, kind):
            found.misses.append(Miss(method, case, wrong))
            errors.append(None)
        else:
            errors.append(reference.error(got, expected))
    found.add(method, case, errors)


def run(
    methods: list[str], cases: list[Case], tick: Callable[[], Any] = lambda: None, found: Findings | None = None
) -> Findings:
    """Examines every method on every case; an interrupt ends it with the findings so far.

    found: earlier findings, to which the new ones are added.
    """
    found = found or Findings()
    try:
        with unwritten_is_nan(), np.errstate(all="ignore"):
            for case in cases:
                given = case.arguments()
                want = case.expected(given)
                for method in methods:
                    examine(method, case, given, want, found)
                tick()
    except KeyboardInterrupt:
        found.interrupted = True
    return found


# ---- output --------------------------------------------------------------------------------------


def _cell(text: str, missed: bool) -> str:
    return f"[bold red]{text} ![/]" if missed else text


def by_dtype(found: Findings, methods: list[str], dtypes: list[str]) -> rich.table.Table:
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, title="Worst relative error (Frobenius) against float64", title_justify="left"
    )
    table.add_column("method")
    for dtype, what in itertools.product(dtypes, WHAT):
        limit = TOLERANCE[dtype][WHAT.index(what)]
        table.add_column(f"{dtype}\n{what}\n<= {limit:.0e}", justify="right")
    for name in ("problems", "refused", "missed"):
        table.add_column(name, justify="right")
    for method in methods:
        cells = []
        for dtype, i in itertools.product(dtypes, (0, 1)):
            errors = [e[i] for _, e in found.select(method, dtype) if e[i] is not None]
            worst = max(errors, default=None)
            cells.append("-" if worst is None else _cell(f"{worst:.1e}", worst > TOLERANCE[dtype][i]))
        served = sum(n for key, n in found.counts.items() if key[0] == method)
        refused = sum(n for key, n in found.refused.items() if key[0] == method)
        missed = len({miss.case for miss in found.misses if miss.method == method})
        table.add_row(method, *cells, str(served), str(refused or "-"), _cell(str(missed), True) if missed else "-")
    return table


_BY_DECAY = "By decay: worst error / tolerance (float16 and bfloat16, whose errors are rounding, only where they miss)"


def by_decay(found: Findings, methods: list[str]) -> rich.table.Table:
    decays = [decay for decay in DECAYS if any(key[2] == decay for key in found.worst)]
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=_BY_DECAY, title_justify="left")
    table.add_column("method")
    for decay in decays:
        table.add_column(decay, justify="right")
    for method in methods:
        cells = []
        for decay in decays:
            fractions = [
                error / allowed
                for dtype, errors in found.select(method, decay=decay)
                for error, allowed in zip(errors, TOLERANCE[dtype], strict=True)
                if error is not None and (error > allowed or "16" not in dtype or not found.exact)
            ]
            worst = max(fractions, default=None)
            cells.append("-" if worst is None else _cell(f"{worst:.2g}", worst > 1))
        table.add_row(method, *cells)
    return table


def show(found: Findings, methods: list[str], dtypes: list[str]) -> None:
    out = options.console()
    out.print(by_dtype(found, methods, dtypes))
    out.print(by_decay(found, methods))
    for (method, why), count in found.refused.items():
        out.print(f"{method} refused {count} problems: {rich.markup.escape(why)}")
    for method in methods:
        misses = [miss for miss in found.misses if miss.method == method]
        for miss in misses[:SHOWN]:
            text = rich.markup.escape(f"{method}: {miss.text}\n    {miss.case}")
            out.print(f"[bold red]MISS[/] {text}", soft_wrap=True)
        if len(misses) > SHOWN:
            out.print(f"[bold red]MISS[/] {method}: {len(misses) - SHOWN} more")


def to_json(found: Findings, methods: list[str], level: str, folder: Path | None = None) -> dict[str, Any]:
    """The file of results; folder: the checkout whose commit it names."""

    def number(x: float | None) -> float | None:
        return float(f"{x:.4g}") if x is not None and math.isfinite(x) else None

    return results_file.new(
        "check",
        folder,
        grid=level,
        interrupted=found.interrupted,
        methods=methods,
        tolerance={dtype: dict(zip(WHAT, both, strict=True)) for dtype, both in TOLERANCE.items()},
        errors=[
            {
                "method": method,
                "dtype": dtype,
                "N": None,
                "decay": decay,
                "problems": found.counts[method, dtype, decay],
            }
            | {what: number(error) for what, error in zip(WHAT, errors, strict=True)}
            for (method, dtype, decay), errors in found.worst.items()
        ],
        refused=[{"method": m, "why": why, "problems": n} for (m, why), n in found.refused.items()],
        misses=[{"method": m.method, "what": m.text, "problem": str(m.case)} for m in found.misses],
    )


@click.command()
@click.argument("methods", nargs=-1)
@click.option(
    "--dtypes", default="", help=f"Comma-separated, of {', '.join(DTYPES)}.  [default: all; float32,bfloat16 if quick]"
)
@click.option("--quick", "level", flag_value="quick", help="Fewer lengths and dtypes: a few seconds.")
@click.option("--full", "level", flag_value="full", help="Also 8192 tokens and more sizes: minutes.")
@options.output_file("--json", help="Write the findings, for `leetcore plot`.")
@options.imports
def check(
    methods: tuple[str, ...], dtypes: str, level: str | None, json: Path | None, imported: tuple[str, ...]
) -> None:
    """Compare METHODS (default: all) with the definition in float64, on problems made to break
    them.

    The problems have lengths around the sizes of chunks, odd and unequal dims, decays from 0 to 1
    and slopes up to 20, one decay for all heads, for each head and for each token, initial states,
    packed sequences, grouped heads and both layouts. The tables show the worst relative errors. A
    method may refuse a problem; refusals are counted and explained. The exit status is 1 if an
    error exceeds its tolerance, a value is not finite, a shape or dtype is wrong, or a method
    raises an exception.

    A problem with a wrong result is printed as a Python expression, Case(...). To repeat it: `from
    leetcore.bench.problems import Case`, then leetcore.linear_attention(**Case(...).arguments(),
    method=...).
    """
    options.import_first(imported)
    chosen = options.choose_methods(methods)
    level = level or "default"
    kinds = options.choose(dtypes or ("float32,bfloat16" if level == "quick" else ",".join(DTYPES)), DTYPES, "--dtypes")
    options.require_writable(json)
    cases = list(grid(kinds, level))
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
    with rich.progress.Progress(*columns, console=options.console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking", total=len(cases))
        found = run(chosen, cases, lambda: bar.advance(task))
    show(found, chosen, kinds)
    if json:
        results_file.write(json, to_json(found, chosen, level))
    if found.interrupted:
        click.echo("Interrupted: the findings so far are shown.", err=True)
        sys.exit(130)
    if found.misses:
        missed = list(dict.fromkeys(miss.method for miss in found.misses))
        raise click.ClickException(f"{', '.join(missed)}: wrong on {len({m.case for m in found.misses})} problems")
