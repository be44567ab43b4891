"""What comes out of `leetcore bench`: its file, its tables, and the comparison of two files."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import rich.box
import rich.console
import rich.markup
import rich.table

from . import options

SCHEMA, VERSION = "leetcore bench", 1
SLOWER = 1.10  # a ratio of medians that is worth a flag, if the spreads do not overlap
COLUMNS = ("B,H,N,K,V", "dtype", "decay", "method", "time", "p10", "p90", "Gflop/s", "of matmul", "memory", "error")

Results = dict[str, Any]
Row = dict[str, Any]


def read(file: Path) -> Results:
    """A file of `leetcore bench --json`; raises ClickException."""
    results = options.read_json(file)
    require(file, results)
    return dict(results)


def require(file: Path, results: Any) -> None:
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise click.ClickException(f"{file}: no file of `leetcore bench --json`")
    if results.get("version") != VERSION:
        raise click.ClickException(
            f"{file}: version {results.get('version')} of the file, and this leetcore reads {VERSION}"
        )


def shape(row: Row) -> tuple[int, ...]:
    return tuple(row[name] for name in "BHNKV")


def problem(row: Row) -> tuple[Any, ...]:
    return (shape(row), row["dtype"], row["decay"])


def in_order(rows: list[Row]) -> list[Row]:
    """By shape, dtype and decay, then by time; what has none comes last."""
    return sorted(rows, key=lambda r: (*problem(r), r["seconds"]["median"] if r["seconds"] else float("inf")))


def fastest(rows: list[Row]) -> set[int]:
    """Ids of the rows that are fastest on their problem."""
    best: dict[Any, Row] = {}
    for row in in_order(rows):
        if row["seconds"]:
            best.setdefault(problem(row), row)
    return {id(row) for row in best.values()}


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(n: int | None) -> str:
    if n is None:
        return ""
    return f"{n / 2**20:.3g} MiB" if n >= 2**20 else f"{n / 2**10:.3g} KiB"


def cells(row: Row) -> list[str]:
    """As COLUMNS, of one row; a status that is not ok stands where the time would be."""
    name = f"{row['method']} ({row['note']})" if row["note"] and row["status"] == "ok" else row["method"]
    head = [",".join(map(str, shape(row))), row["dtype"], row["decay"], name]
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    t = row["seconds"]
    if not t:
        status = f"{row['status']} {row['note']}".strip() if row["status"] == "WRONG" else row["status"]
        return [*head, status, "", "", "", "", "", error]
    rate, fraction = row["rate"], row["fraction"]
    return [
        *head,
        *(duration(t[name]) for name in ("median", "p10", "p90")),
        f"{rate['median'] / 1e9:.3g}" if rate else "",
        f"{fraction['median']:.2f}" if fraction else "",
        size(row["peak_bytes"]),
        error,
    ]


def conditions(results: Results) -> str:
    """One line."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    rates = ", ".join(
        f"{name} {rate['median'] / 1e9:.0f} Gflop/s" for name, rate in results["ceilings"]["matmul"].items() if rate
    )
    copied = results["ceilings"]["copy"]
    parts = [
        f"{results['device']['processor']}, {results['threads']} threads, {results['isa']}",
        versions,
        f"matmul {rates}" if rates else "",
        f"copy {copied['median'] / 1e9:.1f} GB/s" if copied else "",
        "INTERRUPTED" if results["interrupted"] else "",
    ]
    return "; ".join(part for part in parts if part)


