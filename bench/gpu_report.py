"""The markdown of the GPU benchmark: tables, growth, regret, goals. `python bench/gpu_report.py FILE.json` makes it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from goals import Results, Row, find, goal, ms
from leetcore.bench.measurements import fitted_power
from report import error, median, number, section_rows, shapes_of, spread, table, warning

# Microseconds on a device that copies 4.3e12 bytes/s, bfloat16; for another device in proportion to its bandwidth.
GOAL_COPY = 4.3e12
GOAL_US = {
    ("forward", "1,32,8192,128,128"): 85.0,
    ("forward", "8,32,2048,128,128"): 150.0,
    ("forward", "1,64,131072,128,128"): 2500.0,
    ("forward", "1,8,65536,64,64"): 100.0,
    ("backward", "1,32,8192,128,128"): 160.0,  # of a backward pass alone
}
GOAL_FACTOR = 1.5  # of GOAL_US, for kernels that run on every GPU since Ampere
DECODE = "64,32,1,128,128"
STEP, BACKWARD = "leetcore training", "leetcore backward"  # the latter alone: not to be held against a rival's step
TRAINING = {"backward": "a constant decay", "gated": "a decay per token, and its gradient"}


def ours(row: Row) -> bool:
    return str(row["method"]).startswith("leetcore")


def bad(results: Results) -> list[Row]:
    """leetcore's rows that are wrong or failed; a rival's failure is not ours."""
    return [r for r in results["rows"] if ours(r) and r["status"].startswith(("wrong", "not finite", "failed"))]


def same_problem(results: Results, row: Row) -> list[Row]:
    """Rows with samples of its section, shape and dtype."""
    keys = ("section", "shape", "dtype")
    return [r for r in results["rows"] if r["ms"] and all(r[key] == row[key] for key in keys)]


def best(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=ms, default=None)


def goal_us(results: Results, section: str, shape: str) -> float | None:
    copied, wanted = results["copy"], GOAL_US.get((section, shape))
    return wanted * GOAL_COPY / copied["median"] if wanted and copied else None


def problems(results: Results, *sections: str) -> list[list[Row]]:
    """Rows that have samples, problem by problem."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in results["rows"]:
        if row["ms"] and row["section"] in sections:
            found.setdefault((row["section"], row["shape"], row["dtype"]), []).append(row)
    return list(found.values())


def over(a: Row | None, b: Row | None) -> float | None:
    """a's time over b's."""
    return ms(a) / ms(b) if a and b else None


def time_cell(row: Row) -> str:
    """Microseconds, or why there are none."""
    if row["status"] in ("wrong", "not finite"):
        return f"{row['status'].upper()} (a call took {number(1e3 * row['wrong_ms'])} us)"
    return spread(row["ms"] and {k: 1e3 * v for k, v in row["ms"].items()}) if row["status"] == "ok" else row["status"]


def method_table(results: Results, section: str, title: str) -> Iterator[str]:
    rows = section_rows(results, section)
    for shape in shapes_of(rows):
        wanted = goal_us(results, section, shape)
        yield f"### {title}, B,H,N,K,V = {shape}" + (f": goal {number(wanted)} us in bfloat16" if wanted else "") + "\n"
        body = []
        for row in (row for row in rows if row["shape"] == shape):
            same = same_problem(results, row)
            fla = best(r for r in same if r["note"] == "fla")
            torch = best(r for r in same if r["note"].startswith("torch"))
            timed = row if row["ms"] and row["method"] != BACKWARD else None
            name = f"{row['method']} ({row['note']})" if ours(row) and row["note"] else row["method"]
            cells = [name, row["dtype"], time_cell(row), median(row["fraction"]), number(over(timed, fla))]
            peak = row.get("peak_bytes")
            cells += [number(over(timed, torch)), median(row["host_us"]), number(peak and 1e-6 * peak)]
            body.append([*cells, error(row)])
        head = ["method", "dtype", "us median (p10-p90)", "of the floor", "time / best fla", "time / best torch"]
        yield from table([*head, "host us", "peak MB", "error"], body)


def growth_tables(results: Results) -> Iterator[str]:
    """us by N, and the power of N over the last four octaves."""
    rows = [row for row in section_rows(results, "growth") if row["ms"]]
    families: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}
    for row in rows:
        _, heads, n, dim, _ = row["shape"].split(",")
        families.setdefault((heads, dim, row["dtype"]), {}).setdefault(row["method"], {})[int(n)] = 1e3 * ms(row)
    for (heads, dim, dtype), methods in families.items():
        lengths = sorted({n for times in methods.values() for n in times})
        yield f"### Growth with N: us, {heads} heads, K = V = {dim}, {dtype}\n"
        body = []
        for method, times in methods.items():
            power = fitted_power(list(times), list(times.values()))
            cells = [number(times[n]) if n in times else "-" for n in lengths]
            body.append([method, *cells, "-" if power is None else f"{power:.2f}"])
        yield from table(["method", *map(str, lengths), "time ~ N^"], body)


def regrets(results: Results) -> list[tuple[float, Row, Row]]:
    """(regret, the row of "auto", the best method's), the largest first, of every problem that was measured so."""
    found = []
    for rows in problems(results, "forward", "growth", "choice"):
        auto = best(r for r in rows if r["method"] == "leetcore auto")
        least = best(r for r in rows if ours(r) and r["method"] != "leetcore auto")
        if auto and least:
            found.append((ms(auto) / ms(least) - 1, auto, least))
    return sorted(found, key=lambda one: -one[0])


