"""`leetcore tune`: measures this machine, so that "auto" chooses by what is fast on it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import rich.console
import rich.progress

import leetcore

from .. import tuning
from . import options

# The grid. Factors between its points are interpolated, in the logarithms.
LENGTHS = (1, 4, 16, 32, 64, 256, 1024, 4096, 16384)
DIMS = (8, 16, 32, 64, 128, 256)  # sqrt(K V)
STATES = (1, 4)  # states per thread; the grid also has a single state
DTYPES = {2: np.float16, 4: np.float32, 8: np.float64}  # by size in bytes
CANDIDATES = 4.0  # methods predicted to take more than this many times the fastest are not measured
LONGEST_US = 4e4  # problems that take longer get the factors of their neighbours in N
SAMPLE_S, ROUNDS, PASSES = 0.002, 3, 2


@dataclass(frozen=True)
class Point:
    """One problem of the grid."""

    bytes: int
    N: int
    D: int
    states: int


def states_axis(threads: int) -> list[int]:
    return sorted({1, *(s * threads for s in STATES)})


def points(threads: int) -> Iterator[Point]:
    for size, N, D, states in itertools.product(DTYPES, LENGTHS, DIMS, states_axis(threads)):
        yield Point(size, N, D, states)


def candidates(p: Point) -> dict[str, float]:
    """Predicted microseconds, without correction, of the methods worth measuring."""
    dtype = np.dtype(DTYPES[p.bytes]).name
    predicted = {}
    for method in leetcore.methods():
        if method.device == "cpu":
            predicted[method.name] = leetcore.cost(method.name, H=p.states, N=p.N, K=p.D, dtype=dtype).microseconds
    least = min(predicted.values())
    if least > LONGEST_US:
        return {}
    return {name: us for name, us in predicted.items() if us <= CANDIDATES * least}


def measure(p: Point, methods: list[str]) -> dict[str, float]:
    """Microseconds of a call by each method: the least of samples taken in turn, as other programs
    may run too."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, p.states, p.N, p.D)).astype(DTYPES[p.bytes]) for _ in range(3))
    decay = leetcore.decay.alibi(p.states)
    out = np.empty_like(v)

    def call(method: str, times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            leetcore.linear_attention(q, k, v, decay, method=method, out=out)
        return (time.perf_counter() - start) / times

    times = {}
    for method in methods:
        call(method, 1)
        times[method] = max(1, round(SAMPLE_S / call(method, 1)))
    samples: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(ROUNDS):
        for method in methods:
            samples[method].append(call(method, times[method]) * 1e6)
    return {method: min(x) for method, x in samples.items()}


def table(threads: int, isa: str, progress: Callable[[], Any]) -> str:
    """Measures the whole grid; returns the table that leetcore reads (grammar: cpp/tuning.cpp)."""
    tuning.use("")  # predictions without correction
    best: dict[tuple[str, Point], float] = {}
    try:
        predicted = {p: candidates(p) for p in points(threads)}
        # Several passes over the whole grid, so that a machine that is slow for some seconds does
        # no harm.
        for p in [p for _ in range(PASSES) for p in predicted]:
            for method, us in measure(p, list(predicted[p])).items():
                best[method, p] = min(us, best.get((method, p), us))
            progress()
    finally:
        tuning.use(None)
        tuning.load(isa)
    overhead = 0.9 * min(best.values())  # of a call from Python, whatever the method
    factors: dict[tuple[str, int], dict[Point, float]] = {}
    for (method, p), us in best.items():
        factors.setdefault((method, p.bytes), {})[p] = max(us - overhead, 0.05 * us) / predicted[p][method]
    lines = [
        tuning.header(),
        f"# {threads} threads, {time.strftime('%Y-%m-%d')}",
        f"isa {isa}",
        f"axis N {' '.join(map(str, LENGTHS))}",
        f"axis D {' '.join(map(str, DIMS))}",
        f"axis states {' '.join(f'{s / threads:g}' for s in states_axis(threads))}",
    ]
    for (method, size), known in factors.items():
        values = [f"{known[p]:.3g}" if p in known else "-" for p in points(threads) if p.bytes == size]
        lines.append(f"factor {method} {size} {' '.join(values)}")
    return tuning.completed("\n".join(lines) + "\n")


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the table.  [default: the cache directory]",
)
@click.option("--forget", is_flag=True, help="Remove this machine's table and measure nothing.")
def tune(output: Path | None, forget: bool) -> None:
    """Measure this machine, so that "auto" chooses the methods that are fast on it.

    This takes a minute or two; the machine should be quiet. The table is written to the user's
    cache directory, where every later process finds it. `leetcore.tuning.use(open(FILE).read())`
    uses a table that -o has put elsewhere.
    """
    try:
        isa, threads = leetcore.build_info()["isa"], leetcore.num_threads()
    except RuntimeError as error:  # a wrong variable of the environment
        raise click.ClickException(str(error)) from None
    file = output or tuning.path(isa)
    if file is None:
        raise click.ClickException("there is no home directory; name a file with -o, or set XDG_CACHE_HOME")
    if forget:
        with options.file_errors(file):
            file.unlink(missing_ok=True)
        click.echo(f"{file}: removed")
        return
    if not output:
        with options.file_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
    options.require_writable(file)
    total = sum(1 for _ in points(threads))
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=PASSES * total)
        text = table(threads, isa, lambda: bar.advance(task))
    options.write(file, text)
    click.echo(f"{file}: {total} problems measured with {threads} threads, instruction set {isa}")
