"""`leetcore plot`: figures of measurements, fit for print."""

from __future__ import annotations

from pathlib import Path

import click

from .. import files
from . import machine, measurements, options

KINDS = ("time", "speedup", "roofline", "error")
FORMATS = ("png", "svg")


@click.command()
@click.argument("results", nargs=-1, required=True, metavar="RESULTS...", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("."),
    metavar="DIR",
    help="Where to write; made if need be.  [default: here]",
)
@click.option("--kind", default=",".join(KINDS), show_default=True, help="Comma-separated.")
@click.option(
    "--format", "formats", default="png", show_default=True, help=f"Comma-separated, of {', '.join(FORMATS)}."
)
def plot(results: tuple[Path, ...], output: Path, kind: str, formats: str) -> None:
    """Draw RESULTS: files of `leetcore bench --json`, of `leetcore check --json`, or JSON of Google Benchmark.

    time: seconds against N, with fitted powers of N; one figure for each dtype, B, H, K, V and decay with two lengths.
    speedup: times faster than the fastest rival, or than recurrent where there is none. roofline: flop/s against flop
    per byte, under the measured matrix product and copy. error: worst relative errors against the decay.

    Needs matplotlib: `pip install leetcore[plot]`.
    """
    kinds = options.choose(kind, KINDS, "--kind")
    endings = options.choose(formats, FORMATS, "--format")
    if not machine.installed("matplotlib"):
        raise click.ClickException("matplotlib is not installed; `pip install leetcore[plot]` brings it")
    found = measurements.read(list(results))
    from . import figures

    with options.file_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    options.require_writable(output / "figure")
    written = 0
    for name, figure in figures.draw(kinds, found):
        for ending in endings:
            file = output / f"{name}.{ending}"
            with options.file_errors(file), files.replacing(file) as out:
                # No date: the same numbers give the same file.
                figure.savefig(out, format=ending, dpi=200, metadata={"Date": None} if ending == "svg" else None)
            click.echo(file)
            written += 1
    if not written:
        raise click.ClickException(f"nothing to draw of kind {', '.join(kinds)}: time needs two lengths of one problem")
