"""What the laboratory adds to `leetcore.bench`: problems of torch tensors, leetcore's calls on
them, a session."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property, partial
from typing import Any

import leetcore
import rivals
import torch
from leetcore import reference
from leetcore.bench import problems, session
from leetcore.bench.options import sentence
from leetcore.bench.problems import GRADIENT_TOLERANCE, TOLERANCE, Shape, refusal
from leetcore.bench.rivals import Problem as TensorProblem
from leetcore.bench.session import Factory, Row
from leetcore.bench.timing import Call
from leetcore.torch import linear_attention
from torch import Tensor

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def normals(sizes: list[tuple[int, ...]], dtype: torch.dtype, seed: int, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes]


def log_decay(decay: str, shape: Shape) -> Tensor:
    """float32 [H], or for "gates" [B, H, N] as gated layers compute it: log(sigmoid(x)) / 16 of
    normal x."""
    if decay == "gates":
        x = torch.randn(shape.B, shape.H, shape.N, generator=torch.Generator().manual_seed(2))
        return torch.nn.functional.logsigmoid(x) / 16
    value = problems.log_decay(decay, None, shape.B, shape.H, shape.N)  # type: ignore[arg-type]
    return torch.as_tensor(value, dtype=torch.float32).expand(shape.H).clone()


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, computed where the tensors are; inf if anything is not finite."""
    error = float((got.double() - want).norm() / want.norm())
    return error if math.isfinite(error) else math.inf


class Problem(TensorProblem):
    """A forward call on random inputs of unit variance."""

    def __init__(self, shape: Shape, dtype: torch.dtype, decay: str = "alibi", device: str = "cpu") -> None:
        s, self.decay, tokens = shape, decay, () if self.one_token else (shape.N,)
        sizes = [(s.B, s.H, *tokens, d) for d in (s.K, s.K, s.V)]
        self.q, self.k, self.v = normals(sizes, dtype, 0, device)
        self.shape, self.dtype, self.device, self.scale = shape, dtype, device, 1.0
        self.log_decay = log_decay(decay, shape).to(device)

    one_token = False
    against = rivals.ALL

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def wanted(self) -> Any:
        """What a call must return, in float64."""
        return reference.in_chunks(self.q, self.k, self.v, self.log_decay, xp=torch)[0]

    def judge(self, call: Call) -> tuple[float, bool]:
        """The gate: runs the call and compares what it returns."""
        error = relative_error(call(), self.wanted)
        return error, error <= TOLERANCE[self.dtype_name][0]

    def operands(self) -> float:
        return float(self.shape.token_bytes(self.dtype.itemsize))

    def credits(self, chunk: int, method: str) -> dict[str, Any]:
        """The work, flop and bytes of a row, the same for every method."""
        flop = self.shape.exact_flop(chunk)
        return {"work": flop, "flop": flop, "dense_work": self.shape.dense_flop(chunk), "least_bytes": self.operands()}

    def factories(self, rival: rivals.Rival, quick: bool) -> dict[str, Factory]:
        return rival.forward(self, quick)

    def call(self, method: str, out: Tensor | None = None) -> Call:
        """leetcore's call."""
        return lambda: leetcore.linear_attention(self.q, self.k, self.v, self.log_decay, method=method, out=out)


