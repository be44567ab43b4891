"""One benchmark session: its settings, its rows, and how rows of leetcore and of the rivals come about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import harness
import ours
import rivals
import torch
from harness import CPU, Call, Ceilings, DecodeProblem, Factory, Problem, Row, Shape, Timer, TrainingProblem


@dataclass(eq=False)
class Session:
    """What was asked for, and what was measured so far (rows and facts survive an interrupt)."""

    shapes: list[Shape]
    decode_shapes: list[Shape]
    dtypes: list[str]
    rounds: int
    quick: bool
    pattern: str  # of the methods to measure, as in fnmatch
    argv: list[str]  # arguments that a child process of the same settings gets
    ceilings: Ceilings = field(default_factory=Ceilings)
    timer: Timer = CPU
    chunk: int = field(default_factory=ours.chunk_size)
    rows: list[Row] = field(default_factory=list)
    imported: list[dict[str, Any]] = field(default_factory=list)  # rows that a child process measured
    facts: dict[str, Any] = field(default_factory=dict)
    left_out: list[dict[str, Any]] = field(default_factory=list)  # candidates of rivals that failed
    say: Callable[[str], Any] = lambda text: None  # progress: what is going on
    tick: Call = lambda: None  # progress: something was done
    late: Callable[[], bool] = lambda: False  # whether time is up

    def wants(self, method: str) -> bool:
        return fnmatch(method, self.pattern)

    def row(self, section: str, method: str, p: Problem | DecodeProblem, **fields: Any) -> Row:
        """A row with the work of its problem: exact causal flop, or for a decode step the state read and written."""
        if isinstance(p, DecodeProblem):
            fields = {"work": 2.0 * p.shape.state_bytes()} | fields
        else:
            fields = {"work": p.shape.exact_flop(self.chunk), "dense_work": p.shape.dense_flop(self.chunk)} | fields
        dtype = str(p.dtype).removeprefix("torch.")
        return Row(section=section, method=method, shape=p.shape, dtype=dtype, **fields)

    def leetcore(
        self, section: str, p: Problem | DecodeProblem, method: str = "chunk", reuse_out: bool = False, **fields: Any
    ) -> Row:
        """A gated row of leetcore; reuse_out: the output is preallocated, as a careful caller would."""
        out = torch.empty_like(p.v) if reuse_out else None
        call = ours.decode(p, out) if isinstance(p, DecodeProblem) else ours.forward(p, method, out)
        name = ours.label("decode_step" if isinstance(p, DecodeProblem) else method, reuse_out)
        return harness.gate(self.row(section, name, p, call=call, **fields), p, self.timer)

    def factories(self, rival: Any, p: Problem | DecodeProblem) -> dict[str, Factory]:
        if isinstance(p, TrainingProblem):
            return rival.training(p, self.quick)
        return rival.decode(p, self.quick) if isinstance(p, DecodeProblem) else rival.forward(p, self.quick)

    def rival_rows(self, section: str, p: Problem | DecodeProblem) -> list[Row]:
        """The best candidates of every rival; what failed is noted in left_out."""
        rows = []
        for rival in rivals.TRAINING if isinstance(p, TrainingProblem) else rivals.ALL:
            if not self.wants(rival.NAME):
                continue
            factories = self.factories(rival, p)
            kept, failed = harness.tune(factories, p, rival.KEEP, 2 if self.quick else 6, self.tick, self.timer)
            for c in kept:
                label = f"{rival.NAME}: {c.name}" if c.name else rival.NAME
                rows.append(self.row(section, label, p, call=c.call, error=c.error, note=rival.NAME))
            where = {"section": section, "rival": rival.NAME, "shape": str(p.shape), "dtype": str(p.dtype)[6:]}
            self.left_out += [
                where
                | {"candidate": c.name, "status": c.status, "error": c.error, "wrong_ms": c.seconds and 1e3 * c.seconds}
                for c in failed
            ]
        return rows

    def measure(self, rows: list[Row], rounds: int | None = None, ceiling: Callable[[], float] | None = None) -> None:
        """Interleaves the rows that were asked for and records them, before the first sample is taken."""
        rows = [row for row in rows if self.wants(row.method)]
        self.rows += rows
        harness.interleave(
            rows,
            rounds or self.rounds,
            ceiling or self.ceilings.matmul,
            self.ceilings.copy,
            self.tick,
            self.late,
            self.timer,
        )
        for row in rows:
            row.call = None  # frees its buffers
