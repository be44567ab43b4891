"""Measures the errors in docs/accuracy.md: `python bench/accuracy.py`, some ten minutes; then
`python bench/pages.py`.

Every method is compared with the float64 reference on the same rounded inputs, by decay, dtype and
length, with one head for each decay. Decoding is measured with states in float32 and in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import leetcore
import numpy as np
import rich.progress
from leetcore import reference
from leetcore.bench import machine, options
from leetcore.bench import results as of
from leetcore.bench.problems import DTYPES

HERE = Path(__file__).parent
DECAYS = {  # name in files: name in tables, log_decay
    "1": ("gamma = 1", 0.0),
    "0.999999": ("1 - 1e-6", float(np.log1p(-1e-6))),
    "0.9999": ("0.9999", float(np.log(0.9999))),
    "0.99": ("0.99", float(np.log(0.99))),
    "0.9": ("0.9", float(np.log(0.9))),
    "0.5": ("0.5", float(np.log(0.5))),
    "slope20": ("slope 20", -20.0),
    "0": ("gamma = 0", -np.inf),
}
LOG_DECAYS = np.array([log_decay for _, log_decay in DECAYS.values()], np.float32)
LENGTHS = (64, 1024, 8192, 131072)
LONGEST_F64 = 8192  # of float64 inputs, as longer ones show nothing more
STEPS = (16, 256, 4096)
D = 16

Errors = list[dict[str, Any]]


def inputs(N: int, dtype: str, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, len(DECAYS), N, D), np.float32).astype(DTYPES[dtype]) for _ in range(3)]


def by_head(output: tuple[Any, Any], state: tuple[Any, Any] | None = None, **fields: Any) -> Errors:
    """A row for each decay, that is for each head, from (result, reference) of output and state."""

    def error(pair: tuple[Any, Any] | None, h: int) -> float | None:
        return None if pair is None else float(f"{reference.error(pair[0][:, h], pair[1][:, h]):.3g}")

    return [fields | {"decay": d, "output": error(output, h), "state": error(state, h)} for h, d in enumerate(DECAYS)]


def prefill(N: int, dtype: str, tick: Callable[[], Any]) -> Errors:
    """Errors of the output and of the final state of every method."""
    q, k, v = inputs(N, dtype)
    want, want_state = reference.linear_attention(q, k, v, LOG_DECAYS, fast=True)
    rows: Errors = []
    for method in leetcore.methods():
        o, state = leetcore.linear_attention(q, k, v, LOG_DECAYS, method=method.name, return_state=True)
        rows += by_head((o, want), (state, want_state), method=method.name, dtype=dtype, N=N)
        tick()
    return rows


def decoding(states: str) -> Errors:
    """Errors of the last 16 outputs after each number of steps, with float32 inputs and states of a
    dtype."""
    q, k, v = inputs(max(STEPS), "float32", seed=1)
    want, _ = reference.linear_attention(q, k, v, LOG_DECAYS, fast=True)
    state = np.zeros((1, len(DECAYS), D, D), DTYPES[states])
    o = np.empty_like(v)
    for t in range(max(STEPS)):
        o[:, :, t] = leetcore.decode_step(q[:, :, t], k[:, :, t], v[:, :, t], state, LOG_DECAYS)
    rows: Errors = []
    for n in STEPS:
        last = (o[:, :, n - 16 : n], want[:, :, n - 16 : n])
        rows += by_head(last, method=f"decode_step, {states} states", states=states, dtype="float32", N=n)
    return rows


def measure() -> dict[str, Any]:
    cases = [(N, d) for d in DTYPES for N in LENGTHS if d != "float64" or N <= LONGEST_F64]
    errors: Errors = []
    with rich.progress.Progress(*rich.progress.Progress.get_default_columns()) as bar:
        task = bar.add_task("measuring", total=len(cases) * len(leetcore.methods()))
        for N, dtype in cases:
            errors += prefill(N, dtype, lambda: bar.advance(task))
    for states in ("float32", "float16", "bfloat16"):
        errors += decoding(states)
    return of.new("accuracy", HERE, errors=errors, facts={"decays": {name: text for name, (text, _) in DECAYS.items()}})


@click.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON.  [default: bench/results]")
def main(output: Path | None) -> None:
    """Measure the errors; write bench/results/accuracy-PROCESSOR.json."""
    file = output or HERE / "results" / f"accuracy-{machine.slug(machine.processor())}.json"
    options.require_writable(file)
    of.write(file, measure())
    click.echo(file)


if __name__ == "__main__":
    main()
