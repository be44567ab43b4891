"""The record mamba2_speed, and its sections of operators: prefill, decoding, convolution.

The methods of a case are sampled in turn. The row of a rival has `ratio`: the statistic of its time
over that of leetcore's first row in the same round.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lab
import leetcore
import mamba2_calls as calls
import mamba2_rivals
import torch
import transformers
from leetcore import reference
from leetcore.bench import machine, options, session
from leetcore.bench import results as of
from leetcore.bench.ceilings import Ceilings
from leetcore.bench.problems import TOLERANCE
from leetcore.bench.speed import collect
from leetcore.bench.timing import SAMPLE_S, SETTLE_S, SLOW_S, Call, clock_ceiling, stats
from mamba2_calls import DTYPES, Heads, exact

HERE = Path(__file__).parent
LEAST, MOST = 5, 25  # samples of a row, unless it is slow
DECAY = "new layers, G={}"
# H, P, K, G
HEADS = (
    *((128, 64, 128, 1), (128, 64, 128, 8), (48, 64, 128, 1), (24, 64, 128, 1)),
    *((32, 64, 256, 1), (32, 64, 64, 1), (96, 80, 128, 8), (64, 64, 96, 8)),
)
LENGTHS = (128, 512, 2048)
MORE_LENGTHS = (1, 4096, 16384)  # of the first heads, without transformers, whose temporaries are large
# Methods whose memory is measured, with the first heads.
MEMORY = {"leetcore.ssd": calls.prefill, "transformers": calls.prefill_of_transformers}
MEMORY_LENGTHS = (512, 2048)
STEPPED = (HEADS[0], HEADS[2])
BATCHES = (1, 4, 16, 64)
CHANNELS, TAPS = 8448, 4
QUICK = (24, 64, 128, 1)

Prepared = tuple[list["Row"], Callable[[], float] | None]  # rows, and their ceiling if it is not the matrix product


@dataclass(eq=False)
class Row(session.Row):
    """A row that may be compared with another row of its case, sample by sample."""

    base: session.Row | None = None

    def to_json(self) -> dict[str, Any]:
        if self.base is None:
            return super().to_json()
        pairs = zip(self.seconds, self.base.seconds, strict=False)  # a slow row has fewer samples
        return super().to_json() | {"ratio": stats(a / b for a, b in pairs)}


@dataclass(frozen=True)
class Case:
    """Methods that are sampled in turn; `prepare` makes their inputs and lets them pass the
    gate."""

    text: str
    prepare: Callable[[], Prepared]


def shape_of(heads: tuple[int, int, int, int], N: int, batch: int = 1) -> Heads:
    H, P, K, G = heads
    return Heads(batch, H, N, K, P, G)


def against_first(rows: list[Row]) -> list[Row]:
    """The rows, each of which is compared with the first one."""
    for row in rows[1:]:
        row.base = rows[0]
    return rows


# ---- prefill


def memory(method: str, tokens: int) -> int | None:
    """Bytes by which a call on the first heads raises the peak of this process; float32."""
    call = MEMORY[method]
    lab.set_threads(machine.cores())
    call(calls.inputs(Heads(1, 1, 1, 16, 16), torch.float32))()  # loads code and starts threads
    return machine.extra_memory(call(calls.inputs(shape_of(HEADS[0], tokens), torch.float32)))


def memory_of_child(method: str, tokens: int) -> int | None:
    """`memory` in a new process."""
    command = [sys.executable, str(HERE / "mamba2.py"), "memory", method, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) if done.stdout.strip().isdigit() else None


def prefill(shape: Heads, dtype: str, rival: bool, measure_memory: bool) -> Prepared:
    """leetcore.ssd, linear_attention with the same heads and decays, the scan of transformers, and
    the optional rivals."""
    given = calls.inputs(shape, DTYPES[dtype])
    want = calls.wanted(given)
    judged = calls.judge(want, dtype)
    found = [
        ("leetcore.ssd", "leetcore", calls.prefill, judged),
        ("leetcore.linear_attention", "leetcore", calls.prefill_of_operator, None),
    ]
    if rival:
        loose = calls.judge(want, dtype, calls.LOOSE)
        others = {"transformers": calls.prefill_of_transformers} | mamba2_rivals.prefills(dtype)
        found += [(name, "rival", call, loose) for name, call in others.items()]
        bare = mamba2_rivals.operators(dtype)
        found += [(name, "rival", lambda x, f=call: f(calls.bare(x)), None) for name, call in bare.items()]
    rows, flop = [], shape.exact_flop(lab.chunk_size())
    for method, kind, call, compare in found:
        row = Row(method, kind, shape, dtype, DECAY.format(shape.G), "prefill", work=flop, flop=flop)
        row.least_bytes = float(shape.token_bytes(DTYPES[dtype].itemsize))
        compare = compare or calls.judge(calls.wanted_of_operator(given), dtype)
        rows.append(session.gate(row, call(given), compare))
        if measure_memory and method in MEMORY:
            row.peak_bytes = memory_of_child(method, shape.N)
    return against_first(rows), None


def prefill_cases(quick: bool) -> Iterator[Case]:
    problems = [(heads, N, "float32", True) for heads in HEADS for N in LENGTHS]
    problems += [(heads, N, "bfloat16", True) for heads in HEADS[:3] for N in LENGTHS]
    problems += [(HEADS[0], N, dtype, False) for dtype in DTYPES for N in MORE_LENGTHS]
    for heads, N, dtype, rival in [(QUICK, LENGTHS[0], "float32", True)] if quick else problems:
        measured = not quick and heads == HEADS[0] and dtype == "float32" and N in MEMORY_LENGTHS
        shape = shape_of(heads, N)
        yield Case(f"prefill, {shape}, {dtype}", partial(prefill, shape, dtype, rival, measured))


# ---- decoding


def decoding(shape: Heads, dtype: str) -> Prepared:
    """A step of each sequence with states in float32. The ceiling is a copy of a buffer as large as
    all states."""
    given = calls.inputs(shape, DTYPES[dtype])
    token = calls.part(given, 0)
    start = torch.randn(shape.B, shape.H, shape.V, shape.K)
    pool, other = torch.ones(2, shape.state_bytes() // 4)
    moved = 2.0 * shape.state_bytes()
    of_layers = {"leetcore.ssd_step": calls.our_step, "transformers": calls.their_step}
    steps = {name: partial(step, **token, state=start.clone()) for name, step in of_layers.items()}
    steps |= {name: make(token, start.clone()) for name, make in mamba2_rivals.steps(dtype).items()}
    rows = []
    for method, call in steps.items():
        kind, loose = ("rival", calls.LOOSE) if rows else ("leetcore", 1)
        row = Row(method, kind, shape, dtype, DECAY.format(shape.G), "decoding", work=moved, unit="bytes")
        row.least_bytes = moved + shape.token_bytes(DTYPES[dtype].itemsize)
        row.flop = 5.0 * shape.B * shape.H * shape.K * shape.V
        rows.append(session.gate(row, call, calls.judge_step(given, start, dtype, loose)))
    return against_first(rows), lambda: moved / clock_ceiling(lambda: other.copy_(pool))


def decoding_cases(quick: bool) -> Iterator[Case]:
    problems = [(heads, batch, dtype) for heads in STEPPED for batch in BATCHES for dtype in DTYPES]
    for heads, batch, dtype in [(QUICK, 1, "float32")] if quick else problems:
        shape = shape_of(heads, 1, batch)
        yield Case(f"decoding, {shape}, {dtype}", partial(decoding, shape, dtype))


# ---- convolution


def convolution(channels: int, tokens: int, dtype: str, activation: str | None) -> Prepared:
    """The convolution on channels that are contiguous, as in the layers. The row's H is the number
    of channels, and its K the number of taps.

    torch has the faster of two layouts; the other one has contiguous tokens, made outside of the
    timing.
    """
    torch.manual_seed(0)
    x = torch.randn(1, tokens, channels).to(DTYPES[dtype]).mT
    weight, bias = (torch.randn(size).to(DTYPES[dtype]) for size in ((channels, TAPS), (channels,)))
    few = [exact(value) for value in (x[..., : calls.JUDGED], weight, bias)]
    want = reference.causal_conv1d(*few, activation=activation)[0]
    moved = 2.0 * x.nbytes + weight.nbytes + bias.nbytes

    def judged(call: Call) -> tuple[float, bool]:
        error = reference.error(exact(call()[..., : calls.JUDGED]), want)
        return error, error <= calls.LOOSE * TOLERANCE[dtype][0]  # torch rounds before silu

    def of_torch(given: torch.Tensor) -> Call:
        def call() -> torch.Tensor:
            padded = torch.nn.functional.conv1d(given, weight[:, None], bias, padding=TAPS - 1, groups=channels)
            y = padded[..., :tokens]
            return torch.nn.functional.silu(y) if activation else y

        return call

    def row(method: str, kind: str, note: str = "") -> Row:
        section = f"convolution, {activation or 'no activation'}"
        shape = Heads(1, channels, tokens, TAPS, 1)
        return Row(method, kind, shape, dtype, "", section, work=moved, unit="bytes", least_bytes=moved, note=note)

    ours = row("leetcore.causal_conv1d", "leetcore")
    session.gate(ours, lambda: leetcore.causal_conv1d(x, weight, bias, activation=activation), judged)
    layouts = {"channels contiguous": lambda: of_torch(x), "tokens contiguous": lambda: of_torch(x.contiguous())}
    candidates = [(row("torch conv1d", "rival", note), factory) for note, factory in layouts.items()]
    kept, failed = session.tune(candidates, judged)
    source, target = x.mT.contiguous(), torch.empty_like(x.mT)
    copied = 2.0 * source.nbytes
    return against_first([ours, *(kept or failed[:1])]), lambda: copied / clock_ceiling(lambda: target.copy_(source))


def convolution_cases(quick: bool) -> Iterator[Case]:
    channels, tokens = (1024, 256) if quick else (CHANNELS, 2048)
    for dtype in list(DTYPES)[: 1 if quick else None]:
        for activation in (None, "silu"):
            text = f"convolution, {channels} channels, {activation or 'no activation'}, {dtype}"
            yield Case(text, partial(convolution, channels, tokens, dtype, activation))


# ---- the record


SECTIONS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "prefill": prefill_cases,
    "decoding": decoding_cases,
    "convolution": convolution_cases,
}


def affordable(rows: list[Row], seconds: float, most: int, overhead: float) -> int:
    """Rounds that fit into the time, at least LEAST. A call slower than SLOW_S has fewer samples.

    overhead: seconds around a sample, for its pause and its ceiling.
    """
    took = [row.took for row in rows if row.call]

    def cost(rounds: int) -> float:
        samples = [rounds if t < SLOW_S else max(of.FEWEST, int(rounds * SLOW_S / t)) for t in took]
        return sum(n * (max(2 * SAMPLE_S, t) + overhead) for n, t in zip(samples, took, strict=True))

    left = seconds - sum(took)  # every row has one more call before its samples
    return max((n for n in range(LEAST, most + 1) if cost(n) <= left), default=min(LEAST, most))


def measure(cases: list[Case], minutes: float, most: int = MOST, say: Callable[[str], Any] = print) -> of.Results:
    """Measures the cases; returns the file of results.

    The time that is left is shared out over the cases that are left. Every row has at least FEWEST
    samples, even if they take longer.
    """
    threads = machine.cores()
    lab.set_threads(threads)
    found = session.Session(most, Ceilings(threads, ("torch",)))
    overhead = SETTLE_S + 2 * 2 * 1024**3 / found.ceilings.matmul() + SETTLE_S
    end, interrupted = time.monotonic() + 60 * minutes, False
    for at, case in enumerate(cases):
        say(f"{at + 1} of {len(cases)}: {case.text}")
        share = (end - time.monotonic()) / (len(cases) - at)
        start = time.monotonic()
        try:
            rows, ceiling = case.prepare()
            left = share - (time.monotonic() - start)
            found.measure(rows, affordable(rows, left, most, overhead), ceiling)
        except KeyboardInterrupt:
            interrupted = True
            break
        except Exception as error:  # the other cases are measured still
            found.facts.setdefault("failed", {})[case.text] = options.sentence(error)
    versions = {"transformers": transformers.__version__} | mamba2_rivals.versions()
    found.facts |= {"chunk": lab.chunk_size(), "rivals": versions}
    return collect(found, "mamba2_speed", HERE, interrupted=interrupted)
