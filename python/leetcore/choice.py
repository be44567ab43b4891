"""Which method a call takes, what each method answers to it, and what decided."""

from __future__ import annotations

from typing import Literal, NamedTuple

from . import _core, tuning
from .arrays import Array, library_of
from .methods import registered
from .options import Layout, Precision, method_name, options, plain

Op = Literal["forward", "backward", "decode"]
_OPS = ("forward", "backward", "decode")  # in the order of lc_op
_ARRAYS = ("q", "k", "v", "log_decay", "initial_state", "cu_seqlens")


class Candidate(NamedTuple):
    """The answer of one method to one call. The figures are None with a refusal, and for registered
    functions.

    Attributes:
        method: its name in `leetcore.methods()`.
        device: its device there.
        refusal: why the method does not serve the call, None if it does.
        model_us: microseconds, as the cost model predicts.
        correction: measured over predicted time, from the tuning table; 1 where nothing was
            measured.
        microseconds: model_us * correction; "auto" takes the smallest.
        bound: the largest part of the prediction: "compute", "memory" or "overhead".
        flop: as in `leetcore.Cost`.
        least_bytes: as in `leetcore.Cost`.
        bytes: as in `leetcore.Cost`.
        workspace: as in `leetcore.Cost`.
        depth: as in `leetcore.Cost`.
    """

    method: str
    device: str
    refusal: str | None = None
    model_us: float | None = None
    correction: float | None = None
    microseconds: float | None = None
    bound: str | None = None
    flop: float | None = None
    least_bytes: float | None = None
    bytes: float | None = None
    workspace: int | None = None
    depth: float | None = None


class Candidates(NamedTuple):
    """The choice among the methods for one call.

    Attributes:
        op: "forward", "backward" or "decode".
        chosen: the candidate that the call runs.
        decided_by: "method" (the argument names it), "LEETCORE_METHOD" (the variable does), "only"
            (no other method serves the call) or "prediction" (its microseconds are the fewest).
        table: the tuning table that corrects predictions: "shipped", or the path of the file that
            `leetcore tune` wrote.
        all: the candidates in the order of `leetcore.methods()`.
    """

    op: Op
    chosen: Candidate
    decided_by: str
    table: str
    all: list[Candidate]


def candidates(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | float | None = None,
    *,
    op: Op = "forward",
    scale: float = 1.0,
    initial_state: Array | None = None,
    state: Array | None = None,
    return_state: bool = False,
    cu_seqlens: Array | None = None,
    layout: Layout = "bhnd",
    method: str = "auto",
    precision: Precision | None = None,
) -> Candidates:
    """What each method answers to a call, and which one the call takes. Nothing is computed.

    Args:
        q, k, v, log_decay, scale, initial_state, cu_seqlens, layout, method, precision: as in
            `leetcore.linear_attention`; q, k and v of a decode step may be [B, H, K].
        op: "forward" (`linear_attention`), "backward" (`linear_attention_backward` with d_o, of
            every argument that is given) or "decode" (`decode_step`).
        state: for op="decode", the pool as in `leetcore.decode_step`; None stands for a float32
            pool (float64 with float64 inputs) with a slot per sequence.
        return_state: whether the call returns the final state; with op="backward": whether
            d_final_state is given.

    Returns:
        The choice and a `Candidate` for each method of `leetcore.methods()`.

    Raises:
        ValueError, TypeError, NotImplementedError: as the call itself.
    """
    if op not in _OPS:
        raise ValueError(f"op: expected one of {', '.join(_OPS)}, got {op!r}")
    if op == "decode" and initial_state is not None:
        raise ValueError('initial_state: op "decode" has none, as it updates state; expected None')
    if op != "decode" and state is not None:
        raise ValueError(f'state: only op "decode" takes it; expected None with op "{op}"')
    log_decay = plain(log_decay)
    arrays = (q, k, v, log_decay, state if op == "decode" else initial_state, cu_seqlens)
    lib, queue = library_of(_ARRAYS, *arrays).at(q, None)
    mine = registered.get(method_name(method))
    settings = options(scale, "auto" if mine else method, layout, precision, queue)
    index, decided_by, table, rows = _core.candidates(lib, _OPS.index(op), *arrays, return_state, settings)
    answers = [Candidate(*row) for row in rows]
    chosen = answers[index]
    states = return_state or initial_state is not None
    per_token = len(getattr(log_decay, "shape", ())) == 3
    for function in registered.values():
        answer = Candidate(function.row.name, "python", function.refusal(op == "forward", states, per_token))
        answers.append(answer)
        if function is mine:
            if answer.refusal:
                raise NotImplementedError(f"method: {method!r} {answer.refusal}")
            chosen, decided_by = answer, "method"
    return Candidates(op, chosen, decided_by, tuning.source if table == "set" else table, answers)


def explain(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | float | None = None,
    *,
    op: Op = "forward",
    scale: float = 1.0,
    initial_state: Array | None = None,
    state: Array | None = None,
    return_state: bool = False,
    cu_seqlens: Array | None = None,
    layout: Layout = "bhnd",
    method: str = "auto",
    precision: Precision | None = None,
) -> str:
    """`candidates` as text: a line that says what decided, and a line per method; * marks the
    chosen one.

    The arguments are those of `candidates`.

    Raises:
        ValueError, TypeError, NotImplementedError: as the call itself.
    """
    choice = candidates(
        q,
        k,
        v,
        log_decay,
        op=op,
        scale=scale,
        initial_state=initial_state,
        state=state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        layout=layout,
        method=method,
        precision=precision,
    )
    name = choice.chosen.method
    first = {
        "prediction": f"the shortest prediction decides: {name} (tuning table: {choice.table})",
        "only": f"only {name} serves this call",
    }.get(choice.decided_by, f"{choice.decided_by} names {name}")
    return "".join(f"{line}\n" for line in [first, *(_line(x, choice.chosen) for x in choice.all)])


def _line(x: Candidate, chosen: Candidate) -> str:
    head = f"{'*' if x is chosen else ' '} {x.method:10} {x.device:6}"
    if x.refusal is not None:
        return f"{head}  cannot: {x.refusal}"
    if x.microseconds is None or x.flop is None or x.bytes is None:
        return f"{head}  runs when it is named"
    if x is chosen or chosen.microseconds is None:
        verdict = "chosen" if x is chosen else "serves it"
    else:
        verdict = f"{x.microseconds / chosen.microseconds:.2f} times the chosen"
    return (
        f"{head}  {verdict}: predicted {x.microseconds:.1f} us (model {x.model_us:.1f} us x correction "
        f"{x.correction:.2f}, bound by {x.bound}), {x.flop / 1e6:.4g} Mflop, {x.bytes / 1e6:.4g} MB moved, workspace "
        f"{x.workspace} bytes, depth {x.depth:.0f}"
    )
