"""Problems of both passes and their gradients by definition, for all tests of gradients."""

import leetcore
import numpy as np
from conftest import log_decays, normal

KINDS = [None, "[]", "[Hs]", "[B,Hs]", "[B,Hs,N]"]
HEADS = [(1, 1, 1), (3, 3, 3), (4, 2, 1), (2, 1, 2), (2, 6, 3), (1, 2, 4)]
TOLERANCE = {"f64": 1e-11, "f32": 2e-5, "f16": 1e-3, "bf16": 1e-2}


def problem(
    B=2,
    heads=(2, 2, 2),
    N=12,
    K=3,
    V=4,
    dtype=np.float64,
    kind="[Hs]",
    layout="bhnd",
    lengths=None,
    state=True,
    seed=0,
):
    """Arguments of both passes and the gradients of both results, with or without states."""
    rng = np.random.default_rng(seed)
    exact = np.float64 if dtype == np.float64 else np.float32
    Hq, Hk, Hv = heads
    Hs, cu_seqlens = max(Hk, Hv), None
    sequences = B
    if lengths is not None:
        B, N, sequences = 1, sum(lengths), len(lengths)
        cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
    q, k, v, d_o = (normal(rng, (B, H, N, D), dtype) for H, D in ((Hq, K), (Hk, K), (Hv, V), (max(heads), V)))
    decay = None if kind is None else np.asarray(log_decays(rng, kind, B, Hs, N), exact)
    if layout == "bnhd":
        q, k, v, d_o = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v, d_o))
        decay = decay.swapaxes(1, 2).copy() if kind == "[B,Hs,N]" else decay
    before, d_state = (normal(rng, (sequences, Hs, K, V), exact) if state else None for _ in range(2))
    arguments = {"q": q, "k": k, "v": v, "log_decay": decay, "initial_state": before}
    return arguments, {"scale": K**-0.5, "cu_seqlens": cu_seqlens, "layout": layout}, (d_o, d_state)


def backward(arguments, options, d_results, **more):
    d_o, d_state = d_results
    return leetcore.linear_attention_backward(**arguments, **options, d_o=d_o, d_final_state=d_state, **more)


def definition(arguments, options, d_results):
    """The gradients in float64 of the same rounded inputs."""

    def wide(x):
        return None if x is None else np.asarray(x).astype(np.float64)

    return backward({name: wide(x) for name, x in arguments.items()}, options, [wide(d) for d in d_results])


def tolerance(name, dtype):
    """The tolerance of a gradient on a GPU.

    That of log_decay is the difference of two sums that were rounded to 16 bits.
    """
    return (2 if name == "d_log_decay" and dtype in ("f16", "bf16") else 1) * TOLERANCE[dtype]
