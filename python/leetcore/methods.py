"""The table of methods, the cost of each, and Python functions as methods."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from . import _core
from .arrays import TORCH, Array, library_of
from .options import options

_DTYPES = {"float64": (2, 64), "float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16)}  # DLPack's code, bits


class Method(NamedTuple):
    """A row of the table of methods.

    Attributes:
        name: for ``method=``.
        device: "cpu", "cuda", or "python" for a function of `register_method`.
        idea: a sentence.
        paper: the source of the method.
        serves: the features that the method declares, separated by blanks; it refuses calls that
            ask for others. The features are operations (forward, backward, decode), dtypes, decays
            (no_decay, decay_per_head, decay_per_token), and packed, grouped_heads, initial_state,
            final_state, state_indices, short_states, decay_gradients.
    """

    name: str
    device: str
    idea: str
    paper: str
    serves: str = ""


class Cost(NamedTuple):
    """The cost of one call by one method.

    Attributes:
        flop: multiplications and additions of its matrix products and of its updates of states.
            Weights and masks, a few per cent more, are left out.
        least_bytes: the bytes of every operand, read or written once.
        bytes: the bytes of operands as often as the method reads or writes them, and of states in
            memory.
        workspace: scratch, in bytes.
        depth: serial depth, the number of products and updates that must wait for one another,
            however many workers there are.
        microseconds: predicted time, on this machine with this number of threads.
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
    """A Python function that is a method."""

    row: Method
    fn: Callable[..., Any]
    library: Literal["numpy", "torch"]
    states: bool
    per_token: bool

    def refusal(self, forward: bool, states: bool, per_token: bool) -> str | None:
        """Why the function does not serve a call, None if it does."""
        if not forward:
            return "computes forward passes only"
        if states and not self.states:
            return "was registered without states"
        if per_token and not self.per_token:
            return "was registered without data-dependent decays"
        return None


registered: dict[str, Registered] = {}


def methods() -> list[Method]:
    """Every method of this build, and every function of `register_method` (device "python")."""
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
    """Makes a Python function a method: for ``method=name``, ``leetcore check``, ``bench`` and
    ``plot``.

    Args:
        name: a Python identifier; a function that has this name already is replaced.
        fn: fn(q, k, v, log_decay, scale) -> o, with q and k [B, H, N, K], v and o [B, H, N, V] in
            the caller's dtype (every array has H heads) and log_decay [B, H] in float32 (float64
            with float64 inputs), which is 0 where the caller gave none.
        library: the library of the arrays that fn takes and returns. They are on the CPU: arrays on
            a GPU are copied there and back.
        states: whether fn is fn(q, k, v, log_decay, scale, initial_state) -> (o, final_state), with
            states [B, H, K, V]. Otherwise the method does not serve calls with an initial_state or
            return_state.
        per_token: whether log_decay is always [B, H, N]. Otherwise the method does not serve
            data-dependent decays.
        idea, paper: a sentence and its source, for the table of methods.

    Raises:
        ValueError, TypeError: name belongs to a built-in method, or fn cannot be called.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name: expected a Python identifier, got {name!r}")
    if name in ("auto", "lightning", *(row[0] for row in _core.methods())):
        raise ValueError(f"name: {name!r} is a method of leetcore; choose another name")
    if not callable(fn):
        raise TypeError(f"fn: expected a function, got {type(fn).__name__}")
    if library not in ("numpy", "torch"):
        raise ValueError(f"library: expected 'numpy' or 'torch', got {library!r}")
    serves = f"forward {' '.join(_DTYPES)} no_decay decay_per_head packed grouped_heads"
    serves += " decay_per_token" * per_token + " initial_state final_state" * states
    registered[name] = Registered(Method(name, "python", idea, paper, serves), fn, library, states, per_token)


def unregister_method(name: str) -> None:
    """Removes a function of `register_method` from the table. Raises ValueError for an unknown
    name.
    """
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
    """The cost of `linear_attention` on arrays of these shapes.

    Args:
        method: a name of `methods()`; "auto" stands for the method that the call would take.
        B, H, N, K, V: sequences, heads, tokens, key and value head dims. V is K by default.
        Hq, Hk, Hv: heads of q, k and v; each is H by default.
        dtype: the dtype of q, k and v.
        per_token: whether the call has a decay per token, and not one per head.
        initial_state, return_state: whether the call has an initial state, and returns the final
            one.
        device: "cpu", or "cuda" for GPU 0.

    Raises:
        NotImplementedError: the method does not serve the call, or is a registered function, which
            has no cost model.
        RuntimeError: there is no such device, or this build has no CUDA methods.
        ValueError, TypeError: an argument is not allowed; the text says what is.
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
            shape, *_DTYPES[dtype], per_token, initial_state, return_state, device == "cuda", options(method=method)
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
    """linear_attention by a registered function. `leetcore.candidates` has validated the
    call."""
    lib, _ = library_of(("q",), q).at(q, None)
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
    """Returns [o, final state] for [q, k, v, log_decay, state]; a method without states returns the
    given state.
    """
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
