"""Attention over the bytes of a text, by every method of leetcore.

Each method is compared with the definition and timed.

python examples/text.py [FILE]

The bytes become q, k and v of one attention layer by a random embedding (byte for byte, without
positions) and random projections, so that every number has unit variance. Each of the 8 heads
decays at its own rate, ALiBi's slopes.
"""

import statistics
import sys
import time
from pathlib import Path

import leetcore
import numpy as np
from rich.console import Console
from rich.table import Table

HEADS, DIM, WIDTH = 8, 64, 256
MOST_BYTES = 16384  # for these the float64 recurrence takes seconds
DECODED = 16  # tokens at the end that are also generated step by step
ALLOWED = 5e-6  # relative error, for float32


def read(path):
    """The first bytes of the file, and its size."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    if not data:
        sys.exit(f"{path}: the file is empty; expected at least one byte")
    return np.frombuffer(data[:MOST_BYTES], np.uint8), len(data)


def layer(text):
    """q, k and v, [1, heads, tokens, dim], float32 of unit variance."""
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((256, WIDTH), np.float32)
    projections = rng.standard_normal((3, HEADS, WIDTH, DIM), np.float32) / np.float32(WIDTH**0.5)
    return (embedding @ projections)[:, None, :, text]  # project all 256 bytes, then take one row per token


def definition(q, k, v, log_decay, scale):
    """The recurrence by its definition, in float64."""
    q, k, v = (x[0].astype(np.float64) for x in (q, k, v))
    gamma, state, o = np.exp(log_decay.astype(np.float64))[:, None, None], 0.0, np.empty_like(v)
    for t in range(q.shape[1]):
        state = gamma * state + k[:, t, :, None] * v[:, t, None, :]
        o[:, t] = scale * (q[:, t, None, :] @ state)[:, 0]
    return o[None], state[None]


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def timed(call, runs=5, most_seconds=2.0):
    """The result, and the median time of at least three runs after one that is not counted."""
    result, seconds = call(), []
    while len(seconds) < 3 or (len(seconds) < runs and sum(seconds) < most_seconds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def decode(q, k, v, log_decay, scale):
    """The last tokens one by one, from the state after the others.

    Returns the outputs, the state and the seconds per step.
    """
    before = max(0, q.shape[2] - DECODED)
    first = (x[:, :, :before] for x in (q, k, v))
    _, state = leetcore.linear_attention(*first, log_decay, scale=scale, return_state=True)
    steps, seconds = [], []
    for t in range(before, q.shape[2]):
        token = [np.ascontiguousarray(x[:, :, t]) for x in (q, k, v)]
        start = time.perf_counter()
        steps.append(leetcore.decode_step(*token, state, log_decay, scale=scale))
        seconds.append(time.perf_counter() - start)
    return np.stack(steps, axis=2), state, statistics.median(seconds)


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "README.md"
    text, size = read(path)
    q, k, v = layer(text)
    log_decay, scale = leetcore.decay.alibi(HEADS), DIM**-0.5
    want, want_state = definition(q, k, v, log_decay, scale)

    rows = []
    for method in leetcore.methods():
        if method.device != "cpu":
            continue

        def call(name=method.name):
            return leetcore.linear_attention(q, k, v, log_decay, scale=scale, return_state=True, method=name)

        (o, state), seconds = timed(call)
        rows.append((method.name, error(o, want), error(state, want_state), seconds))
    quadratic = next(row[3] for row in rows if row[0] == "parallel")
    steps, state, a_step = decode(q, k, v, log_decay, scale)
    decoded = error(steps, want[:, :, -steps.shape[2] :]), error(state, want_state)

    part = f"the first {len(text)} of {size} bytes" if size > len(text) else f"{size} bytes"
    build = leetcore.build_info()
    table = Table(
        title=f"{Path(path).name}, {part}\n{HEADS} heads of {DIM}, float32, {build['isa']}, {build['threads']} threads",
        caption="errors: relative, against the definition in float64; speed: against the quadratic form, parallel",
    )
    for heading in ("method", "error of o", "error of state", "time", "speed"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, *errors, seconds in rows:
        table.add_row(name, *map("{:.1e}".format, errors), f"{seconds * 1e3:.2f} ms", f"{quadratic / seconds:.1f} x")
    table.add_row(f"decode_step x {steps.shape[2]}", *map("{:.1e}".format, decoded), f"{a_step * 1e3:.3f} ms each", "")
    Console().print(table)

    if not max(*decoded, *(max(row[1:3]) for row in rows)) <= ALLOWED:
        sys.exit(f"an error exceeds {ALLOWED:g}")


if __name__ == "__main__":
    main()
