"""Mamba-2 models of transformers with and without patch(): errors, and speed.

python bench/mamba2.py errors     # the record in docs/mamba2.md; then python bench/pages.py
python bench/mamba2.py speed      # tables on the terminal; --quick for fewer and shorter calls

Errors are those of the operators that a layer calls, against the definition in float64 on the same
rounded inputs: the torch functions of transformers, and leetcore. Prefill is one call. Decoding is
one call per token from a state of zeros, which is float32 in both, as it is in a cache.

For the speed, the two models take turns in one process. A ratio is the median of the ratios of
neighbouring samples.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from leetcore import reference
from leetcore.bench import machine, options
from leetcore.bench import results as of
from leetcore.torch import ssd, ssd_step
from leetcore.torch.integrations.transformers import patch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2 as theirs

HERE = Path(__file__).parent
H, P, K, G, N = 48, 64, 128, 1, 2048  # of Granite-4-H-tiny
CHUNK = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---- errors


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs of unit variance. Step sizes are about log-uniform from 0.001 to 0.1, as in new
    layers.
    """
    torch.manual_seed(0)
    step = torch.exp(torch.empty(H).uniform_(-6.9, -2.3))
    given = {
        "x": torch.randn(1, N, H, P),
        "dt": torch.randn(1, N, H),
        "A": -torch.empty(H).uniform_(1, 16),
        "B": torch.randn(1, N, G, K),
        "C": torch.randn(1, N, G, K),
        "D": torch.ones(H),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
    }
    return {name: value if name == "A" else value.to(dtype) for name, value in given.items()}


def their_step(x: Any, dt: Any, A: Any, B: Any, C: Any, state: Any, D: Any, dt_bias: Any) -> Any:
    """The step of transformers, with arguments as its layers give them."""
    heads = {"dt": dt[..., None].expand(-1, -1, P), "A": A[:, None, None].expand(-1, P, K)}
    D, dt_bias = (value[:, None].expand(-1, P) for value in (D, dt_bias))
    return theirs.mamba2_selective_state_update(state, x, **heads, B=B, C=C, D=D, dt_bias=dt_bias, dt_softplus=True)


def our_step(x: Any, dt: Any, A: Any, B: Any, C: Any, state: Any, D: Any, dt_bias: Any) -> Any:
    return ssd_step(x, dt, A, B, C, state, D, dt_bias=dt_bias, dt_softplus=True)


def errors_of(dtype: str) -> list[dict[str, Any]]:
    given, kind = inputs(DTYPES[dtype]), DTYPES[dtype]
    want = reference.ssd(**{n: t.double().numpy() for n, t in given.items()}, dt_softplus=True, fast=True)
    prefills = {
        "transformers, prefill": lambda: theirs.mamba2_chunk_scan(
            **given_to_transformers(given), chunk_size=CHUNK, dt_softplus=True, return_final_states=True
        ),
        "leetcore, prefill": lambda: ssd(**given, dt_softplus=True, return_state=True),
    }
    rows = []
    for method, call in prefills.items():
        y, state = call()
        rows.append(row(method, dtype, y.to(kind), state, want))
    for method, step in {"transformers, decoding": their_step, "leetcore, decoding": our_step}.items():
        y, state = torch.empty(1, N, H, P, dtype=kind), torch.zeros(1, H, P, K)
        for t in range(N):
            token = [given[name][:, t] for name in ("x", "dt")]
            y[:, t] = step(*token, given["A"], given["B"][:, t], given["C"][:, t], state, given["D"], given["dt_bias"])
        rows.append(row(method, dtype, y, state, want))
    return rows


def given_to_transformers(given: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_states" if name == "x" else name: value for name, value in given.items()}


def row(method: str, dtype: str, y: Any, state: Any, want: Any) -> dict[str, Any]:
    found = (float(f"{reference.error(a.double().numpy(), b):.3g}") for a, b in zip((y, state), want, strict=True))
    return {"method": method, "dtype": dtype, "N": N, "decay": "new layers"} | dict(
        zip(("output", "state"), found, strict=True)
    )


# ---- speed


def small(groups: int = 1) -> Any:
    """Mamba-2 with 4 layers of 32 heads of 64, state 128."""
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=1000,
        hidden_size=1024,
        num_heads=32,
        head_dim=64,
        state_size=128,
        n_groups=groups,
        num_hidden_layers=4,
        chunk_size=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return Mamba2ForCausalLM(config).eval()


def compare(table: Table, name: str, call: Callable[[Any], Any], models: list[Any], rounds: int) -> None:
    """Adds a row: milliseconds of a call of both models, and the median of their ratios."""
    times: list[list[float]] = [[], []]
    for at in range(rounds + 1):
        for taken, model in zip(times, models, strict=True):
            start = time.perf_counter()
            call(model)
            if at:  # the first call warms up
                taken.append(time.perf_counter() - start)
    one, other = (1e3 * statistics.median(taken) for taken in times)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    table.add_row(name, f"{one:.1f}", f"{other:.1f}", f"{ratio:.2f}")


def train(model: Any, ids: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    model.eval()


def speeds(dtype: str, quick: bool) -> Table:
    table = Table(title=f"Mamba-2, 4 layers of 32 heads of 64, state 128, {dtype}; ms")
    for heading in ("", "transformers", "patched", "times faster"):
        table.add_column(heading, justify="right" if heading else "left")
    original = small().to(DTYPES[dtype])
    patched = copy.deepcopy(original)
    patch(patched)
    models, rounds = [original, patched], 2 if quick else 5
    for length in (128, 512) if quick else (128, 512, 2048):
        ids = torch.randint(0, 1000, (1, length))
        with torch.inference_mode():
            compare(table, f"prefill of {length} tokens", lambda m, ids=ids: m(ids, use_cache=True), models, rounds)
    for batch in (1, 16):
        ids = torch.randint(0, 1000, (batch, 8))
        with torch.inference_mode():
            caches = {m: DynamicCache(config=m.config) for m in models}
            for model, cache in caches.items():
                model(ids, use_cache=True, cache=cache)

            def step(model: Any, ids: torch.Tensor = ids, caches: Any = caches) -> None:
                for _ in range(8):
                    model(ids[:, :1], use_cache=True, cache=caches[model])

            compare(table, f"8 tokens, batch {batch}", step, models, 2 * rounds)
    ids = torch.randint(0, 1000, (1, 128 if quick else 512))
    compare(table, f"training step of {ids.shape[1]} tokens", lambda m: train(m, ids), models, rounds)
    return table


@click.group()
def main() -> None:
    """Measure Mamba-2 models of transformers with and without patch()."""
    transformers.logging.set_verbosity_error()


@main.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON.  [default: bench/results]")
def errors(output: Path | None) -> None:
    """Measure the errors; write bench/results/mamba2-PROCESSOR.json."""
    file = output or HERE / "results" / f"mamba2-{machine.slug(machine.processor())}.json"
    options.require_writable(file)
    found = [each for dtype in DTYPES for each in errors_of(dtype)]
    facts = {"transformers": transformers.__version__, "shape": {"H": H, "P": P, "K": K, "G": G}}
    of.write(file, of.new("mamba2", HERE, errors=found, facts=facts))
    click.echo(file)


@main.command()
@click.option("--quick", is_flag=True, help="Fewer and shorter calls.")
def speed(quick: bool) -> None:
    """Print the times of prefill, decoding and training."""
    for dtype in DTYPES:
        Console().print(speeds(dtype, quick))


if __name__ == "__main__":
    main()
