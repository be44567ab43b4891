"""The operator for arrays of any DLPack library (numpy, torch, cupy, jax and others): results are
of the same library.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from . import _core
from .arrays import Array, Stream, library_of, threads_of_framework
from .choice import candidates
from .methods import registered, run_registered
from .options import Layout, Precision, is_bnhd, options, plain, real


class Gradients(NamedTuple):
    """The result of `linear_attention_backward`. Each gradient has the shape and the dtype of the
    argument in its name. A gradient that was not wanted is None.
    """

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
        q: [B, Hq, N, K] in float64, float32, float16 or bfloat16; q, k and v have the same dtype.
            Any strides are allowed; an array whose last dimension is not contiguous is copied.
        k: [B, Hk, N, K].
        v: [B, Hv, N, V].
        log_decay: natural log of the decay, <= 0 (-inf forgets everything): a number, [], [Hs], [B,
            Hs], or one value per token, [B, Hs, N]. Its dtype is float32 (float64 too with float64
            inputs). None means no decay. `leetcore.decay` makes common decays.
        scale: a number that multiplies the output; the default is 1, not K**-0.5.
        initial_state: [B, Hs, K, V], or [S, Hs, K, V] with cu_seqlens; float32 (float64 with
            float64 inputs). None means zeros.
        return_state: whether the state after the last token is returned too, shaped like
            initial_state.
        cu_seqlens: int32 or int64 [S + 1], the start offsets of S sequences that are packed along
            the token axis, from 0 to N; B is 1.
        layout: "bhnd", or "bnhd" for [B, N, H, D] (and log_decay [B, N, Hs]).
        method: "auto", a name of `leetcore.methods()` (registered functions included), or
            "lightning" for "chunk".
        precision: "ieee" (default) or "tf32", which lets GPUs round float32 products. The CPU never
            rounds them.
        out: an array that receives o; it is writable and shares no memory with another argument.
        stream: the stream of GPU arrays on which the work runs: a cudaStream_t as a number, or a
            stream of torch, cupy or cuda.core. None means the current stream of torch or cupy,
            jax's own order, and else the legacy default stream.

    All arrays are on one device. A call on a GPU returns before its work is done: o is ready for
    work that is put on the same stream later. The stream waits until the array library has written
    the inputs. Values on a GPU are not checked.

    There are H = max(Hq, Hk, Hv) heads; each of Hq, Hk, Hv divides H, and head h reads q head
    h * Hq // H (k and v alike). There are Hs = max(Hk, Hv) states per sequence.

    Returns:
        o [B, H, N, V] of q's dtype in the caller's array library, or (o, final_state).

    Raises:
        ValueError, TypeError: an argument breaks the rules above; the text names the argument, what
            was given and what is allowed.
        NotImplementedError: no method serves the call, or the named method does not.
        RuntimeError: a GPU cannot be used, or reported an error.
    """
    log_decay = plain(log_decay)
    arrays = (q, k, v, log_decay, initial_state, cu_seqlens, out)
    lib, queue = library_of(_FORWARD, *arrays).at(q, stream)
    if registered and method in registered:
        candidates(
            q,
            k,
            v,
            log_decay,
            scale=scale,
            initial_state=initial_state,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
            layout=layout,
            method=method,
        )
        return run_registered(
            registered[method],
            q,
            k,
            v,
            log_decay,
            real("scale", scale),
            initial_state,
            return_state,
            cu_seqlens,
            is_bnhd(layout),
            out,
        )
    try:
        return _core.forward(lib, *arrays, return_state, options(scale, method, layout, precision, queue))
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
    """The gradients of a loss by the arguments of `linear_attention`, whichever method computed its
    results.

    The gradients of the loss by the results are d_o and d_final_state. GPUs serve float32, float16
    and bfloat16, with K and V up to 256.

    Args:
        q, k, v, log_decay, scale, initial_state, cu_seqlens, layout, precision, stream: as in the
            call of `linear_attention`.
        d_o: [B, H, N, V], with the dtype of q. None means zeros.
        d_final_state: an array with the shape and the dtype of the state that return_state=True
            returns. None means zeros. At least one of d_o and d_final_state is given.
        wants: names of the gradients to compute. The default is those of all arguments that are
            given.

    Returns:
        Gradients(d_q, d_k, d_v, d_log_decay, d_initial_state) in the caller's array library. Each
        has the shape and the dtype of the argument in its name; d_initial_state may be wanted
        without an initial_state. Where tokens, sequences or heads share a decay, its gradient is
        the sum over them. The gradient of log_decay = -inf is 0. On a GPU every gradient is an
        array there (also the gradient of a log_decay that is a number), ready for later work on the
        same stream.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_attention`.
        NotImplementedError: float64 on a GPU, or K or V above 256 there.
    """
    log_decay = plain(log_decay)
    arrays = (q, k, v, log_decay, initial_state, cu_seqlens, d_o, d_final_state)
    lib, queue = library_of(_BACKWARD, *arrays).at(q, stream)
    if wants is None:
        given = (True, True, True, log_decay is not None, initial_state is not None)
    else:
        if isinstance(wants, str) or not set(wants) <= set(Gradients._fields):
            raise ValueError(f"wants: expected names among {', '.join(Gradients._fields)}, got {wants!r}")
        d_q, d_k, d_v, d_log_decay, d_initial_state = (name in wants for name in Gradients._fields)
        given = (d_q, d_k, d_v, d_log_decay, d_initial_state)
    settings = options(scale, "auto", layout, precision, queue)
    return Gradients(*_core.backward(lib, *arrays, given, settings))


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
    """One step of generation, for one token or a few: updates states in place and returns the
    outputs.

    Args:
        q: [B, Hq, K], or [B, Hq, T, K] for T <= 64 tokens at once; k and v likewise.
        state: [slots, Hs, K, V], read and updated in place; float32 (float64 with float64 inputs).
            Float16 and bfloat16 pools are served too. They are rounded once per call, so that
            errors grow with the number of calls where decay is slow.
        log_decay: a number, [], [Hs], [B, Hs] or [B, Hs, T], as in `linear_attention`.
        scale: a number that multiplies the output.
        state_indices: int32 or int64 [B], the slot of each sequence; no slot is named twice. -1
            skips a sequence, whose output is 0. Without state_indices sequence b uses slot b.
        out: an array that receives the output.
        stream: as in `linear_attention`.

    Returns:
        o, [B, H, V] or [B, H, T, V]. Raises as `linear_attention`.
    """
    log_decay = plain(log_decay)
    arrays = (q, k, v, state, log_decay, state_indices, out)
    lib, queue = library_of(_DECODE, *arrays).at(q, stream)
    return _core.decode(lib, *arrays, options(scale, stream=queue))


