"""The CPU benchmark of leetcore: `python bench/run.py --help`; bench/README.md says how to read
it."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import click
from leetcore.bench import machine, options
from leetcore.bench import results as of
from leetcore.bench.problems import Shape
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

HERE = Path(__file__).parent
# In order of worth, as time may run out; with the share of the time after which each one ends.
SECTIONS = {
    **{"forward": 0.55, "decode": 0.6, "training": 0.72, "growth": 0.82, "gamma": 1.0, "one_head": 1.0},
    **{"overhead": 1.0, "odd": 1.0, "isa": 1.0, "threads": 1.0, "workspace": 1.0},
}
QUICK = ("forward", "decode", "training", "gamma", "odd", "overhead")


def measure(
    sections: list[str],
    shapes: list[Shape],
    dtypes: list[str],
    rounds: int,
    quick: bool = False,
    methods: str = "*",
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Measures the sections; returns the file of results. `seconds`: nothing is begun later."""
    # Only now, as the program may restart itself before.
    import lab
    import properties
    import sections as tables
    from leetcore.bench.ceilings import Ceilings
    from leetcore.bench.speed import collect
    from peak import FmaPeak

    threads = machine.cores()
    lab.set_threads(threads)
    argv = ["--dtypes", ",".join(dtypes), "--rounds", str(rounds), *(["--quick"] if quick else [])]
    session = lab.Session(
        rounds, Ceilings(threads, ("torch",)), quick=quick, pattern=methods, shapes=shapes, dtypes=dtypes, argv=argv
    )
    peak = FmaPeak(threads)
    peak.measure()
    interrupted = False
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("[dim]{task.completed} steps"))
    begun = time.monotonic()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        session.say = lambda text: progress.update(task, description=text)
        session.tick = lambda: progress.advance(task)
        try:
            for name in sections:
                start = time.monotonic()
                session.deadline = begun + SECTIONS[name] * seconds
                try:
                    getattr(tables if hasattr(tables, name) else properties, name)(session)
                except Exception as error:  # the other sections are measured still; the report names this one
                    session.facts.setdefault("failed", {})[name] = options.sentence(error)
                    console.print_exception()
                peak.measure()
                session.facts.setdefault("took_seconds", {})[name] = round(time.monotonic() - start, 1)
        except KeyboardInterrupt:
            interrupted = True
            console.print("Interrupted: what was measured so far is kept.")
    session.facts |= {"fma_peak": peak.best, "chunk": session.chunk}
    results = collect(session, "cpu", HERE, interrupted=interrupted)
    results["rows"] += session.imported
    return results


@click.command()
@click.option(
    "--shapes", multiple=True, help="B,H,N,K,V of the forward tables; may be repeated.  [default: eight shapes]"
)
@click.option(
    "--dtypes", default="float32,bfloat16", show_default=True, help="Comma-separated: float32, bfloat16, float16."
)
@click.option("--sections", default="", help=f"Comma-separated, of {', '.join(SECTIONS)}.  [default: all]")
@click.option("--methods", default="*", help="Glob of the methods to time, such as 'leetcore*' or 'torch*'.")
@click.option("--rounds", type=click.IntRange(min=0), default=0, help="Samples per method.  [default: 11; 5 if quick]")
@click.option("--quick", is_flag=True, help="Three shapes, fewer sections, variants and rounds: about a minute.")
@click.option("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="Begin nothing after this time.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON; the tables (.md) go next to it."
)
@click.option("--no-report", is_flag=True, help="Write the JSON alone.")
def main(
    shapes: tuple[str, ...],
    dtypes: str,
    sections: str,
    methods: str,
    rounds: int,
    quick: bool,
    time_limit: float,
    output: Path | None,
    no_report: bool,
) -> None:
    """Time leetcore and its rivals on this CPU, in one process, sample by sample in turn."""
    machine.restart_undisturbed()
    import report
    import sections as tables
    from lab import DTYPES

    chosen = options.choose(sections or ",".join(QUICK if quick else SECTIONS), SECTIONS, "--sections")
    kinds = options.choose(dtypes, DTYPES, "--dtypes")
    texts = shapes or (tables.QUICK_SHAPES if quick else tables.SHAPES)
    parsed = options.parsed(texts, Shape.parse, "--shapes")
    file = output or HERE / "out" / ("quick.json" if quick else "cpu.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    options.require_writable(file)
    results = measure(chosen, parsed, kinds, rounds or (5 if quick else 11), quick, methods, time_limit)
    of.write(file, results)
    if not no_report:
        options.write(file.with_suffix(".md"), report.markdown(results))
        Console().print(Markdown(report.goals_section(results)))
        Console(stderr=True).print(f"Written: {file} and {file.with_suffix('.md').name}")
    if results["interrupted"]:
        sys.exit(130)


if __name__ == "__main__":
    main()
