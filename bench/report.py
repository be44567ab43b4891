"""The Markdown of the CPU benchmark: tables and goals.

`python bench/report.py FILE.json` writes FILE.md again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from goals import goals, ratio_to, text, work_seconds
from leetcore.bench import options
from leetcore.bench import results as of
from leetcore.bench.results import Results, Row
from leetcore.bench.tables import Column, duration, markdown_table, median, number, report, size, spread

TIME, FLOORS = "time: median (p10 - p90)", ("memory floor", "compute floor")
_RIVALS = ("time / best torch", "error")
SECTIONS = {  # title, columns
    "forward": (
        "Forward",
        ("method", "dtype", TIME, *FLOORS, "Gflop/s", "of matmul", "dense", "of FMA peak", *_RIVALS),
    ),
    "decode": ("Decode, one token, float32 states", ("method", "dtype", TIME, *FLOORS, "GB/s", "of copy", *_RIVALS)),
    "training": (
        "Training, forward and backward pass",
        ("method", "dtype", TIME, *FLOORS, "Gflop/s", "of matmul", "memory", *_RIVALS),
    ),
    "gamma": ("Time against gamma", ("B,H,N,K,V", "decay", TIME, *FLOORS, "of matmul", "error")),
    "odd": ("Odd shapes", ("B,H,N,K,V", TIME, *FLOORS, "of matmul", "error")),
    "growth": ("Growth with N", ("B,H,N,K,V", TIME, *FLOORS, "of matmul", "ns / token / head")),
    "one_head": ("One head and eight heads", ("B,H,N,K,V", TIME, *FLOORS, "of matmul", "error")),
}
PLAIN = ("B,H,N,K,V", "method", "dtype", TIME, *FLOORS, "of matmul", "error")
BY_SHAPE = ("forward", "decode", "training")  # a table for each shape


def fma_fraction(results: Results, row: Row) -> str:
    peak = results["facts"].get("fma_peak")
    return number(row["rate"]["median"] / peak) if row["rate"] and peak else "-"


def per_token(results: Results, row: Row) -> str:
    """At the median rate of the matrix product over the run, so that the machine's ups and downs do
    not show."""
    return number(1e9 * work_seconds(results, row) / row["H"] / row["N"]) if row["seconds"] else "-"


def over_torch(results: Results, row: Row) -> str:
    return "-" if row["method"] == "backward" else number(ratio_to(results, row, "torch"))


MORE: dict[str, Column] = {
    "of FMA peak": fma_fraction,
    "time / best torch": over_torch,
    "ns / token / head": per_token,
}


def section_rows(results: Results, section: str) -> list[Row]:
    """The rows of a section, without those that were not reached."""
    return [r for r in results["rows"] if r["section"] == section and r["status"] != "skipped: not reached"]


def section(results: Results, name: str) -> Iterator[str]:
    rows = section_rows(results, name)
    title, columns = SECTIONS.get(name, (name.capitalize(), PLAIN))
    groups = {"": rows}
    if name in BY_SHAPE:
        groups = {f", B,H,N,K,V = {shape}": [] for shape in dict.fromkeys(map(text, rows))}
        for row in rows:
            groups[f", B,H,N,K,V = {text(row)}"].append(row)
    for where, some in groups.items():
        if some:
            yield f"### {title}{where}\n"
            yield report(results, some, columns, MORE)


def facts(results: Results) -> Iterator[str]:
    overhead = results["facts"].get("overhead_seconds", {})
    if overhead:
        yield "### Overhead of a call (1,1,1,4,4)\n"
        yield markdown_table(["call", TIME], [[name, spread(s)] for name, s in overhead.items()]) + "\n"
    workspace = results["facts"].get("workspace", [])
    if workspace:
        yield "### Scratch against N\n"
        rows = [[w["shape"], size(w["peak_growth_bytes"]), size(w["model_bytes"])] for w in workspace]
        yield markdown_table(["B,H,N,K,V", "growth of the peak in a new process", "of the model"], rows) + "\n"
    for name, reason in results["facts"].get("failed", {}).items():
        yield f"**The section {name} failed:** {reason}\n"
    if left := results["facts"].get("not reached"):
        yield f"Not reached in time: {'; '.join(left)}\n"


def left_out(results: Results) -> Iterator[str]:
    """Variants of rivals that failed the gate or raised an exception: one line for each rival and
    problem."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in results["left_out"]:
        key = tuple(row[k] for k in ("section", "shape", "dtype", "rival"))
        groups.setdefault(key, []).append(row)
    body = []
    for key, rows in groups.items():
        wrong = [row for row in rows if row["status"] == "wrong"]
        why = sorted({row["status"] for row in rows if row["status"] != "wrong"})
        errors = [row["error"] for row in wrong if row["error"] is not None]
        if wrong:
            found = f", error {min(errors):.2e} to {max(errors):.2e}" if errors else ""
            took = duration(min(row["wrong_seconds"] for row in wrong))
            why.append(f"{len(wrong)} wrong{found} (a call took {took})")
        body.append([*key, "; ".join(why)])
    if body:
        yield "### Variants of rivals that were left out\n"
        yield markdown_table(["section", "B,H,N,K,V", "dtype", "rival", "reason"], body) + "\n"


def header(results: Results) -> Iterator[str]:
    peak, rate = results["facts"].get("fma_peak"), of.matmul(results)
    yield f"# leetcore on the CPU: {results['device']['processor']}\n"
    yield f"- {of.origin(results)}"
    yield f"- {results['device']['cores']} cores; {results['compiler']}; instruction sets {results['isas']}"
    yield (
        f"- float32 FMA peak: {number(peak / 1e9)} Gflop/s" if peak else "- float32 FMA peak: no compiler to measure it"
    )
    if rate:
        swing = f"{median(rate, 1e-9)} ({number(rate['p10'] / 1e9)} - {number(rate['p90'] / 1e9)})"
        yield f"- torch.mm of 1024^3 in float32 over the run: {swing} Gflop/s"
    settings = ", ".join(f"{name}={value or 'unset'}" for name, value in results["environment"].items())
    yield f"- environment, set by the benchmark (reasons: leetcore.bench.machine): {settings}"
    yield (
        "- All methods of a table are sampled in turn; times are per call. The memory floor is the time of the operands"
        " once at the bandwidth of a copy, the compute floor that of the flop at the rate of torch.mm. Work is counted"
        f" alike for every method: B H N ((C+1)(K+V) + 4KV) flop with C = {results['facts'].get('chunk')}; 'dense' is"
        " the fraction with B H N (2C(K+V) + 4KV)."
    )
    yield "- Every method was compared with float64 before it was timed; a wrong one is marked WRONG.\n"


def goals_table(results: Results, found: Iterable[dict[str, str]]) -> str:
    body = [[g["goal"], g["target"], g["measured"], g["verdict"]] for g in found]
    warned = f"**{of.warning(results)}**\n\n" if of.warning(results) else ""
    return f"## Goals\n\n{warned}{markdown_table(['goal', 'target', 'measured', ''], body)}\n"


def goals_section(results: Results) -> str:
    return goals_table(results, goals(results))


def markdown(results: Results) -> str:
    lines = [*header(results)]
    for name in dict.fromkeys([*SECTIONS, *(row["section"] for row in results["rows"])]):
        lines += section(results, name)
    return "\n".join([*lines, *facts(results), *left_out(results), goals_section(results)])


if __name__ == "__main__":
    path = Path(sys.argv[1])
    options.write(path.with_suffix(".md"), markdown(of.read(path)))
