"""Files of results: one format for everything that is measured.

A file has the keys of `machine.conditions`, and

- schema, version, kind: "leetcore results", the version of this format, and what was measured
  (KINDS);
- interrupted, and ceilings as `Ceilings.to_json` gives them (None where nothing was timed);
- rows: timings, with the keys of `session.Row.to_json`; keys with the values of _OMITTED are left
  out; a row of mamba2_speed also has G, the number of groups of heads, and `ratio`, the statistic
  of its time over that of its problem's first row in the same round;
- errors: worst relative errors against float64, as {method, dtype, N, decay, output, state}; N may
  be None;
- facts: numbers of no method; left_out: variants of rivals that failed.

Times are seconds, rates flop/s or bytes/s, sizes bytes. A statistic is {median, p10, p90, n}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from . import machine, options

SCHEMA, VERSION = "leetcore results", 2
KINDS = ("bench", "cpu", "growth", "regret", "check", "accuracy", "gpu", "mamba2", "mamba2_speed")
QUIET = 0.8  # least p10 over p90 of the matrix product's rate on a quiet machine

FEWEST = 3  # samples of a time that may be quoted

Results = dict[str, Any]
Row = dict[str, Any]


def new(kind: str, folder: Path | None = None, **content: Any) -> Results:
    """A file's content; folder: the checkout whose commit is named."""
    empty: Results = {"interrupted": False, "ceilings": None, "rows": [], "errors": [], "facts": {}, "left_out": []}
    head = {"schema": SCHEMA, "version": VERSION, "kind": kind, "warnings": []}
    results: Results = head | machine.conditions(folder) | empty | content
    results["rows"] = [complete(row) for row in results["rows"]]
    results["warnings"] = warnings(results)
    return results


# Values of a row's keys that a file leaves out.
_NUMBERS = ("error", "flop", "work", "dense_work", "least_bytes", "bytes", "workspace", "microseconds", "peak_bytes")
_STATISTICS = ("wrong_seconds", "seconds", "fraction", "ceiling", "copy", "host_seconds")
_OMITTED: Row = dict.fromkeys((*_NUMBERS, *_STATISTICS)) | {
    "section": "",
    "note": "",
    "decay": "",
    "status": "ok",
    "unit": "flop",
    "peers": [],
}
_DERIVED = ("rate", "dense_fraction")


def complete(row: Row) -> Row:
    """A row with all keys, and with what follows from others: its rate, and its fraction by dense
    work."""
    row = _OMITTED | row
    t, work, dense = row["seconds"], row["work"], row["dense_work"]
    swapped = {"median": "median", "p10": "p90", "p90": "p10"}
    row["rate"] = {a: work / t[b] for a, b in swapped.items()} | {"n": t["n"]} if t and work else None
    known = row["fraction"] if work and dense else None
    row["dense_fraction"] = known and {a: x if a == "n" else x * dense / work for a, x in known.items()}
    return row


def write(file: Path, results: Results) -> None:
    """Writes a file with one row per line; raises ClickException where it cannot."""

    def short(row: Any) -> Any:
        if not isinstance(row, dict) or "seconds" not in row:
            return row
        return {k: x for k, x in row.items() if k not in _DERIVED and (k not in _OMITTED or x != _OMITTED[k])}

    def text(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return json.dumps(value, allow_nan=False)
        return "[\n  " + ",\n  ".join(json.dumps(short(row), allow_nan=False) for row in value) + "\n ]"

    options.write(file, "{\n " + ",\n ".join(f'"{name}": {text(x)}' for name, x in results.items()) + "\n}\n")


def matmul(results: Results) -> dict[str, float] | None:
    """Statistics of the fastest matrix product."""
    rates = [rate for rate in (results["ceilings"] or {"matmul": {}})["matmul"].values() if rate]
    return max(rates, key=lambda rate: rate["median"], default=None)


def copy(results: Results) -> dict[str, float] | None:
    """Statistics of the copy bandwidth."""
    rates: dict[str, float] | None = (results["ceilings"] or {"copy": None})["copy"]
    return rates


def warnings(results: Results) -> list[str]:
    """Reasons not to quote the figures of a file."""
    rate = matmul(results)
    found = {
        "the machine was not quiet (the rate of a matrix product swung by over a fifth)": rate
        and rate["p10"] < QUIET * rate["p90"],
        "the commit had uncommitted changes": results["dirty"],
        "the run was interrupted": results["interrupted"],
        f"some methods have fewer than {FEWEST} samples": any(
            row["seconds"]["n"] < FEWEST for row in results["rows"] if row["seconds"]
        ),
    }
    return [reason for reason, holds in found.items() if holds]


def warning(results: Results) -> str:
    """One sentence for every table that is made of a file; empty where its figures may be
    quoted."""
    return f"Do not quote these figures: {'; '.join(results['warnings'])}." if results["warnings"] else ""


def origin(results: Results) -> str:
    """The machine, the versions and the ceilings of a file in one line, with its warning."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    commit = f"commit {results['commit']}" if results["commit"] else ""
    rates = (results["ceilings"] or {"matmul": {}})["matmul"]
    products = ", ".join(f"{name} {rate['median'] / 1e9:.0f} Gflop/s" for name, rate in rates.items() if rate)
    copied = copy(results)
    parts = [
        f"{results['device']['processor']}, {results['threads']} threads, {results['isa']}",
        ", ".join(part for part in (results["date"], commit) if part),
        versions,
        f"matmul {products}" if products else "",
        f"copy {copied['median'] / 1e9:.1f} GB/s" if copied else "",
        "INTERRUPTED" if results["interrupted"] else "",
    ]
    return " ".join(filter(None, ["; ".join(part for part in parts if part) + ".", warning(results)]))


def floors(results: Results, row: Row) -> tuple[float | None, float | None]:
    """Least seconds of a call: by its bytes at the bandwidth of a copy, by its flop at the rate of
    a matrix product.

    The rates are those measured next to the row's samples, or else those of the whole run. A floor
    is None where its count or its rate is unknown.
    """
    measured = {"bytes": row["copy"] or copy(results), "flop": matmul(results)}
    if row["ceiling"]:
        measured[row["unit"]] = row["ceiling"]
    bytes_per_s, flop_per_s = (rate and rate["median"] for rate in measured.values())
    flop = row["work"] if row["unit"] == "flop" else row["flop"]
    memory = row["least_bytes"] / bytes_per_s if row["least_bytes"] and bytes_per_s else None
    return memory, flop / flop_per_s if flop and flop_per_s else None


def read(file: Path) -> Results:
    """Reads a file of results; raises ClickException where it is something else."""
    results = options.read_json(file)
    require(file, results)
    return {**results, "rows": [complete(row) for row in results["rows"]]}


def require(file: Path, results: Any) -> None:
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise click.ClickException(f"{file}: no file of results that leetcore wrote")
    if results.get("version") != VERSION:
        raise click.ClickException(
            f"{file}: the file has version {results.get('version')}, and this leetcore reads version {VERSION}"
        )


def shape(row: Row) -> tuple[int, ...]:
    return tuple(row[name] for name in "BHNKV")


def problem(row: Row) -> tuple[Any, ...]:
    return (row["section"], shape(row), row["dtype"], row["decay"])


def in_order(rows: list[Row]) -> list[Row]:
    """Rows by problem, then by time; rows without a time come last."""
    return sorted(rows, key=lambda r: (*problem(r), r["seconds"]["median"] if r["seconds"] else float("inf")))


def wrong(row: Row) -> bool:
    """Whether a method's result was wrong, or the method failed."""
    return bool(row["status"].startswith(("wrong", "failed")))
