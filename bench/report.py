"""The markdown beside the JSON: tables and goals. `python bench/report.py FILE.json` writes it anew."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from goals import Results, Row, goals, ratio_to_torch, work_seconds


def table(head: list[str], body: Iterable[list[str]]) -> Iterator[str]:
    """A markdown table, or nothing if it would be empty."""
    rows = list(body)
    if rows:
        yield from ("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
        yield ""


def number(x: float | None, digits: int = 3) -> str:
    """Three significant digits without exponents, or a dash."""
    if x is None or math.isnan(x):
        return "-"
    return f"{x:.0f}" if abs(x) >= 10**digits else f"{x:#.{digits}g}".rstrip(".")


def spread(s: dict[str, float] | None) -> str:
    return f"{number(s['median'])} ({number(s['p10'])}-{number(s['p90'])})" if s else "-"


def median(s: dict[str, float] | None, scale: float = 1.0) -> str:
    return number(s["median"] * scale) if s else "-"


def error(row: Row) -> str:
    return "-" if row["error"] is None else f"{row['error']:.1e}"


def time_cell(row: Row) -> str:
    """The time, or why there is none."""
    if row["status"] in ("wrong", "not finite"):
        return f"{row['status'].upper()} (a call took {number(row['wrong_ms'])} ms)"
    return spread(row["ms"]) if row["status"] == "ok" else row["status"]


def rates(row: Row) -> list[str]:
    """Work per second in units of 1e9, its fraction of the ceiling, the ceiling in 1e9 per second."""
    return [median(row["rate"], 1e-9), median(row["fraction"]), median(row["ceiling"], 1e-9)]


def shapes_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in rows))


def section_rows(results: Results, section: str) -> list[Row]:
    return [row for row in results["rows"] if row["section"] == section and (row["ms"] or row["status"] != "ok")]


def forward_table(results: Results) -> Iterator[str]:
    rows = section_rows(results, "forward")
    head = ["method", "dtype", "ms median (p10-p90)", "GF/s exact", "of matmul, exact", "dense", "of FMA peak"]
    peak = results["fma_peak"]
    for shape in shapes_of(rows):
        yield f"### Forward B,H,N,K,V = {shape}\n"
        body = []
        for row in (row for row in rows if row["shape"] == shape):
            fma = row["rate"]["median"] / peak if row["rate"] and peak else None
            cells = [row["method"], row["dtype"], time_cell(row), median(row["rate"], 1e-9), median(row["fraction"])]
            cells += [median(row["dense_fraction"]), number(fma), number(ratio_to_torch(results, row)), error(row)]
            body.append(cells)
        yield from table([*head, "time / best torch", "error"], body)


def decode_table(results: Results) -> Iterator[str]:
    rows = section_rows(results, "decode")
    for shape in shapes_of(rows):
        yield f"### Decode, one token, B,H,N,K,V = {shape}, fp32 state\n"
        body = [
            [row["method"], row["dtype"], time_cell(row), *rates(row), number(ratio_to_torch(results, row)), error(row)]
            for row in rows
            if row["shape"] == shape
        ]
        head = ["method", "dtype", "ms median (p10-p90)", "GB/s", "of copy", "copy GB/s", "time / best torch", "error"]
        yield from table(head, body)


def plain_table(results: Results, section: str, title: str) -> Iterator[str]:
    rows = section_rows(results, section)
    if rows:
        yield f"### {title}\n"
    head = ["shape", "dtype", "", "ms median (p10-p90)", "GF/s exact", "of matmul, exact", "error"]
    yield from table(
        head,
        [
            [row["shape"], row["dtype"], row["note"] or row["method"], time_cell(row), *rates(row)[:2], error(row)]
            for row in rows
        ],
    )


def growth_table(results: Results) -> Iterator[str]:
    rows = [row for row in section_rows(results, "growth") if row["ms"]]
    if rows:
        yield "### Growth with N\n\nAt the median matmul rate: what the machine gave or took is divided out.\n"
    body = []
    for row in rows:
        _, H, N, _, _ = map(int, row["shape"].split(","))
        body.append([row["shape"], time_cell(row), number(1e9 * work_seconds(results, row) / H / N)])
    yield from table(["shape", "ms median (p10-p90)", "ns / token / head"], body)


def facts(results: Results) -> Iterator[str]:
    overhead = results["facts"].get("overhead_us")
    if overhead:
        yield "### Overhead of a call (1,1,1,4,4)\n"
        yield from table(["call", "us median (p10-p90)"], [[name, spread(s)] for name, s in overhead.items()])
    workspace = results["facts"].get("workspace")
    if workspace:
        yield "### Scratch against N\n"
        rows = [
            [w["shape"], number(w["peak_growth_bytes"] / 1e6), number((w["explained_bytes"] or math.nan) / 1e6)]
            for w in workspace
        ]
        yield from table(["shape", "peak growth of a fresh process, MB", "explain() says, MB"], rows)
    for section, reason in results["facts"].get("failed", {}).items():
        yield f"**The section {section} failed:** {reason}\n"


def left_out(results: Results) -> Iterator[str]:
    """What failed the gate or raised, one line for every rival and problem."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in results["left_out"]:
        key = tuple(row[k] for k in ("section", "shape", "dtype", "rival"))
        groups.setdefault(key, []).append(row)
    if groups:
        yield "### Candidates of rivals that were left out\n"
    body = []
    for key, rows in groups.items():
        wrong = [row for row in rows if row["status"] == "wrong"]
        why = sorted({row["status"] for row in rows if row["status"] != "wrong"})
        if wrong:
            errors = [row["error"] for row in wrong]
            fastest = min(row["wrong_ms"] for row in wrong)
            why.append(
                f"{len(wrong)} wrong, error {min(errors):.2e} to {max(errors):.2e} (a call took {number(fastest)} ms)"
            )
        body.append([*key, "; ".join(why)])
    yield from table(["section", "shape", "dtype", "rival", "why"], body)


