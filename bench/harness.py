"""Problems, the float64 oracle, timing and the ceilings: what every section of the benchmark stands on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from leetcore.bench import problems
from leetcore.bench.timing import CPU, Call, Timer, clock, clock_ceiling, interleave, stats  # noqa: F401
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative Frobenius error against float64 on the same rounded inputs, above which a time is no speed.
TOLERANCE = {dtype: problems.TOLERANCE[name][0] for name, dtype in DTYPES.items()}
# Likewise of gradients; that of log_decay, a difference of two sums, may have twice as much where inputs have 16 bits.
GRADIENT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}

Factory = Callable[[], Call]  # prepares (tables, buffers) outside the timing


@dataclass(frozen=True)
class Shape(problems.Shape):
    """B sequences, H heads, N tokens, key dim K, value dim V; with the work that every method is credited with."""

    def exact_flop(self, chunk: int) -> int:
        """Chunkwise work that causality cannot spare: half of the diagonal blocks, and the state twice."""
        return self.B * self.H * self.N * ((chunk + 1) * (self.K + self.V) + 4 * self.K * self.V)

    def dense_flop(self, chunk: int) -> int:
        """The same with full diagonal blocks: what a chain of plain matrix products does."""
        return self.B * self.H * self.N * (2 * chunk * (self.K + self.V) + 4 * self.K * self.V)

    def state_bytes(self) -> int:
        return 4 * self.B * self.H * self.K * self.V

    def token_bytes(self, dtype: torch.dtype) -> int:
        """q, k, v read once, o written once."""
        return 2 * self.B * self.H * self.N * (self.K + self.V) * dtype.itemsize


def alibi(heads: int) -> Tensor:
    """log_decay [H] of ALiBi's slopes 2^(-8 (h + 1) / H)."""
    return -torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], dtype=torch.float64).float()


def gates(shape: Shape) -> Tensor:
    """log_decay [B, H, N] as gated layers compute it, log(sigmoid(x)) / 16 of normal x."""
    x = torch.randn(shape.B, shape.H, shape.N, generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.logsigmoid(x) / 16


def normals(sizes: list[tuple[int, ...]], dtype: torch.dtype, seed: int, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes]


@dataclass(eq=False)
class Problem:
    """Inputs of one forward call: q, k [B, H, N, K], v [B, H, N, V] of `dtype`, log_decay [H] fp32."""

    shape: Shape
    dtype: torch.dtype
    log_decay: Tensor
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        s = self.shape
        self.log_decay = self.log_decay.to(self.device)
        sizes = [(s.B, s.H, s.N, d) for d in (s.K, s.K, s.V)]
        self.q, self.k, self.v = normals(sizes, self.dtype, self.seed, self.device)

    @property
    def gamma(self) -> Tensor:
        """Decay per step, float64 [H]."""
        return self.log_decay.double().exp()

    @cached_property
    def references(self) -> list[Tensor]:
        """What successive calls must return, float64."""
        return [chunk_oracle(self.q, self.k, self.v, self.log_decay)[0]]


@dataclass(eq=False)
class TrainingProblem(Problem):
    """A forward and a backward pass: also d_o [B, H, N, V]; log_decay [H] is constant, and [B, H, N] has a gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        [self.d_o] = normals([tuple(self.v.shape)], self.dtype, self.seed + 1, self.device)

    def leaves(self) -> dict[str, Tensor]:
        """What gradients are wanted of: tensors of the same memory."""
        names = ("q", "k", "v", "log_decay")[: 4 if self.log_decay.ndim == 3 else 3]
        return {name: getattr(self, name).detach().requires_grad_() for name in names}

    @cached_property
    def wanted(self) -> dict[str, Tensor]:
        """o and the gradients, float64, by name: what a call may return."""
        found = gradient_oracle(self.q, self.k, self.v, self.log_decay, self.d_o)
        return {"o": self.references[0]} | {name: found[name] for name in (f"d_{leaf}" for leaf in self.leaves())}

    def tolerance(self, name: str) -> float:
        if name == "o":
            return TOLERANCE[self.dtype]
        twice = name == "d_log_decay" and self.dtype.itemsize == 2
        return (2 if twice else 1) * GRADIENT_TOLERANCE[self.dtype]

    def decay_bytes(self) -> int:
        return self.log_decay.nbytes if self.log_decay.ndim == 3 else 0

    def backward_bytes(self) -> int:
        """q, k, v, d_o read once, the gradients of q, k, v written once; decays of tokens likewise."""
        s = self.shape
        gradients = s.B * s.H * s.N * (2 * s.K + s.V) * self.dtype.itemsize
        return s.token_bytes(self.dtype) + gradients + 2 * self.decay_bytes()


@dataclass(eq=False)
class DecodeProblem:
    """One decode step (N = 1): q, k [B, H, K], v [B, H, V] of `dtype`, state [B, H, K, V] fp32, log_decay [H] fp32."""

    shape: Shape
    dtype: torch.dtype
    log_decay: Tensor
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        s = self.shape
        self.log_decay = self.log_decay.to(self.device)
        sizes = [(s.B, s.H, d) for d in (s.K, s.K, s.V)]
        self.q, self.k, self.v = normals(sizes, self.dtype, self.seed, self.device)
        self.initial_state = normals([(s.B, s.H, s.K, s.V)], torch.float32, self.seed + 1, self.device)[0]

    @property
    def gamma(self) -> Tensor:
        return self.log_decay.double().exp()

    @cached_property
    def references(self) -> list[Tensor]:
        """What the first two steps must return, float64: the second one reads the state the first one wrote."""
        q, k, v = (x.double().unsqueeze(2).expand(-1, -1, 2, -1) for x in (self.q, self.k, self.v))
        return list(recurrence_oracle(q, k, v, self.gamma, self.initial_state.double())[0].unbind(2))


# ---------------------------------------------------------------------------------------------------- oracle


def recurrence_oracle(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token, in float64: o [B, H, N, V] and the final state [B, H, K, V]."""
    q, k, v = q.double(), k.double(), v.double()
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state
    decay, o = gamma[:, None, None], torch.empty_like(v)
    for t in range(q.shape[2]):
        state = decay * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        o[:, :, t] = (q[:, :, t, None, :] @ state).squeeze(2)
    return o, state


def chunk_oracle(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int = 128) -> tuple[Tensor, Tensor]:
    """The same in chunks of all heads, of a decay [H] or [B, H, N]."""
    g = log_decay.double().clamp(min=-1000)  # exp(-1000) is 0, and sums of it have differences
    g = g if g.ndim == 3 else g[None, :, None].expand(1, -1, q.shape[2])
    o = torch.empty(v.shape, dtype=torch.float64, device=q.device)
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float64, device=q.device)
    for start in range(0, q.shape[2], chunk):
        Q, K, V = (x[:, :, start : start + chunk].double() for x in (q, k, v))
        G = g[:, :, start : start + chunk, None].cumsum(2)  # [B or 1, H, n, 1]
        mask, end = (G - G.mT).tril().exp().tril(), G[:, :, -1:]
        o[:, :, start : start + chunk] = (Q @ K.mT * mask) @ V + G.exp() * (Q @ state)
        state = end.exp() * state + ((end - G).exp() * K).mT @ V
    return o, state