class TrainingProblem(Problem):
    """A forward and a backward pass; log_decay [H] is constant, and log_decay [B, H, N] has a
    gradient."""

    differences: tuple[str, ...] = ("d_log_decay",)  # gradients that are differences of two sums

    def __init__(self, shape: Shape, dtype: torch.dtype, decay: str = "alibi", device: str = "cpu") -> None:
        super().__init__(shape, dtype, decay, device)
        [self.d_o] = normals([tuple(self.v.shape)], dtype, 1, device)

    def leaves(self) -> dict[str, Tensor]:
        """Tensors that share memory with the inputs and whose gradients are wanted."""
        names = ("q", "k", "v", "log_decay")[: 4 if self.per_token else 3]
        return {name: getattr(self, name).detach().requires_grad_() for name in names}

    @cached_property
    def wanted(self) -> dict[str, Tensor]:
        """o and the gradients, float64, by name."""
        found = reference.gradients(self.q, self.k, self.v, self.log_decay, self.d_o, xp=torch)
        o = reference.in_chunks(self.q, self.k, self.v, self.log_decay, xp=torch)[0]
        return {"o": o} | {name: found[name] for name in (f"d_{leaf}" for leaf in self.leaves())}

    def tolerance(self, name: str) -> float:
        if name == "o":
            return TOLERANCE[self.dtype_name][0]
        twice = name in self.differences and self.dtype.itemsize == 2
        return (2 if twice else 1) * GRADIENT_TOLERANCE[self.dtype_name]

    def judge(self, call: Call) -> tuple[float, bool]:
        errors = {name: relative_error(x, self.wanted[name]) for name, x in call().items()}
        return max(errors.values()), all(error <= self.tolerance(name) for name, error in errors.items())

    def operands(self) -> float:
        """A backward pass: q, k, v and d_o read once, their gradients written once; decays of
        tokens likewise."""
        s = self.shape
        written = s.B * s.H * s.N * (2 * s.K + s.V) * self.dtype.itemsize
        return super().operands() + written + (2 * self.log_decay.nbytes if self.per_token else 0)

    def credits(self, chunk: int, method: str) -> dict[str, Any]:
        flop, moved = self.shape.backward_flop(chunk), self.operands()
        if method != "backward":  # a whole step
            flop += self.shape.exact_flop(chunk)
            moved += super().operands() + (self.log_decay.nbytes if self.per_token else 0)
        return {"work": flop, "flop": flop, "least_bytes": moved}

    def factories(self, rival: rivals.Rival, quick: bool) -> dict[str, Factory]:
        return rival.training(self, quick)

    def call(self, method: str, out: Tensor | None = None) -> Call:
        """A step by torch's autograd ("training"), or the backward pass alone ("backward")."""
        if method == "backward":
            return self._backward
        leaves = self.leaves()
        operator = linear_attention if self.per_token else partial(linear_attention, log_decay=self.log_decay)
        return lambda: rivals.training_step(operator, leaves, self.d_o)

    def _backward(self) -> dict[str, Tensor]:
        names = [f"d_{name}" for name in self.leaves()]
        d = leetcore.linear_attention_backward(self.q, self.k, self.v, self.log_decay, d_o=self.d_o, wants=names)
        return {name: getattr(d, name) for name in names}


class DecodeProblem(Problem):
    """One decode step: q, k [B, H, K], v [B, H, V], state [B, H, K, V] in float32."""

    one_token = True

    def __init__(self, shape: Shape, dtype: torch.dtype, decay: str = "alibi", device: str = "cpu") -> None:
        super().__init__(shape, dtype, decay, device)
        [self.initial_state] = normals([(shape.B, shape.H, shape.K, shape.V)], torch.float32, 1, device)

    @cached_property
    def wanted(self) -> list[Tensor]:
        """Outputs of the first two steps, float64: the second step reads the state that the first
        one wrote."""
        q, k, v = (x.unsqueeze(2).expand(-1, -1, 2, -1) for x in (self.q, self.k, self.v))
        return list(reference.in_chunks(q, k, v, self.log_decay, self.initial_state.double(), torch)[0].unbind(2))

    def judge(self, call: Call) -> tuple[float, bool]:
        error = max(relative_error(call(), want) for want in self.wanted)
        return error, error <= TOLERANCE[self.dtype_name][0]

    def credits(self, chunk: int, method: str) -> dict[str, Any]:
        states, s = 2.0 * self.shape.state_bytes(), self.shape
        flop = 5.0 * s.B * s.H * s.K * s.V
        return {"work": states, "unit": "bytes", "flop": flop, "least_bytes": states + self.operands()}

    def factories(self, rival: rivals.Rival, quick: bool) -> dict[str, Factory]:
        return rival.decode(self, quick)

    def call(self, method: str, out: Tensor | None = None) -> Call:
        state = self.initial_state.clone()
        return lambda: leetcore.decode_step(self.q, self.k, self.v, state, self.log_decay, out=out)