def regret_table(results: Results) -> Iterator[str]:
    found = regrets(results)
    if not found:
        return
    near = sum(regret <= 0.1 for regret, _, _ in found)
    yield f'### Regret of "auto"\n\nWithin 10 % of the best method on {near} of {len(found)} problems; the largest:\n'
    yield from table(
        ["problem", "dtype", "takes", "us", "best", "us", "regret"],
        [
            [
                a["shape"],
                a["dtype"],
                a["note"],
                number(1e3 * ms(a)),
                b["method"].split()[1],
                number(1e3 * ms(b)),
                f"{x:.0%}",
            ]
            for x, a, b in found[:10]
        ],
    )


def goals(results: Results) -> Iterator[dict[str, str]]:
    """As goals.goals."""
    found = problems(results, "forward", "decode", *TRAINING)
    by_problem = {(r[0]["section"], r[0]["shape"], r[0]["dtype"]): r for r in found}
    for section, shape in GOAL_US:
        rows = by_problem.get((section, shape, "bfloat16"), [])
        least, wanted = best(r for r in rows if ours(r) and r["method"] != STEP), goal_us(results, section, shape)
        method = least["method"].split()[1] if least else "-"
        yield goal(
            f"{section} {shape}: best method ({method}), time / goal",
            "<=",
            GOAL_FACTOR,
            1e3 * ms(least) / wanted if least and wanted else None,
        )
    for (section, shape, dtype), rows in by_problem.items():
        B, H, N, _, _ = map(int, shape.split(","))
        least, fla = best(filter(ours, rows)), best(r for r in rows if r["method"] == "fla: chunk")
        limit = 2 if B * H >= 128 else 4 if B * H <= 16 and N >= 16384 else None
        if section == "forward" and limit and dtype == "bfloat16":
            yield goal(f"forward {shape}: fla's chunk_simple_gla / best method, time", ">=", limit, over(fla, least))
        if section in TRAINING and dtype == "bfloat16":
            step = best(r for r in rows if r["method"] == STEP)
            yield goal(f"{section} {shape}: fla's forward and backward / ours, time", ">=", 2, over(fla, step))
    step = next(iter(find(results, "decode", "leetcore decode_step", shape=DECODE)), None)
    yield goal(f"decode {DECODE}: time / memory floor", "<=", 1.1, 1 / step["fraction"]["median"] if step else None)
    host = step and step["host_us"] and step["host_us"]["median"]
    yield goal(f"decode {DECODE}: host time of a call", "<=", 10, host, " us")
    timed = [row for row in results["rows"] if ours(row)]
    yield goal("rows of leetcore that are wrong or failed", "<=", 0, float(len(bad(results))) if timed else None)


def goals_section(results: Results) -> str:
    body = [[g["goal"], g["target"], g["measured"], g["verdict"]] for g in goals(results)]
    return "\n".join(["## Goals\n", *warning(results), *table(["goal", "target", "measured", ""], body)])


def header(results: Results) -> Iterator[str]:
    device = results["device"]
    yield f"# leetcore on a GPU: {device['name']}\n"
    yield from warning(results)
    yield "- " + ", ".join(f"{key} {value}" for key, value in device.items() if key != "name")
    yield f"- {results['date']}, commit {results['commit']}"
    yield "- " + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield "- leetcore: " + ", ".join(f"{key} {value}" for key, value in results["leetcore"].items())
    copied, product = median(results["copy"], 1e-9), median(results["matmul"], 1e-12)
    yield f"- copy {copied} GB/s read and written, bfloat16 product {product} Tflop/s"
    yield (
        "- us: GPU time of a call by events, nothing of its data in the L2 cache, the GPU kept busy until the host has"
        " queued it; all methods of a table in turn. Floor: q, k, v and o once (a decode step: also the states, read"
        " and written; training: also q, k, v, the gradient of o, and their own gradients once) at the copy"
        " bandwidth beside each sample. host us: until a call returns, the GPU idle. peak MB: what a call allocates at"
        " the most, results included. Goals are for 4.3e12 bytes/s, and scaled to this device's copy."
    )
    yield "- Every method passed the correctness gate against float64 before it was timed, or is marked WRONG.\n"


def stages(results: Results) -> Iterator[str]:
    """What `make gpu` did beside this benchmark."""
    if results.get("stages"):
        yield "## Stages\n"
    yield from table(
        ["stage", "", "s", ""],
        [[s["name"], s["result"], f"{s['seconds']:.0f}", s["note"]] for s in results.get("stages", [])],
    )


def troubles(results: Results) -> Iterator[str]:
    for row in bad(results):
        yield f"- **{row['section']} {row['shape']} {row['dtype']} {row['method']}**: {row['status']}"
    for group, reason in results["facts"].get("failed", {}).items():
        yield f"- **{group} failed**: {reason}"
    if left := results["facts"].get("not reached"):
        yield f"- Time was up before: {'; '.join(left)}"
    for row in results["left_out"]:
        what = row["status"] if row["error"] is None else f"{row['status']}, error {row['error']:.1e}"
        yield f"- {row['section']} {row['shape']} {row['dtype']}, {row['rival']} {row['candidate']}: left out ({what})"
    yield ""


def markdown(results: Results) -> str:
    lines = [*header(results), *stages(results), goals_section(results)]
    lines += method_table(results, "forward", "Forward")
    lines += method_table(results, "decode", "Decode, one token, float32 state")
    for section, decay in TRAINING.items():
        lines += method_table(results, section, f"Training, forward and backward, {decay}")
    lines += [*growth_tables(results), *regret_table(results), "### Remarks\n", *troubles(results)]
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.with_suffix(".md").write_text(markdown(json.loads(path.read_text())))
