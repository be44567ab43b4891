"""The CPU benchmark of leetcore: `python bench/run.py --help`; how to read it is in bench/README.md."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import machine
from leetcore.bench.machine import ENVIRONMENT, restart_undisturbed
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from session import Session

TABLES = ("forward", "decode", "isa")
PROPERTIES = ("gamma", "odd", "growth", "one_head", "threads", "overhead", "workspace")
QUICK = ("forward", "decode", "gamma", "odd", "overhead")


def listed(text: str) -> list[str]:
    return [part for part in text.replace(",", " ").split() if part]


def collect(session: Session, peak: float | None, interrupted: bool) -> dict[str, Any]:
    """All that is written: conditions, every row that got anywhere, facts."""
    import leetcore
    import ours
    from harness import stats

    versions = {"python": sys.version.split()[0], "leetcore": leetcore.__version__}
    for name in ("torch", "numpy", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": machine.commit(),
        "device": machine.device(),
        "versions": versions,
        "leetcore": {key: leetcore.build_info()[key] for key in ("compiler", "isa", "isas")},
        "environment": {name: os.environ.get(name, "") for name in ENVIRONMENT},
        "threads": ours.available_threads(),
        "chunk": session.chunk,
        "fma_peak": peak,
        "matmul": stats(session.ceilings.matmul_rates),
        "interrupted": interrupted,
        "rows": [row.to_json() for row in session.rows] + session.imported,
        "facts": session.facts,
        "left_out": session.left_out,
    }


@click.command()
@click.option(
    "--shapes", multiple=True, help="B,H,N,K,V of the forward tables; repeat for more. Default: eight shapes."
)
@click.option(
    "--dtypes", default="float32,bfloat16", show_default=True, help="float32, bfloat16, float16; comma-separated."
)
@click.option("--sections", default="", help=f"Comma-separated, of: {', '.join(TABLES + PROPERTIES)}. Default: all.")
@click.option("--methods", default="*", help="Glob of the methods to time, e.g. 'leetcore*' or 'torch*'.")
@click.option("--rounds", default=0, help="Samples per method. Default: 11, or 5 with --quick.")
@click.option("--quick", is_flag=True, help="Three shapes, fewer sections, candidates and rounds: under a minute.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON; the .md goes beside it.")
@click.option("--no-report", is_flag=True, help="Write the JSON alone.")
def main(
    shapes: tuple[str, ...],
    dtypes: str,
    sections: str,
    methods: str,
    rounds: int,
    quick: bool,
    output: Path | None,
    no_report: bool,
) -> None:
    """Times leetcore against its rivals on this CPU, in one process, sample by sample in turn."""
    restart_undisturbed()
    # Only now: torch need not be loaded twice.
    import ours
    import properties
    import report
    import sections as tables
    from harness import DTYPES, Shape
    from session import Session

    chosen = listed(sections) or list(QUICK if quick else TABLES + PROPERTIES)
    for name in chosen:
        if name not in TABLES + PROPERTIES:
            raise click.BadParameter(f"{name!r}: allowed are {', '.join(TABLES + PROPERTIES)}", param_hint="--sections")
    for name in listed(dtypes):
        if name not in DTYPES:
            raise click.BadParameter(f"{name!r}: allowed are {', '.join(DTYPES)}", param_hint="--dtypes")
    try:
        parsed = [Shape.parse(text) for text in shapes or (tables.QUICK_SHAPES if quick else tables.SHAPES)]
    except ValueError as e:
        raise click.BadParameter(str(e), param_hint="--shapes") from e
    rounds = rounds or (5 if quick else 11)
    ours.set_threads(ours.available_threads())
    session = Session(
        shapes=parsed,
        decode_shapes=[Shape.parse(text) for text in tables.DECODE_SHAPES],
        dtypes=listed(dtypes),
        rounds=rounds,
        quick=quick,
        pattern=methods,
        argv=["--dtypes", dtypes, "--rounds", str(rounds), *(["--quick"] if quick else [])],
    )
    peak = machine.FmaPeak(ours.available_threads())
    peak.measure()
    interrupted = False
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("[dim]{task.completed} steps"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        session.say = lambda text: progress.update(task, description=text)
        session.tick = lambda: progress.advance(task)
        try:
            for name in chosen:
                start = time.monotonic()
                try:
                    getattr(tables if name in TABLES else properties, name)(session)
                except Exception as e:  # the other sections are worth having; the report names this one
                    session.facts.setdefault("failed", {})[name] = f"{type(e).__name__}: {e}"
                    console.print_exception()
                peak.measure()
                session.facts.setdefault("took_s", {})[name] = round(time.monotonic() - start, 1)
        except KeyboardInterrupt:
            interrupted = True
            console.print("Interrupted: what was measured so far is kept.")

    results = collect(session, peak.best, interrupted)
    if output is None:
        output = machine.HERE / "results" / ("quick.json" if quick else "cpu.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    if not no_report:
        output.with_suffix(".md").write_text(report.markdown(results))
        Console().print(Markdown(report.goals_section(results)))
        console.print(f"Written: {output} and {output.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
