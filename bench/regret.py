"""How far "auto" is from the best method: `python bench/regret.py -o FILE.json`.

On shapes that the tuning grid does not contain, every method that may be the best is timed in turn
with the others. The regret is the time of the method that "auto" takes over that of the fastest
method, less 1. Times of the same round are compared, and the median over the rounds counts, so that
a slow moment of the machine slows all methods alike.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import leetcore
import numpy as np
import rich.progress
from leetcore.bench import machine, options, tables
from leetcore.bench import results as of
from leetcore.bench.ceilings import Ceilings
from leetcore.bench.problems import Case, Shape
from leetcore.bench.session import Row, Session
from leetcore.bench.speed import collect
from leetcore.bench.timing import Timer, clock, interleave

HERE = Path(__file__).parent
# B, H, K, V that differ from the grid's: other head counts, unequal and odd dims.
SIZES = [(1, 1, 64, 64), (1, 1, 128, 128), (3, 5, 24, 24), (1, 12, 80, 96), (2, 16, 64, 128), (1, 3, 192, 192)]
LENGTHS = (100, 3000, 10, 700, 40, 12000, 2)  # in order of worth, as time may run out
MOST_FLOP = 4e10
CANDIDATES = 6.0  # methods predicted to take more than this many times the least prediction are not timed
SAMPLE_S = 0.004


def cases() -> Iterator[tuple[Shape, str, str]]:
    """Shape, dtype, decay."""
    for N, (B, H, K, V) in itertools.product(LENGTHS, SIZES):
        shape = Shape(B, H, N, K, V)
        if leetcore.cost("chunk", **vars(shape)).flop > MOST_FLOP:
            continue
        yield shape, "float32", "alibi"
        if N in (10, 100, 3000):
            yield shape, "bfloat16", "alibi"
        if N in (40, 700):
            yield shape, "float32", "token"
            yield shape, "float64", "alibi"


def measure(session: Session, shape: Shape, dtype: str, decay: str) -> None:
    """Adds a row for each candidate, and the choice and its regret to the facts."""
    given = Case.of(shape, dtype, decay).arguments()
    out = np.empty_like(given["v"])
    rows: dict[str, Row] = {}
    for method in leetcore.methods():
        try:
            cost = leetcore.cost(method.name, **vars(shape), dtype=dtype, per_token=decay == "token")
        except NotImplementedError:
            continue
        rows[method.name] = Row(method.name, "leetcore", shape, dtype, decay, "regret", cost=cost, work=cost.flop)
    least = min(row.cost.microseconds for row in rows.values())
    rows = {name: row for name, row in rows.items() if row.cost.microseconds <= CANDIDATES * least}
    for name, row in rows.items():
        row.call = lambda name=name: leetcore.linear_attention(**given, method=name, out=out)
        clock(row.call)
    # The samples share one ceiling, since only rows of the same round are compared.
    matmul, copy = session.ceilings.matmul(), session.ceilings.copy()
    timer = Timer(clock, SAMPLE_S, 0.0)
    interleave(list(rows.values()), session.rounds, lambda: matmul, lambda: copy, timer=timer)
    chosen = leetcore.cost("auto", **vars(shape), dtype=dtype, per_token=decay == "token").method
    ratios = {
        name: float(np.median([a / b for a, b in zip(row.seconds, rows[chosen].seconds, strict=False)]))
        for name, row in rows.items()
    }
    best = min(ratios, key=lambda name: ratios[name])
    problem = {**vars(shape), "dtype": dtype, "decay": decay}
    found = problem | {"chosen": chosen, "best": best, "regret": round(1 / ratios[best] - 1, 4)}
    session.facts.setdefault("choices", []).append(found)
    session.rows += rows.values()
    for row in rows.values():
        row.call = None


def run(rounds: int, seconds: float = math.inf) -> dict[str, Any]:
    """The file of results; nothing is begun after `seconds`."""
    session = Session(rounds, Ceilings(leetcore.num_threads()), deadline=time.monotonic() + seconds)
    interrupted = False
    try:
        for shape, dtype, decay in rich.progress.track(list(cases()), "regret"):
            if session.late():
                session.facts.setdefault("not reached", []).append(f"{shape} {dtype} {decay}")
            else:
                measure(session, shape, dtype, decay)
    except KeyboardInterrupt:
        interrupted = True
    return collect(session, "regret", HERE, interrupted=interrupted)


def summary(results: dict[str, Any]) -> str:
    """One sentence."""
    regrets = [choice["regret"] for choice in results["facts"]["choices"]]
    near = sum(regret <= 0.1 for regret in regrets)
    return (
        f"Within 10 % of the best method on {near} of {len(regrets)} problems ({near / len(regrets):.1%}); "
        f"largest regret {max(regrets):.0%}, median {np.median(regrets):.1%}."
    )


def table(results: dict[str, Any], least: float = -1.0) -> str:
    """Problems with a regret above `least`."""
    rows = {(*of.problem(row)[1:], row["method"]): row for row in results["rows"]}
    body = []
    for c in sorted(
        results["facts"]["choices"], key=lambda c: (c["dtype"], c["decay"], c["K"] * c["V"], c["H"], c["N"])
    ):
        problem = (of.shape(c), c["dtype"], c["decay"])
        chosen, best = (rows[(*problem, c[name])] for name in ("chosen", "best"))
        times = [tables.duration(row["seconds"]["median"]) for row in (chosen, best)]
        floors = [tables.duration(x) for x in of.floors(results, chosen)]
        regret = f"**{c['regret']:.1%}**" if c["regret"] > 0.1 else f"{c['regret']:.1%}"
        if c["regret"] > least:
            names = [f"`{c['chosen']}`", times[0], f"`{c['best']}`", times[1]]
            body.append([",".join(map(str, of.shape(c))), c["dtype"], c["decay"], *names, *floors, regret])
    head = ["B,H,N,K,V", "dtype", "decay", "chosen", "time", "best", "time", "memory floor", "compute floor", "regret"]
    return tables.markdown_table(head, body)


def markdown(results: dict[str, Any]) -> str:
    return (
        f'# How far "auto" is from the best method\n\n{of.origin(results)}\n\n**{summary(results)}**\n\n'
        "Regret: time of the chosen method over that of the fastest method, less 1; the median over rounds in which all"
        " methods are timed in turn, with calls from Python. Methods predicted to take more than"
        f" {CANDIDATES:g} times the least prediction were not timed.\n\n{table(results)}\n"
    )


@click.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="JSON.")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Samples per method.")
@click.option("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="Begin nothing after this time.")
def main(output: Path, rounds: int, time_limit: float) -> None:
    """Time the methods on the grid; write the JSON and its table (.md)."""
    machine.restart_undisturbed()
    options.require_writable(output)
    results = run(rounds, time_limit)
    of.write(output, results)
    if results["facts"].get("choices"):
        options.write(output.with_suffix(".md"), markdown(results))
        click.echo(summary(results))


if __name__ == "__main__":
    main()