def header(results: Results) -> Iterator[str]:
    d, v = results["device"], results["versions"]
    yield f"# leetcore on the CPU: {d['cpu']}\n"
    yield from warning(results)
    if results["interrupted"]:
        yield "**Interrupted: only what was measured until then.**\n"
    yield f"- {d['cores']} cores, {results['threads']} threads, {d['flags']}"
    yield f"- {results['date']}, commit {results['commit']}"
    yield "- " + ", ".join(f"{name} {version}" for name, version in v.items())
    built = ", ".join(f"{key} {value}" for key, value in results["leetcore"].items())
    yield f"- leetcore: {built}; C = {results['chunk']}"
    yield machine_speed(results)
    settings = ", ".join(f"{name}={value or 'unset'}" for name, value in results["environment"].items())
    yield f"- environment, set by the benchmark itself (reasons: leetcore.bench.machine): {settings}"
    yield (
        "- All methods of a table are sampled in turn; ms is per call. 'of matmul' is the rate over that of fp32"
        " torch.mm (1024^3) just before and after each sample, in exact causal flop B H N ((C+1)(K+V) + 4KV), or"
        " dense-equivalent B H N (2C(K+V) + 4KV), with the same C for every method."
    )
    yield "- Every method passed the correctness gate against float64 before it was timed, or is marked WRONG.\n"


def machine_speed(results: Results) -> str:
    """The FMA peak, and the matmul rate over the whole run."""
    peak = f"{results['fma_peak'] / 1e9:.0f} GF/s" if results["fma_peak"] else "not measured (no compiler)"
    rates = {key: value / 1e9 for key, value in (results["matmul"] or {}).items()}
    return f"- fp32 FMA peak of a microbenchmark: {peak}; torch.mm of 1024^3 over the run: {spread(rates)} GF/s"


def warning(results: Results) -> Iterator[str]:
    """Where somebody else used the machine."""
    rates = results["matmul"]
    if rates and rates["p10"] < 0.8 * rates["p90"]:
        yield "**The machine was not quiet (the matmul rate swung by over a fifth): do not quote these figures.**\n"


def goals_section(results: Results) -> str:
    body = [[g["goal"], g["target"], g["measured"], g["verdict"]] for g in goals(results)]
    return "\n".join(["## Goals\n", *warning(results), *table(["goal", "target", "measured", ""], body)])


def markdown(results: Results) -> str:
    lines = [*header(results), *forward_table(results), *decode_table(results)]
    for section in dict.fromkeys(row["section"] for row in results["rows"]):
        if section.startswith("isa "):
            lines += plain_table(results, section, f"The chunk method on {section.removeprefix('isa ')}")
    lines += plain_table(results, "gamma", "Time against gamma")
    lines += plain_table(results, "odd", "Odd shapes")
    lines += growth_table(results)
    lines += plain_table(results, "one_head", "One head against eight")
    lines += plain_table(results, "threads", "Threads")
    lines += [*facts(results), *left_out(results), goals_section(results)]
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.with_suffix(".md").write_text(markdown(json.loads(path.read_text())))
