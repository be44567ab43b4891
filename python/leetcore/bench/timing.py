"""The clock, the samples and their order."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

SAMPLE_S = 0.010  # a sample repeats a short call until it lasts this long
SETTLE_S = 0.008  # pause between a ceiling and a sample: idle OpenMP threads spin so long, on cores that others need
SLOW_S = 0.2  # a call slower than this is sampled in fewer rounds

Call = Callable[[], Any]


class Sampled(Protocol):
    """What `interleave` samples: a call, and the lists that it appends to.

    seconds has the time per call of each sample, ceilings the ceiling around it, and copy the
    bandwidth of a copy in its round.
    """

    call: Call | None
    status: str
    seconds: list[float]
    ceilings: list[float]
    copy: list[float]


def clock(call: Call, reps: int = 1) -> float:
    """Seconds per call."""
    start = time.perf_counter_ns()
    for _ in range(reps):
        call()
    return (time.perf_counter_ns() - start) * 1e-9 / reps


@dataclass(frozen=True)
class Timer:
    """How samples are taken on a device: clock(call, reps) gives seconds per call.

    None: SAMPLE_S and SETTLE_S.
    """

    clock: Callable[[Call, int], float]
    sample_s: float | None = None
    settle_s: float | None = None


CPU = Timer(clock)


def clock_ceiling(call: Call) -> float:
    """Seconds of a call that shows what the machine can do: the better of two, as the first one
    wakes threads."""
    time.sleep(SETTLE_S)
    return min(clock(call), clock(call))


def stats(values: Iterable[float]) -> dict[str, float] | None:
    """Median, p10, p90 and count; None where there are no values."""
    x = np.fromiter(values, np.float64)
    if not len(x):
        return None
    p10, median, p90 = (float(f"{np.quantile(x, p):.6g}") for p in (0.1, 0.5, 0.9))
    return {"median": median, "p10": p10, "p90": p90, "n": len(x)}


def interleave(
    rows: Sequence[Sampled],
    rounds: int,
    ceiling: Callable[[], float],
    copy: Callable[[], float],
    tick: Call = lambda: None,
    late: Callable[[], bool] = lambda: False,
    timer: Timer = CPU,
) -> None:
    """Samples every row that is ok once a round, round-robin; measures the ceiling before and after
    each sample.

    A call that raises ends its row: the exception becomes its status. late: whether to stop; every
    row has one sample by then. An interrupt leaves the samples that there are.
    """
    live = [row for row in rows if row.status == "ok" and row.call is not None]
    sample_s = SAMPLE_S if timer.sample_s is None else timer.sample_s
    settle_s = SETTLE_S if timer.settle_s is None else timer.settle_s
    reps: dict[int, int] = {}
    quota: dict[int, int] = {}

    def attempt(row: Sampled, reps: int = 1) -> float:
        assert row.call is not None
        try:
            return timer.clock(row.call, reps)
        except Exception as error:
            row.status = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            return math.inf

    for row in live:
        t = attempt(row)  # the gate has already run it once
        t = min(t, attempt(row)) if t < SLOW_S else t
        reps[id(row)] = max(1, math.ceil(sample_s / t))
        quota[id(row)] = rounds if t < SLOW_S else max(3, int(rounds * SLOW_S / t))
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            shift = index % max(1, len(live))
            copied, before = copy(), ceiling()
            for row in live[shift:] + live[:shift]:  # no row always follows the same neighbour
                if index >= quota[id(row)] or row.status != "ok":
                    continue
                if row.seconds and late():
                    return
                time.sleep(settle_s)
                if reps[id(row)] > 1:
                    attempt(row)
                seconds = attempt(row, reps[id(row)])
                if row.status != "ok":
                    continue
                after = ceiling()
                row.seconds.append(seconds)
                row.ceilings.append((before + after) / 2)
                row.copy.append(copied)
                before = after
            tick()
    finally:
        gc.enable()
