"""Rows of a benchmark: a method on a problem, the gate that it has to pass, and the samples of its
time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from . import options, timing
from .problems import Shape, refusal
from .timing import CPU, Call, Timer, stats

Factory = Callable[[], Call]  # prepares tables and buffers, which are not timed
Judge = Callable[[Call], tuple[float, bool]]  # runs a call: the error of its results, and whether it is small enough
NOT_FINITE = "values that are not finite"


class WrongKind(Exception):
    """A result has the wrong type, shape or dtype; the text says which."""


@dataclass(eq=False)
class Row:
    """One method on one problem.

    status: ok; wrong; or failed, refused, skipped, each followed by ": " and the reason.
    """

    method: str
    kind: str  # leetcore, registered or rival
    shape: Shape
    dtype: str
    decay: str
    section: str = ""
    call: Call | None = None  # None: there is nothing to time
    status: str = "ok"
    note: str = ""
    error: float | None = None  # the largest one of all results
    cost: Any = None  # leetcore.Cost, where there is a model
    work: float | None = None  # of one call, in `unit`: what its rate is computed from
    unit: str = "flop"  # or bytes
    dense_work: float | None = None  # flop of the same problem in whole blocks
    flop: float | None = None  # of a method without a model
    least_bytes: float | None = None  # operands once
    peers: list[str] = field(default_factory=list)  # shapes whose rate this row is compared with
    took: float = math.inf  # seconds of one call at the gate
    seconds: list[float] = field(default_factory=list)
    ceilings: list[float] = field(default_factory=list)  # the ceiling before and after each sample, in units per second
    copy: list[float] = field(default_factory=list)  # bytes/s of a copy in the same round
    host: list[float] = field(default_factory=list)  # on a GPU: seconds until a call returns
    peak_bytes: int | None = None  # memory that a call needs besides its inputs, results included

    def to_json(self) -> dict[str, Any]:
        """The row of a file; `results.complete` adds what follows from it."""
        names = (
            "section",
            "method",
            "kind",
            "dtype",
            "decay",
            "note",
            "unit",
            "work",
            "dense_work",
            "peak_bytes",
            "peers",
        )
        model = {} if self.cost is None else self.cost._asdict()
        fractions = [self.work / t / c for t, c in zip(self.seconds, self.ceilings, strict=True)] if self.work else []
        return {
            **{name: getattr(self, name) for name in names},
            **vars(self.shape),
            "status": "skipped: not reached" if self.status == "ok" and not self.seconds else self.status,
            "error": float(f"{self.error:.4g}") if self.error is not None and math.isfinite(self.error) else None,
            "flop": model.get("flop", self.flop),
            "least_bytes": self.least_bytes or model.get("least_bytes"),
            **{name: model.get(name) for name in ("bytes", "workspace", "microseconds")},
            "wrong_seconds": self.took if self.status == "wrong" else None,
            "seconds": stats(self.seconds),
            "fraction": stats(fractions),
            "ceiling": stats(self.ceilings),
            "copy": stats(self.copy),
            "host_seconds": stats(self.host),
        }


def gate(row: Row, call: Call, judge: Judge, timer: Timer = CPU) -> Row:
    """Runs a call for the first time.

    It becomes the row's call if its results are right; the status says so.
    """
    took: list[float] = []

    def timed() -> Any:
        start = time.perf_counter()
        result = call()
        took.append(time.perf_counter() - start)
        return result

    try:
        row.error, right = judge(timed)
    except NotImplementedError as error:
        row.status = f"refused: {refusal(row.method, error)}"
        return row
    except WrongKind as error:
        row.status = f"failed: {error}"
        return row
    except Exception as error:  # the other rows are measured still
        row.status = f"failed: {options.sentence(error)}"
        return row
    row.took = min(took) if timer is CPU else timer.clock(call, 1)
    if right:
        row.call = call
    else:
        row.status = "wrong"
        row.note = row.note if math.isfinite(row.error) else NOT_FINITE
    return row


def tune(
    candidates: Iterable[tuple[Row, Factory]],
    judge: Judge,
    keep: int = 1,
    finalists: int = 6,
    tick: Call = lambda: None,
    timer: Timer = CPU,
) -> tuple[list[Row], list[Row]]:
    """The `keep` fastest candidates that pass the gate, and all that do not pass.

    Every candidate is timed once, and the finalists three times more, unless a call is slow.
    """
    passed: list[Row] = []
    failed: list[Row] = []
    for row, factory in candidates:
        try:
            gate(row, factory(), judge, timer)
        except Exception as error:  # a rival's failure is a result
            row.status = f"failed: {options.sentence(error)}"
        if row.call:
            passed = sorted([*passed, row], key=lambda r: r.took)[: max(finalists, keep)]  # frees the other buffers
        else:
            failed.append(row)
        tick()
    for _ in range(3 if len(passed) > keep else 0):
        for row in passed:
            if row.call and row.took < timing.SLOW_S:
                row.took = min(row.took, timer.clock(row.call, 1))
    return sorted(passed, key=lambda r: r.took)[:keep], failed


@dataclass(eq=False)
class Session:
    """The settings of a benchmark, and what was measured so far, which survives an interrupt."""

    rounds: int
    ceilings: Any
    timer: Timer = CPU
    deadline: float = math.inf  # of time.monotonic()
    tick: Call = lambda: None  # progress: something was done
    say: Callable[[str], Any] = lambda text: None  # progress: what is being done
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    left_out: list[dict[str, Any]] = field(default_factory=list)  # candidates of rivals that failed

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def measure(self, rows: list[Row], rounds: int | None = None, ceiling: Callable[[], float] | None = None) -> None:
        """Samples the rows in turn, records them, and frees what their calls hold."""
        self.rows += [row for row in rows if row not in self.rows]
        timing.interleave(
            rows,
            rounds or self.rounds,
            ceiling or self.ceilings.matmul,
            self.ceilings.round,
            self.tick,
            self.late,
            self.timer,
        )
        for row in rows:
            row.call = None
