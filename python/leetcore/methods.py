"""The methods: the table, what each costs, the choice among them, and methods of your own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from . import _core
from .arrays import TORCH, Array, library_of, threads_of_framework

_DTYPES = {"float64": (2, 64), "float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16)}  # DLPack's code, bits


class Method(NamedTuple):
    """A row of the table of methods: its name for ``method=``, its device, its idea and where that comes from."""

    name: str
    device: str
    idea: str
    paper: str


class Cost(NamedTuple):
    """What one call costs by one method.

    flop: multiplications and additions of its matrix products and updates of states. What weighs or masks them, a few
        per cent, is left out.
    least_bytes: every operand read or written once.
    bytes: operands as often as the method reads or writes them, and states that wait in memory.
    workspace: scratch, in bytes.
    depth: serial depth: products and updates that must wait for one another, however many workers there are.
    microseconds: predicted, on this machine with this number of threads.
    """

    method: str
    flop: float
    least_bytes: float
    bytes: float
    workspace: int
    depth: float
    microseconds: float


@dataclass(frozen=True)
class Registered:
    """A function as a method."""

    row: Method
    fn: Callable[..., Any]
    library: Literal["numpy", "torch"]
    states: bool
    per_token: bool


registered: dict[str, Registered] = {}


def methods() -> list[Method]:
    """Every method of this build, and those of register_method (device "python")."""
    return [Method(*row) for row in _core.methods()] + [r.row for r in registered.values()]


def register_method(
    name: str,
    fn: Callable[..., Any],
    *,
    library: Literal["numpy", "torch"] = "numpy",
    states: bool = False,
    per_token: bool = False,
    idea: str = "",
    paper: str = "",
) -> None:
    """Makes a Python function a method: for ``method=name``, ``leetcore check``, ``bench`` and ``plot``.

    Args:
        name: a new name, or one registered before, which is replaced.
        fn: fn(q, k, v, log_decay, scale) -> o, with q and k [B, H, N, K], v and o [B, H, N, V] of the caller's dtype
            (as many heads everywhere) and log_decay [B, H] in float32 (float64 with float64 inputs), zeros for none.
        library: whose arrays fn takes and returns, always on the CPU: arrays on a GPU are copied there and back.
        states: fn(q, k, v, log_decay, scale, initial_state) -> (o, final_state), with states [B, H, K, V]. Without it
            the method does not serve calls with an initial_state or return_state.
        per_token: log_decay is always [B, H, N]. Without it the method does not serve data-dependent decays.
        idea, paper: for the table of methods.

    Raises:
        ValueError, TypeError: name is a built-in method's, or fn cannot be called.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name: expected a Python identifier, got {name!r}")
    if name in ("auto", "lightning", *(row[0] for row in _core.methods())):
        raise ValueError(f"name: {name!r} is a method of leetcore; choose another name")
    if not callable(fn):
        raise TypeError(f"fn: expected a function, got {type(fn).__name__}")
    if library not in ("numpy", "torch"):
        raise ValueError(f"library: expected 'numpy' or 'torch', got {library!r}")
    registered[name] = Registered(Method(name, "python", idea, paper), fn, library, states, per_token)


def unregister_method(name: str) -> None:
    """Forgets a function that register_method made a method."""
    if name not in registered:
        raise ValueError(f"name: no function {name!r} is registered")
    del registered[name]


