"""Mamba-2 in leetcore and in transformers: errors, and speed.

python bench/mamba2.py errors     # the record mamba2
python bench/mamba2.py speed      # the record mamba2_speed: twelve minutes; --quick: half a minute
python bench/pages.py             # fills the pages from both
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
from leetcore.bench import machine, options
from leetcore.bench import results as of

HERE = Path(__file__).parent

output_option = click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON.  [default: bench/results]"
)


def record(kind: str, output: Path | None) -> Path:
    """The file of a record; raises ClickException where it cannot be written."""
    file = output or HERE / "results" / f"{kind}-{machine.slug(machine.processor())}.json"
    options.require_writable(file)
    return file


@click.group()
def main() -> None:
    """Measure Mamba-2 in leetcore and in transformers."""


@main.command()
@output_option
def errors(output: Path | None) -> None:
    """Measure the errors; write bench/results/mamba2-PROCESSOR.json."""
    import mamba2_errors

    file = record("mamba2", output)
    of.write(file, mamba2_errors.measure())
    click.echo(file)


@main.command()
@click.option(
    "--minutes",
    type=click.FloatRange(min=0),
    default=12.0,
    show_default=True,
    help="Time to share out over the cases. Each case has at least three samples, even if they take longer.",
)
@click.option("--only", default="", help="Comma-separated, of prefill, decoding, convolution, models.  [default: all]")
@click.option("--quick", is_flag=True, help="One small case of each kind, with three samples.")
@output_option
def speed(minutes: float, only: str, quick: bool, output: Path | None) -> None:
    """Measure the speed; write bench/results/mamba2_speed-PROCESSOR.json.

    With --quick the file is bench/out/mamba2_speed.json.
    """
    machine.restart_undisturbed()
    # Only now, as the program may restart itself before.
    import mamba2_models
    import mamba2_speed

    sections = mamba2_speed.SECTIONS | {"models": mamba2_models.cases}
    chosen = options.choose(only or ",".join(sections), sections, "--only")
    machine.commit(HERE)  # is kept: the record is of the commit at the start
    if quick and output is None:
        output = HERE / "out" / "mamba2_speed.json"
        output.parent.mkdir(parents=True, exist_ok=True)
    file = record("mamba2_speed", output)
    cases = [case for name in chosen for case in sections[name](quick)]
    most = of.FEWEST if quick else mamba2_speed.MOST
    results = mamba2_speed.measure(cases, minutes, most, partial(click.echo, err=True))
    of.write(file, results)
    click.echo(f"{file}. {of.warning(results)}".strip())
    if results["interrupted"]:
        raise click.Abort


@main.command(hidden=True)
@click.argument("method")
@click.argument("tokens", type=int)
def memory(method: str, tokens: int) -> None:
    """Print the bytes by which a call raises the peak of this process."""
    import mamba2_speed

    click.echo(mamba2_speed.memory(method, tokens))


if __name__ == "__main__":
    main()
