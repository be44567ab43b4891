"""How far "auto" is from the best method: `python bench/regret.py -o bench/results/NAME.json`.

Over shapes that the tuning grid does not contain, every method that could be the best is timed, in turn; the regret is
the time of the method that "auto" takes over that of the fastest one, less 1. Times of the same round are compared, and
the median over the rounds counts, so that a machine that is slow for a while is so for all.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import click
import leetcore
import ml_dtypes
import numpy as np
import rich.progress
from leetcore.bench.timing import Call, clock

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
# B, H, K, V; unlike the grid's: other head counts, unequal and odd dims.
SIZES = [(1, 1, 64, 64), (1, 1, 128, 128), (3, 5, 24, 24), (1, 12, 80, 96), (2, 16, 64, 128), (1, 3, 192, 192)]
LENGTHS = (2, 10, 40, 100, 700, 3000, 12000)
MOST_FLOP = 4e10
CANDIDATES = 6.0  # times the least prediction: slower ones are not timed
SAMPLE_S = 0.004


def measure(shape: tuple[int, ...], dtype: str, per_token: bool, rounds: int) -> dict[str, Any]:
    """One row: the choice, and by method medians of microseconds and of the time over that of the choice."""
    B, H, N, K, V = shape
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((B, H, N, K)).astype(DTYPES[dtype]) for _ in range(2))
    v = rng.standard_normal((B, H, N, V)).astype(DTYPES[dtype])
    log_decay = -rng.random((B, H, N), np.float32) if per_token else leetcore.decay.alibi(H)
    out = np.empty_like(v)
    asked = {"B": B, "H": H, "N": N, "K": K, "V": V, "dtype": dtype, "per_token": per_token}
    predicted = {}
    for method in leetcore.methods():
        try:
            predicted[method.name] = leetcore.cost(method.name, **asked).microseconds
        except NotImplementedError:
            continue
    methods = [m for m, us in predicted.items() if us <= CANDIDATES * min(predicted.values())]

    def caller(method: str) -> Call:
        return lambda: leetcore.linear_attention(q, k, v, log_decay, method=method, out=out)

    calls = {m: caller(m) for m in methods}
    reps = {}
    for m, call in calls.items():
        clock(call)
        reps[m] = max(1, round(SAMPLE_S / clock(call)))
    samples = {m: np.empty(rounds) for m in methods}
    for i in range(rounds):
        for m in methods[i % len(methods) :] + methods[: i % len(methods)]:
            samples[m][i] = clock(calls[m], reps[m])
    chosen = leetcore.cost("auto", **asked).method
    us = {m: round(float(np.median(x)) * 1e6, 2) for m, x in samples.items()}
    ratios = {m: round(float(np.median(x / samples[chosen])), 4) for m, x in samples.items()}
    best = min(ratios, key=lambda m: ratios[m])
    regret = round(1 / ratios[best] - 1, 4)
    return asked | {"chosen": chosen, "best": best, "regret": regret, "us": us, "ratios": ratios}


def summary(results: dict[str, Any]) -> str:
    """One sentence."""
    regrets = [r["regret"] for r in results["rows"]]
    near = sum(r <= 0.1 for r in regrets)
    return (
        f"Within 10 % of the best method on {near} of {len(regrets)} shapes ({near / len(regrets):.1%}); "
        f"largest regret {max(regrets):.0%}, median {np.median(regrets):.1%}."
    )


def markdown(results: dict[str, Any]) -> str:
    rows = results["rows"]
    lines = [
        '# How far "auto" is from the best method',
        "",
        f"{results['device']}; leetcore {results['leetcore']}, {results['isa']}, {results['threads']} threads, "
        f"table: {results['tuning']}; {results['date']}. Written by bench/regret.py.",
        "",
        f"**{summary(results)}**",
        "",
        "Regret: time of the chosen method over that of the fastest, less 1; the median over rounds in which all are "
        "timed in turn, calls from Python included. Methods predicted to take over "
        f"{CANDIDATES:g} times the least were not timed.",
        "",
        "| B, H, N, K, V | dtype | decay | chosen | best | us, chosen | us, best | regret |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r["dtype"], r["per_token"], r["K"] * r["V"], r["H"], r["N"])):
        shape = ", ".join(str(r[name]) for name in "BHNKV")
        decay = "per token" if r["per_token"] else "per head"
        regret = f"**{r['regret']:.1%}**" if r["regret"] > 0.1 else f"{r['regret']:.1%}"
        us = r["us"]
        lines.append(
            f"| {shape} | {r['dtype']} | {decay} | {r['chosen']} | {r['best']} | {us[r['chosen']]:.1f} "
            f"| {us[r['best']]:.1f} | {regret} |"
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--rounds", default=15, show_default=True)
def main(output: Path, rounds: int) -> None:
    """Times the methods over the grid; writes the JSON and the table beside it."""
    import machine

    device = machine.device()
    cases = []
    for (B, H, K, V), N in itertools.product(SIZES, LENGTHS):
        if leetcore.cost("chunk", B=B, H=H, N=N, K=K, V=V).flop > MOST_FLOP:
            continue
        cases.append(((B, H, N, K, V), "float32", False))
        if N in (10, 100, 3000):
            cases.append(((B, H, N, K, V), "bfloat16", False))
        if N in (40, 700):
            cases += [((B, H, N, K, V), "float32", True), ((B, H, N, K, V), "float64", False)]
    info = leetcore.build_info()
    results = {
        "device": device["cpu"],
        "date": time.strftime("%Y-%m-%d"),
        "commit": machine.commit(),
        "leetcore": info["version"],
        "isa": info["isa"],
        "threads": info["threads"],
        "tuning": leetcore.tuning.source.rsplit("/", 1)[-1],
        "rows": [measure(*case, rounds) for case in rich.progress.track(cases)],
    }
    output.write_text(json.dumps(results, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(results))
    print(summary(results))


if __name__ == "__main__":
    main()
