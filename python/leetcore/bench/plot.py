"""`leetcore plot`: draws measurements as figures for print."""

from __future__ import annotations

from pathlib import Path

import click

from .. import files
from . import machine, measurements, options

KINDS = ("time", "throughput", "speedup", "roofline", "error")
FORMATS = ("png", "svg")


@click.command()
@click.argument("results", nargs=-1, required=True, metavar="RESULTS...", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("."),
    metavar="DIR",
    help="Where to write; the directory is made if need be.  [default: the current directory]",
)
@click.option("--kind", default=",".join(KINDS), show_default=True, help="Comma-separated.")
@click.option("--methods", default="", help="Comma-separated: draw these alone.  [default: all in the files]")
@click.option(
    "--format", "formats", default="png", show_default=True, help=f"Comma-separated, of {', '.join(FORMATS)}."
)
def plot(results: tuple[Path, ...], output: Path, kind: str, methods: str, formats: str) -> None:
    """Draw RESULTS: files that leetcore's benchmarks and checks wrote (--json), or JSON of Google
    Benchmark.

    time: seconds against N, with fitted powers of N; one figure for each dtype, B, H, K, V and
    decay that was measured at two lengths. throughput: tokens per second against N, likewise.
    speedup: time of the fastest rival, or of recurrent where there is none, over the time of each
    method. roofline: flop/s against flop per byte, with the measured matrix product and copy.
    error: worst relative errors against the decay. Figures of times show the floors: the least time
    by the bytes of the operands and by the flop of the method that has the fewest.

    Needs matplotlib: `pip install leetcore[plot]`.
    """
    kinds = options.choose(kind, KINDS, "--kind")
    endings = options.choose(formats, FORMATS, "--format")
    if not machine.installed("matplotlib"):
        raise click.ClickException("matplotlib is not installed; `pip install leetcore[plot]` brings it")
    found = measurements.read(list(results))
    if methods:
        known = dict.fromkeys([*(t.method for t in found.timings), *(e.method for e in found.errors)])
        chosen = [name.strip() for name in methods.split(",")]
        found.only([name for name in chosen if options.choose_one(name, known, "--methods")])
    from . import figures

    with options.file_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    options.require_writable(output / "figure")
    written = 0
    for name, figure in figures.draw(kinds, found):
        for ending in endings:
            file = output / f"{name}.{ending}"
            with options.file_errors(file), files.replacing(file) as out:
                # Without a date, the same numbers give the same file.
                figure.savefig(out, format=ending, dpi=200, metadata={"Date": None} if ending == "svg" else None)
            click.echo(file)
            written += 1
    if not written:
        raise click.ClickException(f"nothing to draw of kind {', '.join(kinds)}: time needs two lengths of one problem")
