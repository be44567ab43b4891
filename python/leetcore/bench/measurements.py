"""The data that `leetcore plot` draws, read from files of results and of Google Benchmark."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from . import options
from . import results as of
from .problems import Shape


@dataclass(frozen=True)
class Timing:
    """One method on one problem. section, decay: "" where the file has none. flop, floors: None
    where unknown.

    memory, compute: the least seconds of a call by its bytes and by its flop, as `results.floors`
    gives them.
    """

    method: str
    kind: str  # leetcore, registered or rival
    shape: Shape
    dtype: str
    decay: str
    seconds: float
    low: float
    high: float
    flop: float | None = None
    least_bytes: float | None = None
    memory: float | None = None
    compute: float | None = None
    section: str = ""


@dataclass(frozen=True)
class Error:
    """The worst relative errors of a method at a decay; None where there is no number.

    N: None for many lengths.
    """

    method: str
    dtype: str
    N: int | None
    decay: str
    output: float | None
    state: float | None


@dataclass(eq=False)
class Measurements:
    timings: list[Timing] = field(default_factory=list)
    errors: list[Error] = field(default_factory=list)
    tolerance: dict[str, dict[str, float]] = field(default_factory=dict)
    matmul: float | None = None  # flop/s, the best median of the files
    copy: float | None = None  # bytes/s
    warning: str = ""  # why the figures of a file are not to be quoted

    def raise_ceilings(self, matmul: float | None, copy: float | None) -> None:
        self.matmul = max(filter(None, (self.matmul, matmul)), default=None)
        self.copy = max(filter(None, (self.copy, copy)), default=None)

    def only(self, methods: list[str]) -> None:
        """Drops the other methods."""
        self.timings = [t for t in self.timings if t.method in methods]
        self.errors = [e for e in self.errors if e.method in methods]


def read(files: list[Path]) -> Measurements:
    """Reads all files; raises ClickException for one of another kind."""
    found = Measurements()
    for file in files:
        data = options.read_json(file)
        google = isinstance(data, dict) and "benchmarks" in data
        if not google:
            of.require(file, data)
        try:
            (_google if google else add)(data, found)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise click.ClickException(f"{file}: not as leetcore writes it ({options.sentence(error)})") from None
    return found


def add(results: of.Results, found: Measurements) -> None:
    """Adds a file of results."""
    for row in map(of.complete, results["rows"]):
        if t := row["seconds"]:
            names = ("method", "kind", "dtype", "decay", "flop", "least_bytes", "section")
            given = {name: row[name] for name in names}
            times = {"seconds": t["median"], "low": t["p10"], "high": t["p90"]}
            memory, compute = of.floors(results, row)
            shape = Shape(*of.shape(row))
            found.timings.append(Timing(shape=shape, memory=memory, compute=compute, **given, **times))
    found.tolerance |= results.get("tolerance", {})
    found.errors += [Error(**{name: row[name] for name in Error.__dataclass_fields__}) for row in results["errors"]]
    best, copied = of.matmul(results), of.copy(results)
    found.raise_ceilings((best or {}).get("median"), (copied or {}).get("median"))
    found.warning = found.warning or of.warning(results)


_SIZES = r"B:(\d+)/H:(\d+)/N:(\d+)/K:(\d+)/V:(\d+)"
_NAME = re.compile(rf"(cuda/)?forward/([^/]+)/([^/]+)/{_SIZES}(?:/min_time:[^/]+)?(?:/real_time|/manual_time)?")
_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def _google(data: dict[str, Any], found: Measurements) -> None:
    """Makes one timing of the repetitions of a benchmark; ignores fits (_BigO, _RMS) and other
    statistics."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in data["benchmarks"]:
        if row.get("run_type", "iteration") == "iteration" and not row.get("error_occurred"):
            runs.setdefault(row["name"], []).append(row)
    aggregates = {
        row["run_name"]: [row] for row in data["benchmarks"] if row.get("aggregate_name") == "median"
    }  # with --benchmark_report_aggregates_only the file has nothing else
    for name, rows in (aggregates | runs).items():
        parts = _NAME.fullmatch(name)
        if not parts:
            continue
        cuda, method, dtype, *sizes = parts.groups()
        method += " (cuda)" if cuda else ""
        times = [row["real_time"] * _UNITS[row.get("time_unit", "ns")] for row in rows]
        flop, moved = (
            median(row[counter] * t for row, t in zip(rows, times, strict=True)) if counter in rows[0] else None
            for counter in ("flop/s", "bytes/s")
        )
        low, high = (float(np.quantile(times, p)) for p in (0.1, 0.9))
        shape = Shape(*map(int, sizes))
        found.timings.append(Timing(method, "leetcore", shape, dtype, "", median(times), low, high, flop, moved))


def fitted_power(lengths: list[int], seconds: list[float]) -> float | None:
    """p of seconds ~ N^p: least squares in the logarithms, over the lengths from 1/16 of the
    longest."""
    points = [(np.log(n), np.log(t)) for n, t in zip(lengths, seconds, strict=True) if 16 * n >= max(lengths)]
    if len({x for x, _ in points}) < 2:
        return None
    x, y = np.array(points).T
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())
