"""Mamba-2 in leetcore and in transformers: errors, and speed.

python bench/mamba2.py errors     # the record mamba2
python bench/mamba2.py speed      # the record mamba2_speed: twelve minutes; --quick: seconds
python bench/pages.py             # fills the pages from both

Errors are those of the operators that a layer calls, against the definition in float64 on the same
rounded inputs: the torch functions of transformers, and leetcore. Prefill is one call. Decoding is
one call per token from a state of zeros, which is float32 in both, as it is in a cache.

`mamba2_speed.py` and `mamba2_models.py` measure the speed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import mamba2_calls as calls
import mamba2_models
import mamba2_speed
import torch
import transformers
from leetcore import reference
from leetcore.bench import machine, options
from leetcore.bench import results as of
from mamba2_calls import DTYPES, Heads, exact

HERE = Path(__file__).parent
GRANITE = Heads(B=1, H=48, N=2048, K=128, V=64)  # of Granite-4-H-tiny
SECTIONS = mamba2_speed.SECTIONS | {"models": mamba2_models.cases}

output_option = click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON.  [default: bench/results]"
)


def errors_of(dtype: str) -> list[dict[str, Any]]:
    given, kind, s = calls.inputs(GRANITE, DTYPES[dtype]), DTYPES[dtype], GRANITE
    want = reference.ssd(**{name: exact(value) for name, value in given.items()}, dt_softplus=True, fast=True)
    prefills = {
        "transformers, prefill": calls.prefill_of_transformers(given),
        "leetcore, prefill": calls.prefill(given),
    }
    rows = []
    for method, call in prefills.items():
        y, state = call()
        rows.append(row(method, dtype, y.to(kind), state, want))
    steps = {"transformers, decoding": calls.their_step, "leetcore, decoding": calls.our_step}
    for method, step in steps.items():
        y, state = torch.empty(1, s.N, s.H, s.V, dtype=kind), torch.zeros(1, s.H, s.V, s.K)
        for t in range(s.N):
            y[:, t] = step(**calls.part(given, t), state=state)
        rows.append(row(method, dtype, y, state, want))
    return rows


def row(method: str, dtype: str, y: Any, state: Any, want: Any) -> dict[str, Any]:
    found = (float(f"{reference.error(exact(a), b):.3g}") for a, b in zip((y, state), want, strict=True))
    return {"method": method, "dtype": dtype, "N": GRANITE.N, "decay": "new layers"} | dict(
        zip(("output", "state"), found, strict=True)
    )


def record(kind: str, output: Path | None) -> Path:
    """The file of a record, which can be written."""
    file = output or HERE / "results" / f"{kind}-{machine.slug(machine.processor())}.json"
    options.require_writable(file)
    return file


@click.group()
def main() -> None:
    """Measure Mamba-2 in leetcore and in transformers."""
    transformers.logging.set_verbosity_error()


@main.command()
@output_option
def errors(output: Path | None) -> None:
    """Measure the errors; write bench/results/mamba2-PROCESSOR.json."""
    file = record("mamba2", output)
    found = [each for dtype in DTYPES for each in errors_of(dtype)]
    shape = {name: getattr(GRANITE, dim) for name, dim in {"H": "H", "P": "V", "K": "K", "G": "G"}.items()}
    facts = {"transformers": transformers.__version__, "shape": shape}
    of.write(file, of.new("mamba2", HERE, errors=found, facts=facts))
    click.echo(file)


@main.command()
@click.option(
    "--minutes",
    type=click.FloatRange(min=0),
    default=12.0,
    show_default=True,
    help="Time to share out over the cases. Each case has at least three samples, even if they take longer.",
)
@click.option("--only", default=",".join(SECTIONS), show_default=True, help="Comma-separated sections.")
@click.option("--quick", is_flag=True, help="One small case of each kind, with three samples: seconds.")
@output_option
def speed(minutes: float, only: str, quick: bool, output: Path | None) -> None:
    """Measure the speed; write bench/results/mamba2_speed-PROCESSOR.json.

    With --quick the file is bench/out/mamba2_speed.json.
    """
    chosen = options.choose(only, SECTIONS, "--only")
    machine.restart_undisturbed()
    machine.commit(HERE)  # is kept: the record is of the commit at the start
    if quick and output is None:
        output = HERE / "out" / "mamba2_speed.json"
        output.parent.mkdir(parents=True, exist_ok=True)
    file = record("mamba2_speed", output)
    cases = [case for name in chosen for case in SECTIONS[name](quick)]
    most = of.FEWEST if quick else mamba2_speed.MOST
    results = mamba2_speed.measure(cases, minutes, most, partial(click.echo, err=True))
    of.write(file, results)
    click.echo(f"{file}. {of.warning(results)}".strip())
    if results["interrupted"]:
        raise click.Abort


@main.command(hidden=True)
@click.argument("method", type=click.Choice(mamba2_speed.MEMORY))
@click.argument("tokens", type=int)
def memory(method: str, tokens: int) -> None:
    """Print the bytes by which a call raises the peak of this process."""
    click.echo(mamba2_speed.memory(method, tokens))


if __name__ == "__main__":
    main()