def show(results: Results, out: rich.console.Console) -> None:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for i, column in enumerate((*COLUMNS, "")):
        table.add_column(column, justify="right" if 4 <= i < 11 else "left", overflow="fold")
    first, last = fastest(results["rows"]), None
    for row in in_order(results["rows"]):
        if last is not None and problem(row) != last:
            table.add_section()
        last = problem(row)
        style = "bold" if id(row) in first else "red" if row["status"].startswith(("WRONG", "failed")) else None
        text = [rich.markup.escape(cell) for cell in cells(row)]
        if not row["seconds"]:  # a sentence; below the table
            text[4] = row["status"].split(":")[0]
        table.add_row(*text, "fastest" if id(row) in first else "", style=style)
    out.print(table)
    for row in in_order(results["rows"]):
        if ":" in row["status"] or row["status"] == "WRONG":
            name = f"{','.join(map(str, shape(row)))} {row['dtype']} {row['decay']} {row['method']}"
            why = f"{row['status']} {row['note']}".strip()
            if row["status"] == "WRONG" and row["error"] is not None:
                why += f"error {row['error']:.1e} against float64"
            out.print(rich.markup.escape(f"{name}: {why}"), soft_wrap=True)
    out.print(rich.markup.escape(conditions(results)), soft_wrap=True)


def markdown(results: Results) -> str:
    first = fastest(results["rows"])
    lines = [conditions(results), "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in in_order(results["rows"]):
        text = [cell.replace("|", "\\|") for cell in cells(row)]
        if id(row) in first:
            text[3:5] = (f"**{cell}**" for cell in text[3:5])
        lines.append(f"| {' | '.join(text)} |")
    return "\n".join(lines) + "\n"


def csv_text(results: Results) -> str:
    """Numbers in seconds, flop/s and bytes."""
    file = io.StringIO()
    names = ("B", "H", "N", "K", "V", "dtype", "decay", "method", "kind", "note", "status", "error")
    models = ("flop", "least_bytes", "bytes", "workspace", "peak_bytes")
    writer = csv.writer(file)
    writer.writerow([*names, *models, "seconds", "seconds_p10", "seconds_p90", "samples", "flop_per_s", "of_matmul"])
    for row in in_order(results["rows"]):
        t = row["seconds"] or {}
        times = [t.get(name) for name in ("median", "p10", "p90", "n")]
        rates = [(row[name] or {}).get("median") for name in ("rate", "fraction")]
        writer.writerow([*(row[name] for name in (*names, *models)), *times, *rates])
    return file.getvalue()


@dataclass(frozen=True)
class Change:
    """A row of two files. ratio: old / new median, above 1 where it became faster."""

    row: Row
    old: dict[str, float]
    ratio: float
    verdict: str  # slower, faster or nothing: by more than 10 %, and the spreads do not overlap


def compare(old: Results, new: Results) -> list[Change]:
    """Of the rows that both have."""
    before = {(*problem(row), row["method"]): row["seconds"] for row in old["rows"] if row["seconds"]}
    changes = []
    for row in in_order(new["rows"]):
        was, now = before.get((*problem(row), row["method"])), row["seconds"]
        if not was or not now:
            continue
        ratio = was["median"] / now["median"]
        slower = ratio < 1 / SLOWER and now["p10"] > was["p90"]
        faster = ratio > SLOWER and now["p90"] < was["p10"]
        changes.append(Change(row, was, ratio, "slower" if slower else "faster" if faster else ""))
    return changes


def show_comparison(old: Results, new: Results, out: rich.console.Console) -> None:
    changes = compare(old, new)
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, title=f"Compared with {old['date']} (old / new: above 1 is faster)"
    )
    for i, column in enumerate((*COLUMNS[:4], "old", "new", "old / new", "")):
        table.add_column(column, justify="right" if 4 <= i < 7 else "left")
    for c in changes:
        flag = f"{c.verdict.upper() if c.verdict == 'slower' else c.verdict}"
        times = [duration(t["median"]) for t in (c.old, c.row["seconds"])]
        style = {"slower": "red", "faster": "green"}.get(c.verdict)
        table.add_row(*map(rich.markup.escape, cells(c.row)[:4]), *times, f"{c.ratio:.2f}", flag, style=style)
    out.print(table)
    for name in ("device", "isa", "threads", "versions", "environment"):
        if old[name] != new[name]:
            out.print(rich.markup.escape(f"Not alike: {name} was {old[name]}, is {new[name]}"), soft_wrap=True)
    slower = sum(c.verdict == "slower" for c in changes)
    out.print(f"{len(changes)} rows in both; {slower} slower by more than 10 % with spreads that do not overlap")
