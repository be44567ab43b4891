"""Tables of results: for the terminal, in Markdown and CSV, and the comparison of two files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import rich.box
import rich.console
import rich.markup
import rich.table

from . import results as of
from .results import Results, Row, in_order, problem

SLOWER = 1.10  # a ratio of medians that is worth a flag, if the spreads do not overlap
COLUMNS = (
    *("B,H,N,K,V", "dtype", "decay", "method", "time", "p10", "p90", "memory floor", "compute floor"),
    *("Gflop/s", "of matmul", "memory", "error"),
)
_TIME, _LAST = COLUMNS.index("time"), len(COLUMNS)
Column = Callable[[Results, Row], str]


def number(x: float | None, digits: int = 3) -> str:
    """Three significant digits without exponents; a dash where there is no number."""
    if x is None or x != x:
        return "-"
    return f"{x:.0f}" if abs(x) >= 10**digits else f"{x:#.{digits}g}".rstrip(".")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(n: int | None) -> str:
    if n is None:
        return "-"
    return f"{n / 2**20:.3g} MiB" if n >= 2**20 else f"{n / 2**10:.3g} KiB"


def median(s: dict[str, float] | None, scale: float = 1.0) -> str:
    return number(s["median"] * scale) if s else "-"


def spread(s: dict[str, float] | None) -> str:
    """A duration as "median (p10 - p90)"."""
    return f"{duration(s['median'])} ({duration(s['p10'])} - {duration(s['p90'])})" if s else "-"


def failure(row: Row) -> str:
    """The status of a row without a time."""
    return f"WRONG {row['note']}".strip() if row["status"] == "wrong" else str(row["status"])


def name(row: Row) -> str:
    noted = row["note"] and row["status"] == "ok"
    return f"{row['method']} ({row['note']})" if noted else str(row["method"])


def fastest(rows: list[Row]) -> set[int]:
    """Ids of the rows that are fastest on their problem."""
    best: dict[Any, Row] = {}
    for row in in_order(rows):
        if row["seconds"]:
            best.setdefault(problem(row), row)
    return {id(row) for row in best.values()}


def _time(text: Callable[[dict[str, float]], str]) -> Column:
    """A column of times. A status that is not ok takes the place of the time."""

    def cell(results: Results, row: Row) -> str:
        if row["seconds"]:
            return text(row["seconds"])
        took = f" (a call took {duration(row['wrong_seconds'])})" if row["wrong_seconds"] else ""
        return failure(row) + took

    return cell


def _statistic(key: str, scale: float = 1.0, unit: str = "") -> Column:
    """A column of medians; with a unit, only of rows whose work is in this unit."""
    return lambda results, row: "-" if unit and row["unit"] != unit else median(row[key], scale)


CELLS: dict[str, Column] = {
    "B,H,N,K,V": lambda results, row: ",".join(map(str, of.shape(row))),
    "dtype": lambda results, row: str(row["dtype"]),
    "decay": lambda results, row: str(row["decay"]),
    "method": lambda results, row: name(row),
    "time": _time(lambda t: duration(t["median"])),
    "time: median (p10 - p90)": _time(spread),
    "p10": lambda results, row: duration((row["seconds"] or {}).get("p10")),
    "p90": lambda results, row: duration((row["seconds"] or {}).get("p90")),
    "memory floor": lambda results, row: duration(of.floors(results, row)[0]),
    "compute floor": lambda results, row: duration(of.floors(results, row)[1]),
    "Gflop/s": _statistic("rate", 1e-9, "flop"),
    "GB/s": _statistic("rate", 1e-9, "bytes"),
    "of matmul": _statistic("fraction", unit="flop"),
    "of copy": _statistic("fraction", unit="bytes"),
    "of the floor": _statistic("fraction"),
    "dense": _statistic("dense_fraction"),
    "host time": lambda results, row: duration((row["host_seconds"] or {}).get("median")),
    "memory": lambda results, row: size(row["peak_bytes"]),
    "error": lambda results, row: "-" if row["error"] is None else f"{row['error']:.1e}",
}


def cells(results: Results, row: Row) -> list[str]:
    """The cells of COLUMNS for one row."""
    return [CELLS[column](results, row) for column in COLUMNS]


def show(results: Results, out: rich.console.Console) -> None:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for i, column in enumerate((*COLUMNS, "")):
        table.add_column(column, justify="right" if _TIME <= i < _LAST else "left", overflow="fold")
    first, last = fastest(results["rows"]), None
    for row in in_order(results["rows"]):
        if last is not None and problem(row) != last:
            table.add_section()
        last = problem(row)
        style = "bold" if id(row) in first else "red" if of.wrong(row) else None
        text = [rich.markup.escape(cell) for cell in cells(results, row)]
        if not row["seconds"]:  # the sentence comes below the table
            text[_TIME] = text[_TIME].split(":")[0].split(" ")[0]
        table.add_row(*text, "fastest" if id(row) in first else "", style=style)
    out.print(table)
    for row in in_order(results["rows"]):
        if row["status"] != "ok":
            where = f"{','.join(map(str, of.shape(row)))} {row['dtype']} {row['decay']} {row['method']}"
            why = failure(row)
            if row["status"] == "wrong" and row["error"] is not None:
                why += f" error {row['error']:.1e} against float64"
            out.print(rich.markup.escape(f"{where}: {why}"), soft_wrap=True)
    out.print(rich.markup.escape(of.origin(results)), soft_wrap=True)


def markdown_table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A table of Markdown; empty where it has no rows."""
    head, rows = list(head), [[cell.replace("|", "\\|") for cell in row] for row in body]
    lines = [head, ["---"] * len(head), *rows] if rows else []
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(results: Results) -> str:
    first = fastest(results["rows"])
    body = []
    for row in in_order(results["rows"]):
        text = cells(results, row)
        if id(row) in first:
            text[_TIME - 1 : _TIME + 1] = (f"**{cell}**" for cell in text[_TIME - 1 : _TIME + 1])
        body.append(text)
    return f"{of.origin(results)}\n\n{markdown_table(COLUMNS, body)}\n"


