"""Measures the errors in docs/accuracy.md: `python bench/accuracy.py` (some ten minutes), `--only-pages` from the JSON.

Every method against the float64 reference on the same rounded inputs, by decay, dtype and length, one head for each
decay; and decoding with states kept in 16 bits.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import leetcore
import ml_dtypes
import numpy as np
import pages
import rich.progress
from leetcore import reference

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DECAYS = {  # name: log_decay
    "gamma = 1": 0.0,
    "1 - 1e-6": float(np.log1p(-1e-6)),
    "0.9999": float(np.log(0.9999)),
    "0.99": float(np.log(0.99)),
    "0.9": float(np.log(0.9)),
    "0.5": float(np.log(0.5)),
    "slope 20": -20.0,
    "gamma = 0": -np.inf,
}
LENGTHS = (64, 1024, 8192, 131072)
LONGEST_F64 = 8192  # of float64 inputs, whose error shows nothing more
STEPS = (16, 256, 4096)
D = 16
RESULTS = Path(__file__).parent / "results" / "accuracy.json"


def per_head(got: Any, want: Any) -> list[float]:
    return [reference.error(got[:, h], want[:, h]) for h in range(want.shape[1])]


def inputs(N: int, dtype: str, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, len(DECAYS), N, D), np.float32).astype(DTYPES[dtype]) for _ in range(3)]


def prefill(N: int, dtype: str, tick: Any) -> list[dict[str, Any]]:
    """Relative errors of o and of the final state, for each method a list by decay."""
    q, k, v = inputs(N, dtype)
    decay = np.array(list(DECAYS.values()), np.float32)
    want, want_state = reference.linear_attention(q, k, v, decay, fast=True)
    rows = []
    for method in leetcore.methods():
        o, state = leetcore.linear_attention(q, k, v, decay, method=method.name, return_state=True)
        errors = {"o": per_head(o, want), "state": per_head(state, want_state)}
        rows.append({"method": method.name, "dtype": dtype, "N": N} | errors)
        tick()
    return rows


def decoding(pool: str) -> list[dict[str, Any]]:
    """Errors of the outputs of the last 16 of so many steps, with float32 inputs and a pool of this dtype."""
    q, k, v = inputs(max(STEPS), "float32", seed=1)
    decay = np.array(list(DECAYS.values()), np.float32)
    want, _ = reference.linear_attention(q, k, v, decay, fast=True)
    state = np.zeros((1, len(DECAYS), D, D), DTYPES[pool])
    o = np.empty_like(v)
    for t in range(max(STEPS)):
        o[:, :, t] = leetcore.decode_step(q[:, :, t], k[:, :, t], v[:, :, t], state, decay)
    last = [slice(n - 16, n) for n in STEPS]
    return [{"pool": pool, "steps": s.stop, "o": per_head(o[:, :, s], want[:, :, s])} for s in last]


def measure() -> dict[str, Any]:
    cases = [(N, d) for d in DTYPES for N in LENGTHS if d != "float64" or N <= LONGEST_F64]
    info = leetcore.build_info()
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "leetcore": info["version"],
        "isa": info["isa"],
        "decays": list(DECAYS),
        "prefill": [],
        "decode": [],
    }
    with rich.progress.Progress(*rich.progress.Progress.get_default_columns()) as bar:
        task = bar.add_task("measuring", total=len(cases) * len(leetcore.methods()))
        for N, dtype in cases:
            results["prefill"] += prefill(N, dtype, lambda: bar.advance(task))
    for pool in ("float32", "float16", "bfloat16"):
        results["decode"] += decoding(pool)
    return results


def write_pages(results: dict[str, Any]) -> None:
    def shown(x: float) -> str:
        return f"{x:.1e}"

    rows, decays = results["prefill"], results["decays"]
    columns = [("float32", N) for N in LENGTHS]
    columns += [(d, max(r["N"] for r in rows if r["dtype"] == d)) for d in ("float64", "float16", "bfloat16")]
    for what in ("o", "state"):
        worst = {(r["method"], r["dtype"], r["N"]): max(r[what]) for r in rows}
        methods = dict.fromkeys(r["method"] for r in rows)
        body = [[f"`{m}`", *(shown(worst[(m, *c)]) for c in columns)] for m in methods]
        pages.fill("accuracy.md", f"worst {what}", pages.table(["method", *(f"{d}, {N}" for d, N in columns)], body))
    for N in (8192, max(LENGTHS)):
        body = [[f"`{r['method']}`", *map(shown, r["o"])] for r in rows if r["dtype"] == "float32" and r["N"] == N]
        pages.fill("accuracy.md", f"decays {N}", pages.table(["method", *decays], body))
    body = [[r["pool"], str(r["steps"]), *map(shown, r["o"])] for r in results["decode"]]
    pages.fill("accuracy.md", "decode", pages.table(["states", "after steps", *decays], body))
    text = (
        f"leetcore {results['leetcore']}, instruction set {results['isa']}, {results['date']}, by `bench/accuracy.py`."
    )
    pages.fill("accuracy.md", "conditions", text)


@click.command()
@click.option("--only-pages", is_flag=True, help="Write docs/accuracy.md from the JSON that is there.")
def main(only_pages: bool) -> None:
    """Measures, writes bench/results/accuracy.json and the tables of docs/accuracy.md."""
    if not only_pages:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    write_pages(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
