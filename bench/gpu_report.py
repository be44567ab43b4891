"""The Markdown of the GPU benchmark.

`python bench/gpu_report.py FILE.json` writes FILE.md again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from goals import best, find, goal, ratio_to, seconds, text
from leetcore.bench import options
from leetcore.bench import results as of
from leetcore.bench.measurements import fitted_power
from leetcore.bench.results import Results, Row
from leetcore.bench.tables import Column, duration, markdown_table, median, name, number, report
from report import FLOORS, TIME, goals_table, section_rows

# Microseconds in bfloat16 on a device that copies 4.3e12 bytes/s, scaled by the bandwidth of other
# devices.
GOAL_COPY = 4.3e12
GOAL_US = {
    ("forward", "1,32,8192,128,128"): 85.0,
    ("forward", "8,32,2048,128,128"): 150.0,
    ("forward", "1,64,131072,128,128"): 2500.0,
    ("forward", "1,8,65536,64,64"): 100.0,
    ("backward", "1,32,8192,128,128"): 160.0,  # a backward pass alone
    ("mamba2", "1,128,8192,128,64 G=1"): 150.0,
}
GOAL_FACTOR = 1.5  # of GOAL_US, for kernels that run on every GPU since Ampere
MOST = {"mamba2": 1.0}  # sections with another factor of GOAL_US
DECODE = "64,32,1,128,128"
MAMBA2_DECODE = "64,80,1,128,64 G=1"
PUBLISHED = {  # times of others, which no run of this program measured
    ("mamba2", "1,128,8192,128,64 G=1"): "On an H100, mamba_ssm takes 649 us and a fused Triton kernel 362 us.",
    ("mamba2_decode", "1,80,1,128,64 G=1"): "On an H200, TileOPs takes 4.5 us.",
    ("mamba2_decode", "8,80,1,128,64 G=1"): "On an H200, TileOPs takes 15.6 us.",
}
STEP, BACKWARD = "training", "backward"  # BACKWARD is no whole step: it is not compared with rivals
TRAINING = {"backward": "a constant decay", "gated": "a decay per token, and its gradient"}


def ours(row: Row) -> bool:
    return bool(row["kind"] == "leetcore")


def bad(results: Results) -> list[Row]:
    """Rows of leetcore that are wrong or failed."""
    return [row for row in results["rows"] if ours(row) and of.wrong(row)]


def goal_us(results: Results, section: str, shape: str) -> float | None:
    """The goal for this device."""
    copied, wanted = of.copy(results), GOAL_US.get((section, shape))
    return wanted * GOAL_COPY / copied["median"] if wanted and copied else None


def problems(results: Results, *sections: str) -> list[list[Row]]:
    """Rows with samples, problem by problem."""
    found: dict[Any, list[Row]] = {}
    for row in results["rows"]:
        if row["seconds"] and row["section"] in sections:
            found.setdefault(of.problem(row), []).append(row)
    return list(found.values())


def over(a: Row | None, b: Row | None) -> float | None:
    """a's time over b's."""
    return seconds(a) / seconds(b) if a and b else None


def over_rival(rival: str) -> Column:
    def column(results: Results, row: Row) -> str:
        return "-" if ours(row) and row["method"] == BACKWARD else number(ratio_to(results, row, rival))

    return column


MORE: dict[str, Column] = {
    "time / best fla": over_rival("fla"),
    "time / best torch": over_rival("torch"),
    "time / mamba_ssm": over_rival("mamba_ssm"),
    "time / bare operator": over_rival("bare operator"),
}
OPERATOR, MAMBA2 = tuple(MORE)[:2], tuple(MORE)[2:]  # columns of ratios


def method_table(results: Results, section: str, title: str, ratios: Iterable[str] = OPERATOR) -> Iterator[str]:
    columns = ("method", "dtype", TIME, *FLOORS, "of the floor", *ratios, "host time", "memory", "error")
    rows = section_rows(results, section)
    for shape in dict.fromkeys(map(text, rows)):
        wanted = goal_us(results, section, shape)
        yield f"### {title}, B,H,N,K,V = {shape}" + (f": goal {number(wanted)} us in bfloat16" if wanted else "") + "\n"
        if (section, shape) in PUBLISHED:
            yield f"Published: {PUBLISHED[section, shape]}\n"
        yield report(results, [row for row in rows if text(row) == shape], columns, MORE)


def growth_tables(results: Results) -> Iterator[str]:
    """Times by N with the memory floor, and the power of N over the last four octaves."""
    families: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for row in results["rows"]:
        if row["section"] == "growth" and row["seconds"]:
            methods = families.setdefault((row["H"], row["K"], row["dtype"]), {})
            methods.setdefault(row["method"], {})[row["N"]] = seconds(row)
            floor, _ = of.floors(results, row)
            if floor:
                methods.setdefault("memory floor", {}).setdefault(row["N"], floor)
    for (heads, dim, dtype), methods in families.items():
        lengths = sorted({n for times in methods.values() for n in times})
        yield f"### Growth with N: {heads} heads, K = V = {dim}, {dtype}\n\n{of.warning(results)}\n"
        body = []
        for method, times in methods.items():
            power = fitted_power(list(times), list(times.values()))
            cells = [duration(times[n]) if n in times else "-" for n in lengths]
            body.append([method, *cells, "-" if power is None else f"{power:.2f}"])
        yield markdown_table(["method", *map(str, lengths), "time ~ N^"], body) + "\n"


def regrets(results: Results) -> list[tuple[float, Row, Row]]:
    """(regret, row of "auto", row of the best method) of every problem that was measured with both;
    largest first."""
    found = []
    for rows in problems(results, "forward", "mamba2", "growth", "choice"):
        auto = best(r for r in rows if r["method"] == "auto")
        least = best(r for r in rows if ours(r) and r["method"] != "auto")
        if auto and least:
            found.append((seconds(auto) / seconds(least) - 1, auto, least))
    return sorted(found, key=lambda entry: -entry[0])


def regret_table(results: Results) -> Iterator[str]:
    found = regrets(results)
    if not found:
        return
    near = sum(regret <= 0.1 for regret, _, _ in found)
    yield f'### Regret of "auto"\n\n{of.warning(results)}\n'
    yield f"Within 10 % of the best method on {near} of {len(found)} problems. The largest regrets:\n"
    head = ["B,H,N,K,V", "dtype", "chosen", "time", "best", "time", *FLOORS, "regret"]
    body = []
    for x, a, b in found[:10]:
        times = [a["note"], duration(seconds(a)), b["method"], duration(seconds(b))]
        floors = [duration(floor) for floor in of.floors(results, a)]
        body.append([text(a), a["dtype"], *times, *floors, f"{x:.0%}"])
    yield markdown_table(head, body) + "\n"


def goals(results: Results) -> Iterator[dict[str, str]]:
    """Every goal, in the form of goals.goals."""
    found = problems(results, "forward", "decode", "mamba2", *TRAINING)
    by_problem = {(r[0]["section"], text(r[0]), r[0]["dtype"]): r for r in found}
    for section, shape in GOAL_US:
        rows = by_problem.get((section, shape, "bfloat16"), [])
        least, wanted = best(r for r in rows if ours(r) and r["method"] != STEP), goal_us(results, section, shape)
        method = least["method"] if least else "-"
        yield goal(
            f"{section} {shape}: best method ({method}), time / goal",
            "<=",
            MOST.get(section, GOAL_FACTOR),
            1e6 * seconds(least) / wanted if least and wanted else None,
        )
    for (section, shape, dtype), rows in by_problem.items():
        B, H, N = map(int, shape.split(",")[:3])
        least, fla = best(filter(ours, rows)), best(r for r in rows if r["method"] == "fla: chunk")
        limit = 2 if B * H >= 128 else 4 if B * H <= 16 and N >= 16384 else None
        if section == "forward" and limit and dtype == "bfloat16":
            yield goal(f"forward {shape}: fla's chunk_simple_gla / best method, time", ">=", limit, over(fla, least))
        if section in TRAINING and dtype == "bfloat16":
            step = best(r for r in rows if r["method"] == STEP)
            yield goal(f"{section} {shape}: fla's forward and backward / ours, time", ">=", 2, over(fla, step))
    yield from mamba2_goals(results)
    step = next((row for row in find(results, "decode", "decode_step") if text(row) == DECODE), None)
    yield goal(f"decode {DECODE}: time / memory floor", "<=", 1.1, 1 / step["fraction"]["median"] if step else None)
    host = step and step["host_seconds"] and 1e6 * step["host_seconds"]["median"]
    yield goal(f"decode {DECODE}: host time of a call", "<=", 10, host, " us")
    timed = [row for row in results["rows"] if ours(row)]
    yield goal("rows of leetcore that are wrong or failed", "<=", 0, float(len(bad(results))) if timed else None)


def mamba2_goals(results: Results) -> Iterator[dict[str, str]]:
    """Goals of ratios, where both were measured, and of a decode step."""
    for section, method, rival, limit in (
        ("mamba2", "auto", "bare operator", 1.15),
        ("mamba2_training", STEP, "mamba_ssm", 0.8),
    ):
        for row in find(results, section, method, dtype="bfloat16"):
            yield goal(f"{section} {text(row)}: time / {rival}", "<=", limit, ratio_to(results, row, rival))
    steps = [row for row in find(results, "mamba2_decode", "ssd_step") if text(row) == MAMBA2_DECODE]
    taken = 1 / steps[0]["fraction"]["median"] if steps else None
    yield goal(f"mamba2_decode {MAMBA2_DECODE}: time / memory floor", "<=", 1.1, taken)


def goals_section(results: Results) -> str:
    return goals_table(results, goals(results))


def header(results: Results) -> Iterator[str]:
    device = results["device"]
    yield f"# leetcore on a GPU: {device['processor']}\n"
    yield f"- {of.origin(results)}"
    yield "- " + ", ".join(f"{key} {value}" for key, value in device.items() if key != "processor")
    yield f"- {results['compiler']}, CUDA {results['facts'].get('cuda')}"
    copied, product = of.copy(results), of.matmul(results)
    yield f"- copy {median(copied, 1e-9)} GB/s read and written, bfloat16 product {median(product, 1e-12)} Tflop/s"
    yield (
        "- Times are GPU times of a call by events: none of its data is in the L2 cache, and the GPU is kept busy until"
        " the host has queued the call. All methods of a table are sampled in turn. The memory floor is the time of q,"
        " k, v and o once at the bandwidth of the copy next to each sample; a decode step also reads and writes the"
        " states, and training also has q, k, v, the gradient of o, and their gradients once. Mamba-2 has x, y, B, C"
        " and dt in place of these. The compute floor is the"
        " time of the flop at the rate of the product. 'host time' is the time until a call returns on an idle GPU."
        " 'memory' is what a call allocates at most, results included. Goals are for 4.3e12 bytes/s, scaled to the copy"
        " of this device."
    )
    yield "- Every method was compared with float64 before it was timed; a wrong one is marked WRONG.\n"


def stages(results: Results) -> Iterator[str]:
    """The other stages of `make gpu`."""
    done = results.get("stages", [])
    if done:
        yield "## Stages\n"
        body = [[s["name"], s["result"], f"{s['seconds']:.0f}", s["note"]] for s in done]
        yield markdown_table(["stage", "", "s", ""], body) + "\n"


def troubles(results: Results) -> Iterator[str]:
    for row in bad(results):
        yield f"- **{row['section']} {text(row)} {row['dtype']} {name(row)}**: {row['status']}"
    for group, reason in results["facts"].get("failed", {}).items():
        yield f"- **{group} failed**: {reason}"
    if left := results["facts"].get("not reached"):
        yield f"- Not reached in time: {'; '.join(left)}"
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
    lines += method_table(results, "mamba2", "Mamba-2", MAMBA2)
    lines += method_table(results, "mamba2_training", "Mamba-2, training, forward and backward", MAMBA2[:1])
    lines += method_table(results, "mamba2_decode", "Mamba-2, one token, float32 state", MAMBA2[:1])
    lines += [*growth_tables(results), *regret_table(results), "### Remarks\n", *troubles(results)]
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    options.write(path.with_suffix(".md"), markdown(of.read(path)))
