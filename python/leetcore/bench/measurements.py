"""What `leetcore plot` draws, read from the files of `leetcore bench`, `leetcore check` and Google Benchmark."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from . import check, options, tables
from .problems import Shape


@dataclass(frozen=True)
class Timing:
    """One method on one problem. decay: "" where the file does not say. flop, least_bytes: None without a model."""

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

    @property
    def problem(self) -> tuple[Shape, str, str]:
        return self.shape, self.dtype, self.decay


@dataclass(frozen=True)
class Error:
    """The worst relative errors of a method at a decay; None where there is no number."""

    method: str
    dtype: str
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

    def raise_ceilings(self, matmul: float | None, copy: float | None) -> None:
        self.matmul = max(filter(None, (self.matmul, matmul)), default=None)
        self.copy = max(filter(None, (self.copy, copy)), default=None)


def read(files: list[Path]) -> Measurements:
    """All files together; raises ClickException for one that is none of the three kinds."""
    found = Measurements()
    for file in files:
        data = options.read_json(file)
        if not isinstance(data, dict):
            data = {}
        try:
            if data.get("schema") == check.SCHEMA:
                _check(data, found)
            elif "benchmarks" in data:
                _google(data, found)
            else:
                tables.require(file, data)
                _bench(data, found)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise click.ClickException(f"{file}: not as leetcore writes it ({options.sentence(error)})") from None
    return found


def _check(data: dict[str, Any], found: Measurements) -> None:
    found.tolerance |= data["tolerance"]
    found.errors += [Error(**{name: row[name] for name in Error.__dataclass_fields__}) for row in data["rows"]]


def _bench(data: dict[str, Any], found: Measurements) -> None:
    for row in data["rows"]:
        if t := row["seconds"]:
            names = ("method", "kind", "dtype", "decay", "flop", "least_bytes")
            given = {name: row[name] for name in names}
            times = {"seconds": t["median"], "low": t["p10"], "high": t["p90"]}
            found.timings.append(Timing(shape=Shape(*tables.shape(row)), **given, **times))
    rates = data["ceilings"]
    best = max((rate["median"] for rate in rates["matmul"].values() if rate), default=None)
    found.raise_ceilings(best, rates["copy"] and rates["copy"]["median"])


_SIZES = r"B:(\d+)/H:(\d+)/N:(\d+)/K:(\d+)/V:(\d+)"
_NAME = re.compile(rf"(cuda/)?forward/([^/]+)/([^/]+)/{_SIZES}(?:/min_time:[^/]+)?(?:/real_time|/manual_time)?")
_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def _google(data: dict[str, Any], found: Measurements) -> None:
    """Repetitions of a benchmark become one timing; fits (_BigO, _RMS) and other statistics are passed over."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in data["benchmarks"]:
        if row.get("run_type", "iteration") == "iteration" and not row.get("error_occurred"):
            runs.setdefault(row["name"], []).append(row)
    aggregates = {
        row["run_name"]: [row] for row in data["benchmarks"] if row.get("aggregate_name") == "median"
    }  # all there is with --benchmark_report_aggregates_only
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
    """p of seconds ~ N^p: least squares in the logarithms, over the lengths from 1/16 of the longest."""
    points = [(np.log(n), np.log(t)) for n, t in zip(lengths, seconds, strict=True) if 16 * n >= max(lengths)]
    if len({x for x, _ in points}) < 2:
        return None
    x, y = np.array(points).T
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())