def build_info() -> dict[str, str]:
    """Facts of this build and of this process: version, compiler, isa, isas, cuda, threads,
    threads_source.
    """
    info = dict(line.split("=", 1) for line in _core.build_info().splitlines())
    threads, source = _core.thread_count(threads_of_framework())
    return info | {"threads": str(threads), "threads_source": source}


def set_num_threads(n: int) -> None:
    """Sets the number of threads of the CPU methods, for the whole process.

    Args:
        n: 1 to 4096. n < 1 takes the setting back: the sources that `num_threads` lists decide
            again.

    Raises:
        TypeError, ValueError: n is not a whole number, or above 4096.
    """
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool):
        raise TypeError(f"n: expected a whole number, got {type(n).__name__}")
    if n > _MOST_THREADS:
        raise ValueError(f"n: expected at most {_MOST_THREADS} threads, or 0 for the default, got {n}")
    _core.set_num_threads(max(int(n), 0))


def num_threads() -> int:
    """The number of threads that a call on the CPU uses at most, at this moment.

    The first source that is present decides: `set_num_threads`; LEETCORE_NUM_THREADS;
    torch.get_num_threads() in a process that has loaded torch; the number of another OpenMP runtime
    in the process; OMP_NUM_THREADS; the cores that the affinity of the calling thread and the CPU
    quota of the control groups allow. These cores and OMP_THREAD_LIMIT also limit the numbers of
    torch and OpenMP. `build_info()["threads_source"]` names the source.
    """
    return _core.thread_count(threads_of_framework())[0]