def gradient_oracle(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, d_o: Tensor) -> dict[str, Tensor]:
    """Gradients in float64: the operator over other operands, those of k and v backward in time.

    A token decays what comes before it: backward in time, what the token before it has added. The sum of log_decay up
    to a token multiplies what the token reads and divides what it writes.
    """
    late = log_decay.flip(2).roll(1, 2) if log_decay.ndim == 3 else log_decay
    q_late, k_late, v_late, d_o_late = (x.flip(2) for x in (q, k, v, d_o))
    d_q = chunk_oracle(d_o, v, k, log_decay)[0]
    d_k = chunk_oracle(v_late, d_o_late, q_late, late)[0].flip(2)
    d_v = chunk_oracle(k_late, q_late, d_o_late, late)[0].flip(2)
    found = {"d_q": d_q, "d_k": d_k, "d_v": d_v}
    if log_decay.ndim == 3:
        found["d_log_decay"] = ((q * d_q).sum(3) - (k * d_k).sum(3)).flip(2).cumsum(2).flip(2)
    return found


def training_step(forward: Callable[..., Tensor], leaves: dict[str, Tensor], d_o: Tensor) -> dict[str, Tensor]:
    """One forward and backward pass: o and the gradients by name; the leaves keep none."""
    o = forward(**leaves)
    o.backward(d_o)
    results = {"o": o.detach()}
    for name, x in leaves.items():
        assert x.grad is not None
        results[f"d_{name}"], x.grad = x.grad, None
    return results


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||, Frobenius; nan or inf if anything is not finite."""
    return float((out.double() - reference).norm() / reference.norm())


# ---------------------------------------------------------------------------------------------------- ceilings


class Ceilings:
    """What the machine can do at this moment: fp32 matmul rate (flop/s), copy bandwidth (bytes/s, read + written)."""

    def __init__(self) -> None:
        self.a, self.b, self.c = (torch.randn(1024, 1024) for _ in range(3))
        self.source, self.target = torch.ones(1 << 26), torch.ones(1 << 26)  # 256 MB each
        self.matmul_rates: list[float] = []  # of the whole run: how quiet the machine was
        self.matmul(), self.copy()
        self.matmul_rates.clear()

    def matmul(self) -> float:
        seconds = clock_ceiling(lambda: torch.mm(self.a, self.b, out=self.c))
        self.matmul_rates.append(2 * 1024**3 / seconds)
        return self.matmul_rates[-1]

    def copy(self) -> float:
        return copy_rate(self.source, self.target)


def copy_rate(source: Tensor, target: Tensor) -> float:
    return 2 * source.nbytes / clock_ceiling(lambda: target.copy_(source))


# ---------------------------------------------------------------------------------------------------- rows


@dataclass(eq=False)
class Row:
    """One method on one problem: its call, what the gate said, and its samples."""

    section: str
    method: str
    shape: Shape
    dtype: str
    call: Call | None = None  # None: nothing to time (skipped)
    work: float = 0.0  # flop (exact causal) or bytes of one call
    dense_work: float = 0.0  # flop, dense-equivalent
    status: str = "ok"  # ok | wrong | not finite | skipped: why
    note: str = ""
    peers: list[str] = field(default_factory=list)  # shapes whose rate this one is held against
    error: float | None = None
    wrong_ms: float | None = None  # of one call that fails the gate: no speed
    seconds: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)  # the adjacent ceiling, in units of work per second
    copy: list[float] = field(default_factory=list)  # copy bandwidth of the round
    host_us: list[float] = field(default_factory=list)  # on a GPU: until the call returns
    peak_bytes: int | None = None  # of memory that a call has in use beside its inputs, results included

    @property
    def fractions(self) -> list[float]:
        return [self.work / t / c for t, c in zip(self.seconds, self.beside, strict=True)]

    def to_json(self) -> dict[str, Any]:
        scale = self.dense_work / self.work if self.work else 0.0
        keys = ("section", "method", "dtype", "status", "note", "peers", "error", "wrong_ms", "work", "dense_work")
        keys += ("peak_bytes",)
        return {
            **{key: getattr(self, key) for key in keys},
            "shape": str(self.shape),
            "ms": stats(1e3 * t for t in self.seconds),
            "rate": stats(self.work / t for t in self.seconds) if self.work else None,
            "fraction": stats(self.fractions) if self.work else None,
            "dense_fraction": stats(scale * f for f in self.fractions) if scale else None,
            "ceiling": stats(self.beside),
            "copy": stats(self.copy),
            "host_us": stats(self.host_us),
        }


def worst_error(call: Call, references: list[Tensor]) -> float:
    """The largest relative error of successive calls; inf if an output is not finite."""
    errors = [relative_error(call(), reference) for reference in references]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def verdict(call: Call, p: Problem | DecodeProblem) -> tuple[str, float | None]:
    """The correctness gate: "ok", "wrong" or "not finite", and the largest error."""
    if isinstance(p, TrainingProblem):
        found = [(relative_error(x, p.wanted[name]), p.tolerance(name)) for name, x in call().items()]
    else:
        found = [(worst_error(call, p.references), TOLERANCE[p.dtype])]
    if not all(math.isfinite(error) for error, _ in found):
        return "not finite", None
    right = all(error <= tolerance for error, tolerance in found)
    return ("ok" if right else "wrong"), max(error for error, _ in found)


def gate(row: Row, p: Problem | DecodeProblem, timer: Timer = CPU) -> Row:
    """Runs the row and fills its status and error; what fails is timed once, as the cost of a wrong answer."""
    assert row.call is not None
    row.status, row.error = verdict(row.call, p)
    if row.status != "ok":
        row.wrong_ms = 1e3 * timer.clock(row.call, 1)
    return row


@dataclass(eq=False)
class Candidate:
    """A way to call a rival; `status` is ok, what the gate said, or what it raised."""

    name: str
    call: Call | None = None
    status: str = ""
    error: float | None = None
    seconds: float | None = None


def try_out(name: str, factory: Factory, p: Problem | DecodeProblem, timer: Timer = CPU) -> Candidate:
    """Prepares, gates and times one candidate once."""
    c = Candidate(name)
    try:
        call = factory()
        c.status, c.error = verdict(call, p)
        c.seconds = timer.clock(call, 1)
        c.call = call if c.status == "ok" else None  # frees its buffers
    except Exception as e:  # a rival's failure is a result, not the end of the run
        c.status = f"{type(e).__name__}: {e}".splitlines()[0]
    return c


def tune(
    factories: dict[str, Factory],
    p: Problem | DecodeProblem,
    keep: int = 1,
    finalists: int = 6,
    tick: Call = lambda: None,
    timer: Timer = CPU,
) -> tuple[list[Candidate], list[Candidate]]:
    """The `keep` fastest candidates that pass the gate, and all that do not. One pass over all, three over the best."""
    passed: list[tuple[float, Candidate]] = []
    failed: list[Candidate] = []
    for name, factory in factories.items():
        c = try_out(name, factory, p, timer)
        if c.call and c.seconds:
            passed = sorted([*passed, (c.seconds, c)], key=lambda pair: pair[0])[: max(finalists, keep)]
        else:
            failed.append(c)
        tick()
    for _ in range(3 if len(passed) > keep else 0):
        passed = [(min(seconds, timer.clock(c.call, 1)) if c.call else seconds, c) for seconds, c in passed]
    return [c for _, c in sorted(passed, key=lambda pair: pair[0])[:keep]], failed
