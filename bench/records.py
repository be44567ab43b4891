"""Measures all records that the pages of docs/ quote: `python bench/records.py --minutes 15`.

The records are bench/results/KIND-PROCESSOR.json, in the format of `leetcore.bench.results`. Each
is written as soon as it is measured. `python bench/pages.py` then fills the pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import leetcore
import numpy as np
import rich.progress
from leetcore.bench import check, machine, options, speed
from leetcore.bench import results as of
from leetcore.bench.problems import DTYPES, Shape

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# Heads of the record "growth", each at N = 1, 4, ..., 16384; the first one is drawn.
HEADS = ("1,8,{},64,64", "1,8,{},128,128", "1,1,{},64,64", "1,8,{},16,16", "1,8,{},32,32", "1,8,{},256,256")
LENGTHS = tuple(4**i for i in range(8))


def cpu(seconds: float) -> dict[str, Any]:
    import run
    import sections

    shapes = [Shape.parse(text) for text in sections.SHAPES]
    return run.measure(list(run.SECTIONS), shapes, ["float32", "bfloat16"], 9, seconds=seconds)


def growth(seconds: float) -> dict[str, Any]:
    """Every method at every length; as `leetcore bench` measures it."""
    methods = [m.name for m in leetcore.methods() if m.device == "cpu"]
    problems = [(Shape.parse(heads.format(N)), "float32", "alibi") for heads in HEADS for N in LENGTHS]
    deadline = time.monotonic() + seconds
    session = speed.Session(7, speed.Ceilings(leetcore.num_threads()), deadline=deadline, methods=methods, slow=2.5)
    interrupted = False
    with np.errstate(all="ignore"):
        try:
            for problem in rich.progress.track(problems, "growth"):
                session.run([problem])
        except KeyboardInterrupt:
            interrupted = True
    return speed.collect(session, "growth", HERE, interrupted=interrupted)


def regret(seconds: float) -> dict[str, Any]:
    import regret

    return regret.run(15, seconds)


def checked(seconds: float) -> dict[str, Any]:
    """`leetcore check` on as many of its cases as there is time for, spread over the grid."""
    cases = list(check.grid(list(DTYPES), "default"))
    methods = options.choose_methods(())
    end, order = time.monotonic() + seconds, np.random.default_rng(0).permutation(len(cases))
    found = check.Findings()
    for part in rich.progress.track([order[i : i + 8] for i in range(0, len(order), 8)], "check"):
        if time.monotonic() > end:
            break
        check.run(methods, [cases[i] for i in part], found=found)
        if found.interrupted:
            break
    return check.to_json(found, methods, "default", HERE)


RECORDS: dict[str, tuple[float, Callable[[float], dict[str, Any]]]] = {  # share of the time, how to measure
    "cpu": (0.55, cpu),
    "growth": (0.25, growth),
    "regret": (0.1, regret),
    "check": (0.1, checked),
}


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0), default=15.0, show_default=True, help="Time for all records.")
@click.option("--records", default=",".join(RECORDS), show_default=True, help="Comma-separated.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="bench/results",
    help="Where to write.",
)
def main(minutes: float, records: str, output: Path) -> None:
    """Measure the records that the pages quote, on a quiet machine and a clean commit.

    A record that was measured otherwise says so, and so does every table made of it.
    """
    chosen = options.choose(records, RECORDS, "--records")
    machine.restart_undisturbed()
    output.mkdir(parents=True, exist_ok=True)
    machine.commit(HERE)  # is kept: the records are of the commit at the start
    name = machine.slug(machine.processor())
    shares = {record: RECORDS[record][0] for record in chosen}
    for record, share in shares.items():
        start = time.monotonic()
        results = RECORDS[record][1](60 * minutes * share / sum(shares.values()))
        file = output / f"{record}-{name}.json"
        of.write(file, results)
        click.echo(f"{file}: {time.monotonic() - start:.0f} s. {of.warning(results)}".strip())
        if record == "cpu":
            import report

            options.write(file.with_suffix(".md"), report.markdown(results))
        if results["interrupted"]:
            raise click.Abort


if __name__ == "__main__":
    main()