def cost(
    method: str = "auto",
    *,
    B: int = 1,
    H: int = 1,
    N: int,
    K: int,
    V: int | None = None,
    Hq: int | None = None,
    Hk: int | None = None,
    Hv: int | None = None,
    dtype: str = "float32",
    per_token: bool = False,
    initial_state: bool = False,
    return_state: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Cost:
    """What linear_attention costs on arrays of these shapes, by a method or by the one that "auto" takes.

    Args:
        B, H, N, K, V: sequences, heads, tokens, key and value head dims (V: as K).
        Hq, Hk, Hv: heads of q, k, v where they are not H.
        dtype: of q, k and v.
        per_token: a decay for each token, not for each head.
        initial_state, return_state: whether there is one.
        device: "cuda" is GPU 0.

    Raises:
        NotImplementedError: the method does not serve this, or is a registered one: those have no model.
        RuntimeError: there is no such device, or this build has no CUDA methods.
    """
    if method in registered:
        raise NotImplementedError(f"method: {method!r} is a registered function, whose cost is not known")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    sizes = {"B": B, "N": N, "K": K, "V": K if V is None else V}
    sizes |= {name: H if heads is None else heads for name, heads in (("Hq", Hq), ("Hk", Hk), ("Hv", Hv))}
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise TypeError(f"{name}: expected an integer, got {type(size).__name__}")
    shape = tuple(sizes[name] for name in ("B", "N", "K", "V", "Hq", "Hk", "Hv"))
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    return Cost(
        *_core.cost(
            method,
            shape,
            *_DTYPES[dtype],
            per_token,
            initial_state,
            return_state,
            device == "cuda",
            threads_of_framework(),
        )
    )


def run_registered(
    method: Registered,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | float | None,
    scale: float,
    initial_state: Array | None,
    return_state: bool,
    cu_seqlens: Array | None,
    bnhd: bool,
    out: Array | None,
) -> Any:
    """linear_attention by a registered function; what leetcore refuses by shape and dtype has been refused."""
    (lib, _), name = library_of(("q",), q).at(q, None), method.row.name
    if (initial_state is not None or return_state) and not method.states:
        raise NotImplementedError(f"method: {name!r} was registered without states")
    Q, K, V = (lib.numpy(x).swapaxes(1, 2) if bnhd else lib.numpy(x) for x in (q, k, v))
    (B, _, N, _), dims = Q.shape, (K.shape[3], V.shape[3])
    Hs = max(K.shape[1], V.shape[1])
    H = max(Q.shape[1], Hs)
    exact = np.float64 if Q.dtype == np.float64 else np.float32
    g = np.asarray(0 if log_decay is None else log_decay if isinstance(log_decay, float) else lib.numpy(log_decay))
    if not (g <= 0).all():
        raise ValueError(f"log_decay: expected values <= 0, got {g[~(g <= 0)].flat[0]}")
    if g.ndim < 3:
        g = g[..., None]
    elif not method.per_token:
        raise NotImplementedError(f"method: {name!r} was registered without data-dependent decays")
    elif bnhd:
        g = g.swapaxes(1, 2)
    g = np.broadcast_to(g, (B, Hs, N if method.per_token else 1)).astype(exact)
    ends = [0, N] if cu_seqlens is None else list(lib.numpy(cu_seqlens))
    sequences = B if cu_seqlens is None else len(ends) - 1
    S = np.zeros((sequences, Hs, *dims), exact) if initial_state is None else lib.numpy(initial_state)
    Q, K, V, g, S = (np.repeat(x, H // x.shape[1], axis=1) for x in (Q, K, V, g, S))

    o, final = np.empty((B, H, N, dims[1]), V.dtype), np.empty_like(S)
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        rows = slice(None) if cu_seqlens is None else slice(i, i + 1)
        given = [x[:, :, start:end] for x in (Q, K, V)] + [
            g[:, :, start:end] if method.per_token else g[..., 0],
            S[rows],
        ]
        o[:, :, start:end], final[rows] = _call(method, [np.ascontiguousarray(x) for x in given], scale)
    given_back: Any = np.ascontiguousarray(o.swapaxes(1, 2)) if bnhd else o
    if out is None:
        out = lib.from_numpy(given_back)
    else:
        lib.assign(out, given_back)
    return (out, lib.from_numpy(np.ascontiguousarray(final[:, :: H // Hs]))) if return_state else out


def _call(method: Registered, given: list[Array], scale: float) -> list[Array]:
    """o and the final state (or what stands for it) of q, k, v, log_decay, state; the shapes are checked."""
    q, _, v, _, state = given
    if method.library == "torch":
        given = [TORCH.from_numpy(x) for x in given]
    got = method.fn(*given[:4], scale, *(given[4:] if method.states else ()))
    if not method.states:
        got = (got, state)
    elif not (isinstance(got, tuple) and len(got) == 2):
        raise RuntimeError(f"method {method.row.name!r}: expected (o, final_state), got {type(got).__name__}")
    shapes = {"o": (*q.shape[:3], v.shape[3]), "final_state": state.shape}
    results = []
    for array, (what, shape) in zip(got, shapes.items(), strict=True):
        try:
            result = library_of((what,), array).numpy(array)
        except TypeError:
            raise RuntimeError(
                f"method {method.row.name!r}: {what}: expected an array, got {type(array).__name__}"
            ) from None
        if result.shape != shape:
            raise RuntimeError(
                f"method {method.row.name!r}: {what}: expected shape {list(shape)}, got {list(result.shape)}"
            )
        results.append(result)
    return results