def chunk_size() -> int:
    """C of the method "chunk": the length with which its cost model counts."""
    cost = leetcore.cost("chunk", N=1 << 20, K=64)
    return round((cost.flop / (1 << 20) - 4 * 64 * 64) / 128 - 1)


def predicted(p: Problem, method: str) -> leetcore.Cost:
    """The cost model of a method on the problem's device; "auto" gives the method that is
    chosen."""
    dtype, where = p.dtype_name, "cuda" if p.device == "cuda" else "cpu"
    return leetcore.cost(method, **vars(p.shape), dtype=dtype, per_token=p.per_token, device=where)  # type: ignore


def methods(device: str = "cpu") -> list[str]:
    return [m.name for m in leetcore.methods() if m.device == device]


def set_threads(n: int) -> None:
    torch.set_num_threads(n)
    leetcore.set_num_threads(n)


@dataclass(eq=False)
class Session(session.Session):
    """A session on torch tensors, with every rival."""

    quick: bool = False
    pattern: str = "*"  # of the methods to measure, for fnmatch; leetcore's own are "leetcore NAME"
    shapes: list[Shape] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    argv: list[str] = field(default_factory=list)  # arguments for a child process with the same settings
    chunk: int = field(default_factory=chunk_size)
    imported: list[dict[str, Any]] = field(default_factory=list)  # rows that another process measured

    def wants(self, method: str, kind: str = "leetcore") -> bool:
        return fnmatch(f"leetcore {method}" if kind == "leetcore" else method, self.pattern)

    def begin(self, text: str) -> bool:
        """Says what comes next, or records that it was not reached in time."""
        if self.late():
            self.facts.setdefault("not reached", []).append(text)
            return False
        self.say(text)
        return True

    def row(self, section: str, method: str, p: Problem, kind: str = "leetcore", **fields: Any) -> Row:
        credited = p.credits(self.chunk, method) | fields
        return Row(method, kind, p.shape, p.dtype_name, p.decay, section, **credited)

    def leetcore(self, section: str, p: Problem, method: str = "chunk", reuse: bool = False, **fields: Any) -> Row:
        """A row that has passed the gate or says why not; reuse: the output is preallocated."""
        row = self.row(section, f"{method} out=" if reuse else method, p, **fields)
        try:
            call = p.call(method, torch.empty_like(p.v) if reuse else None)
        except NotImplementedError as error:
            row.status = f"refused: {refusal(method, error)}"
        except Exception as error:
            row.status = f"failed: {sentence(error)}"
        else:
            session.gate(row, call, p.judge, self.timer)
        return row

    def rival_rows(self, section: str, p: Problem) -> list[Row]:
        """The fastest variant of every rival; `left_out` says which variants failed."""
        rows = []
        for rival in p.against:
            candidates = []
            for label, factory in p.factories(rival, self.quick).items() if self.wants(rival.name, "rival") else ():
                name = f"{rival.name}: {label}" if rival.each else rival.name
                row = self.row(section, name, p, "rival", note="" if rival.each else label)
                candidates.append((row, factory))
            keep = max(1, len(candidates)) if rival.each else 1
            finalists = 2 if self.quick else 6
            kept, failed = session.tune(candidates, p.judge, keep, finalists, self.tick, self.timer)
            rows += kept
            self.left_out += [
                {"section": section, "rival": rival.name, "shape": str(p.shape), "dtype": p.dtype_name}
                | {"candidate": row.note, "status": row.status, "error": row.to_json()["error"]}
                | {"wrong_seconds": row.took if row.status == "wrong" else None}
                for row in failed
            ]
        return rows

    def measure(self, rows: list[Row], rounds: int | None = None, ceiling: Callable[[], float] | None = None) -> None:
        super().measure([row for row in rows if self.wants(row.method, row.kind)], rounds, ceiling)
