"""The operator for arrays of any DLPack library: numpy, torch, cupy, jax and others in, the same kind out."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import numpy as np

from . import _core
from .arrays import Array, Stream, library_of, threads_of_framework
from .methods import registered, run_registered

Layout = Literal["bhnd", "bnhd"]
Precision = Literal["ieee", "tf32"]


class Gradients(NamedTuple):
    """What linear_attention_backward returns: like the arguments they are named after, None where not wanted."""

    d_q: Any
    d_k: Any
    d_v: Any
    d_log_decay: Any
    d_initial_state: Any


_MOST_THREADS = 4096
_FORWARD = ("q", "k", "v", "log_decay", "initial_state", "cu_seqlens", "out")
_BACKWARD = ("q", "k", "v", "log_decay", "initial_state", "cu_seqlens", "d_o", "d_final_state")
_DECODE = ("q", "k", "v", "state", "log_decay", "state_indices", "out")


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | float | None = None,
    *,
    scale: float = 1.0,
    initial_state: Array | None = None,
    return_state: bool = False,
    cu_seqlens: Array | None = None,
    layout: Layout = "bhnd",
    method: str = "auto",
    precision: Precision | None = None,
    out: Array | None = None,
    stream: Stream | None = None,
) -> Any:
    """Causal linear attention with exponential decay.

    For each head, with a state S of [K, V]::

        S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Args:
        q: [B, Hq, N, K]. Float64, float32, float16 or bfloat16, the same for q, k and v. Any strides; an array whose
            last dimension is not contiguous is copied.
        k: [B, Hk, N, K].
        v: [B, Hv, N, V].
        log_decay: natural log of the decay, <= 0 (-inf forgets everything): a number, [], [Hs], [B, Hs], or one value
            per token, [B, Hs, N]; float32 (float64 too with float64 inputs). None: no decay. See `leetcore.decay`.
        scale: multiplies the output. Not K**-0.5 unless you say so.
        initial_state: [B, Hs, K, V], float32 (float64 with float64 inputs), [S, Hs, K, V] with cu_seqlens.
        return_state: also return the state after the last token, shaped like initial_state.
        cu_seqlens: [S + 1] int32 or int64, from 0 to N: S sequences packed along the token axis; B is 1.
        layout: "bhnd", or "bnhd" for [B, N, H, D] (and log_decay [B, N, Hs]).
        method: "auto", or a name of `leetcore.methods()` (a registered function's too), or "lightning" for "chunk".
        precision: "ieee" (default) or "tf32", which lets GPUs round float32 products; the CPU never does.
        out: receives o; writable, its own memory.
        stream: for GPU arrays, where the work is put: a cudaStream_t as a number, or a stream of torch, cupy or
            cuda.core. None: the current stream of torch or cupy, jax's own order, else the legacy default stream.

    All arrays are on one device, and a call on a GPU returns before its work is done: o is ready for what is put on the
    same stream. The stream waits for what the library is still writing to the inputs. Values on a GPU are not checked.

    H = max(Hq, Hk, Hv) heads; each of Hq, Hk, Hv divides H, and a head reads q head h * Hq // H and so on.
    Hs = max(Hk, Hv) states.

    Returns:
        o [B, H, N, V] of q's dtype in the caller's array library, or (o, final_state).

    Raises:
        ValueError, TypeError: an argument breaks the rules above; the text names it, what it was and what is allowed.
        NotImplementedError: no method, or not the named one, serves the problem.
        RuntimeError: a GPU cannot be used, or reported an error.
    """
    log_decay = _scalar(log_decay)
    lib, queue = library_of(_FORWARD, q, k, v, log_decay, initial_state, cu_seqlens, out).at(q, stream)
    if registered and method in registered:
        explain(q, k, v, log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, layout=layout)
        return run_registered(
            registered[method],
            q,
            k,
            v,
            log_decay,
            _real("scale", scale),
            initial_state,
            return_state,
            cu_seqlens,
            _bnhd(layout),
            out,
        )
    try:
        return _core.forward(
            lib,
            q,
            k,
            v,
            log_decay,
            initial_state,
            cu_seqlens,
            out,
            _real("scale", scale),
            _name(method),
            _bnhd(layout),
            _tf32(precision),
            queue,
            threads_of_framework(),
            return_state,
        )
    except ValueError as error:
        if registered and "unknown method" in str(error):
            raise ValueError(f"{error}, {', '.join(registered)}") from None
        raise


def linear_attention_backward(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | float | None = None,
    *,
    d_o: Array | None = None,
    d_final_state: Array | None = None,
    scale: float = 1.0,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    layout: Layout = "bhnd",
    precision: Precision | None = None,
    wants: Collection[str] | None = None,
    stream: Stream | None = None,
) -> Gradients:
    """The gradients of `linear_attention`, whichever method computed it: of a loss whose gradients by its results are
    d_o and d_final_state. On a GPU: of float32, float16 and bfloat16, K and V up to 256.

    Args:
        q, k, v, log_decay, scale, initial_state, cu_seqlens, layout, precision, stream: as `linear_attention` had them.
        d_o: [B, H, N, V], the dtype of q. None: zeros.
        d_final_state: shaped like the state that return_state=True returns, of its dtype. None: zeros; not both.
        wants: names of the gradients to compute. Default: all whose argument was given.

    Returns:
        Gradients(d_q, d_k, d_v, d_log_decay, d_initial_state), each of the shape and dtype of what it is named after
        (d_initial_state may be asked for without one) and in the caller's array library. A decay that tokens, sequences
        or heads share has the sum over them. The gradient of log_decay = -inf is 0. On a GPU all are arrays there, that
        of a number as log_decay too, ready for what is put on the same stream.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_attention`.
        NotImplementedError: float64 on a GPU, or K or V above 256 there.
    """
    log_decay = _scalar(log_decay)
    lib, queue = library_of(_BACKWARD, q, k, v, log_decay, initial_state, cu_seqlens, d_o, d_final_state).at(q, stream)
    if wants is None:
        given = (True, True, True, log_decay is not None, initial_state is not None)
    else:
        if isinstance(wants, str) or not set(wants) <= set(Gradients._fields):
            raise ValueError(f"wants: expected names among {', '.join(Gradients._fields)}, got {wants!r}")
        d_q, d_k, d_v, d_log_decay, d_initial_state = (name in wants for name in Gradients._fields)
        given = (d_q, d_k, d_v, d_log_decay, d_initial_state)
    return Gradients(
        *_core.backward(
            lib,
            q,
            k,
            v,
            log_decay,
            initial_state,
            cu_seqlens,
            d_o,
            d_final_state,
            _real("scale", scale),
            _bnhd(layout),
            _tf32(precision),
            queue,
            threads_of_framework(),
            given,
        )
    )


def decode_step(
    q: Array,
    k: Array,
    v: Array,
    state: Array,
    log_decay: Array | float | None = None,
    *,
    scale: float = 1.0,
    state_indices: Array | None = None,
    out: Array | None = None,
    stream: Stream | None = None,
) -> Any:
    """One step (or a few tokens) of generation: updates states in place and returns the outputs.

    Args:
        q: [B, Hq, K], or [B, Hq, T, K] for T <= 64 tokens at once; k and v likewise.
        state: [slots, Hs, K, V], read and updated in place; float32 (float64 with float64 inputs). Float16 and bfloat16
            pools are taken too and rounded once a call: errors then grow with the number of calls where decay is slow.
        log_decay: a number, [], [Hs], [B, Hs] or [B, Hs, T], as in `linear_attention`.
        scale: multiplies the output.
        state_indices: int32 or int64 [B], the slot of each sequence, all different; -1 skips a sequence, whose output
            is 0. Default: sequence b uses slot b.
        out: receives the output.
        stream: as in `linear_attention`.

    Returns:
        o, [B, H, V] or [B, H, T, V]. Raises as `linear_attention`.
    """
    log_decay = _scalar(log_decay)
    lib, queue = library_of(_DECODE, q, k, v, state, log_decay, state_indices, out).at(q, stream)
    return _core.decode(
        lib, q, k, v, state, log_decay, state_indices, out, _real("scale", scale), queue, threads_of_framework()
    )


def explain(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | float | None = None,
    *,
    scale: float = 1.0,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    layout: Layout = "bhnd",
    method: str = "auto",
    precision: Precision | None = None,
) -> str:
    """Which method `linear_attention` would run (marked *), what each predicts, why others refuse; a line each."""
    log_decay = _scalar(log_decay)
    lib, queue = library_of(_FORWARD, q, k, v, log_decay, initial_state, cu_seqlens).at(q, None)
    text = _core.explain(
        lib,
        q,
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        _real("scale", scale),
        _name(method),
        _bnhd(layout),
        _tf32(precision),
        queue,
        threads_of_framework(),
    )
    return text + "".join(f"  {name:10} python  runs when it is named\n" for name in registered)


def build_info() -> dict[str, str]:
    """What was built and what is in use: version, compiler, isa, isas, cuda, threads, threads_source."""
    info = dict(line.split("=", 1) for line in _core.build_info().splitlines())
    threads, source = _core.thread_count(threads_of_framework())
    return info | {"threads": str(threads), "threads_source": source}


def set_num_threads(n: int) -> None:
    """Sets the number of threads of the CPU methods, for the whole process.

    Args:
        n: 1 to 4096; n < 1 takes the setting back, and the number is the caller's again: see `num_threads`.
    """
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool):
        raise TypeError(f"n: expected a whole number, got {type(n).__name__}")
    if n > _MOST_THREADS:
        raise ValueError(f"n: expected at most {_MOST_THREADS} threads, or 0 for the default, got {n}")
    _core.set_num_threads(max(int(n), 0))


def num_threads() -> int:
    """The number of threads that a call on the CPU uses at most, as of now.

    The first source that is there decides: `set_num_threads`; LEETCORE_NUM_THREADS; torch.get_num_threads() in a
    process that has loaded torch; the number of another OpenMP runtime in the process; OMP_NUM_THREADS; the cores that
    the affinity of the calling thread and the CPU quota of the control groups allow. These cores and OMP_THREAD_LIMIT
    also limit the numbers of torch and OpenMP. `build_info()["threads_source"]` names what decided.
    """
    return _core.thread_count(threads_of_framework())[0]


def _real(name: str, value: Any) -> float:
    try:
        if not isinstance(value, str):  # of which float() would read "1"
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def _scalar(value: Any) -> Any:
    """numpy's scalars are not arrays; log_decay may be one."""
    return float(value) if isinstance(value, np.generic) else value


def _name(method: Any) -> str:
    if not isinstance(method, str):
        raise TypeError(f"method: expected 'auto' or a name of leetcore.methods(), got {type(method).__name__}")
    return method


def _bnhd(layout: str) -> bool:
    if layout == "bhnd":
        return False
    if layout == "bnhd":
        return True
    raise ValueError(f"layout: expected 'bhnd' or 'bnhd', got {layout!r}")


def _tf32(precision: str | None) -> bool:
    if precision is None or precision == "ieee":
        return False
    if precision == "tf32":
        return True
    raise ValueError(f"precision: expected None, 'ieee' or 'tf32', got {precision!r}")