def csv_text(results: Results) -> str:
    """Numbers in seconds, flop/s and bytes."""
    file = io.StringIO()
    names = ("B", "H", "N", "K", "V", "dtype", "decay", "method", "kind", "note", "status", "error")
    models = ("flop", "least_bytes", "bytes", "workspace", "peak_bytes")
    times = ("seconds", "seconds_p10", "seconds_p90", "samples", "memory_floor", "compute_floor")
    writer = csv.writer(file)
    writer.writerow([*names, *models, *times, "flop_per_s", "of_matmul"])
    for row in in_order(results["rows"]):
        t = row["seconds"] or {}
        taken = [t.get(name) for name in ("median", "p10", "p90", "n")]
        rates = [(row[name] or {}).get("median") for name in ("rate", "fraction")]
        writer.writerow([*(row[name] for name in (*names, *models)), *taken, *of.floors(results, row), *rates])
    return file.getvalue()


def report(results: Results, rows: list[Row], columns: Iterable[str], more: dict[str, Column] | None = None) -> str:
    """A table of Markdown with columns of CELLS and of `more`, under the file's warning."""
    known = CELLS | (more or {})
    chosen = list(columns)
    table = markdown_table(chosen, ([known[column](results, row) for column in chosen] for row in rows))
    warned = of.warning(results)
    return f"**{warned}**\n\n{table}\n" if warned and table else f"{table}\n"


# ---- comparison ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A row of two files. ratio: old / new median, above 1 where it became faster."""

    row: Row
    old: dict[str, float]
    ratio: float
    verdict: str  # slower or faster: by more than 10 %, with spreads that do not overlap; else empty


def compare(old: Results, new: Results) -> list[Change]:
    """The rows that both files have.

    `leetcore bench` has no sections: its rows match those of any section.
    """
    before: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in old["rows"]:
        if row["seconds"]:
            for section in (row["section"], ""):
                before.setdefault((section, *problem(row)[1:], row["method"]), row["seconds"])
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
    for i, column in enumerate((*COLUMNS[:_TIME], "old", "new", "old / new", "memory floor", "compute floor", "")):
        table.add_column(column, justify="right" if 4 <= i < 9 else "left")
    for c in changes:
        flag = f"{c.verdict.upper() if c.verdict == 'slower' else c.verdict}"
        times = [duration(t["median"]) for t in (c.old, c.row["seconds"])]
        floors = [duration(x) for x in of.floors(new, c.row)]
        style = {"slower": "red", "faster": "green"}.get(c.verdict)
        head = map(rich.markup.escape, cells(new, c.row)[:_TIME])
        table.add_row(*head, *times, f"{c.ratio:.2f}", *floors, flag, style=style)
    out.print(table)
    for name in ("device", "isa", "threads", "versions", "environment"):
        if old[name] != new[name]:
            out.print(rich.markup.escape(f"Not alike: {name} was {old[name]}, is {new[name]}"), soft_wrap=True)
    for when, results in (("old", old), ("new", new)):
        if warned := of.warning(results):
            out.print(rich.markup.escape(f"The {when} file says: {warned}"), soft_wrap=True)
    slower = sum(c.verdict == "slower" for c in changes)
    out.print(f"{len(changes)} rows in both; {slower} slower by more than 10 % with spreads that do not overlap")
