"""The operators torch.ops.leetcore.*: what torch needs to know of them, and the functions that call them.

linear_attention is functional and differentiable, linear_attention_backward its gradient, decode_step updates a state
in place. Each calls the library once; shapes for tracing, the autocast and vmap rules and flop are stated here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function
from torch.utils.flop_counter import register_flop_formula

from .. import _core, api
from ..options import Layout, Precision, allows_tf32, is_bnhd, method_name, real

# Private names of torch, each with what happens in a version of torch that lacks it. leetcore.torch uses no others.

# An operator's autograd kernel calls the kernel below it. No public name does this: import fails.
if not hasattr(torch._C, "_AutoDispatchBelowAutograd"):
    raise ImportError(
        "torch: expected a version with torch._C._AutoDispatchBelowAutograd, which leetcore.torch needs, got "
        f"{torch.__version__}; install an older torch or a newer leetcore"
    )
_below_autograd = torch._C._AutoDispatchBelowAutograd
# Derivatives inside of torch.func's transforms take the three names that torch's own functions take there. Without one
# of them the answer is NotImplementedError. Without the name that tells whether a transform is active, torch refuses.
_transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
try:
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.forward_ad import _set_fwd_grad_enabled
    from torch.autograd.function import _SingleLevelFunction
except ImportError:
    _SingleLevelFunction = None  # type: ignore[assignment, misc]


def _forward_mode_is_on() -> bool:
    """Saves the search for tangents. Without the private name every call searches."""
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


_SCHEMAS = (
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay=None, Tensor? initial_state=None,"
    " Tensor? cu_seqlens=None, float scale=1.0, bool return_state=False, str layout='bhnd', str method='auto',"
    " bool tf32=False) -> (Tensor o, Tensor final_state)",
    "linear_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state,"
    " Tensor? cu_seqlens, Tensor? d_o, Tensor? d_final_state, float scale, str layout, bool tf32, bool[] wants)"
    " -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_log_decay, Tensor d_initial_state)",
    "decode_step(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor? log_decay=None, Tensor? state_indices=None,"
    " float scale=1.0) -> Tensor o",
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | float | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    layout: Layout = "bhnd",
    method: str = "auto",
    precision: Precision | None = None,
) -> Any:
    """`leetcore.linear_attention` as an operator of torch: differentiable, and opaque to torch.compile.

    Shapes, dtypes and errors are those of `leetcore.linear_attention`. Gradients reach q, k, v, initial_state and
    log_decay, in any shape it may have, from o and from the final state; they have no derivatives themselves. On a GPU
    there are none of float64, nor of K or V above 256: the backward pass raises NotImplementedError. Under autocast
    q, k and v are cast to its dtype, log_decay and initial_state to float32. torch.vmap adds its dimension to the
    batch.

    Returns:
        o [B, H, N, V], or (o, final_state). Every method has the same gradients.
    """
    if _stand_in(q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state, cu_seqlens=cu_seqlens):
        return handle_torch_function(
            linear_attention,
            (q, k, v, log_decay, initial_state, cu_seqlens),
            q,
            k,
            v,
            log_decay,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            scale=scale,
            return_state=return_state,
            layout=layout,
            method=method,
            precision=precision,
        )
    o, final_state = _FORWARD(
        q,
        k,
        v,
        _decay(log_decay, q, k, v, 2 if is_bnhd(layout) else 1),
        initial_state,
        cu_seqlens,
        _number(scale),
        return_state,
        layout,
        method_name(method),
        allows_tf32(precision),
    )
    return (o, final_state) if return_state else o


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor | float | None = None,
    *,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`leetcore.decode_step` as an operator of torch: updates `state` in place, in eager and in compiled code.

    Shapes, dtypes and errors are those of `leetcore.decode_step`. It has no gradient: where one is asked for it raises
    NotImplementedError, and linear_attention with initial_state is what computes it.
    """
    if _stand_in(q=q, k=k, v=v, state=state, log_decay=log_decay, state_indices=state_indices):
        tensors = (q, k, v, state, log_decay, state_indices)
        return handle_torch_function(
            decode_step, tensors, q, k, v, state, log_decay, scale=scale, state_indices=state_indices
        )
    o: Tensor = _DECODE(q, k, v, state, _decay(log_decay, q, k, v), state_indices, _number(scale))
    return o


def _stand_in(**tensors: Any) -> bool:
    """Whether one of them stands in for a tensor, as torch.fx's proxies do. Raises for anything else but a tensor."""
    found = False
    for name, value in tensors.items():
        if value is None or isinstance(value, Tensor) or (name == "log_decay" and _is_number(value)):
            continue
        if not hasattr(value, "__torch_function__"):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
        found = True
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (float, int, np.number))


def _number(scale: Any) -> Any:
    """As a float; what stands for one under torch.compile stays. A tensor would lose its gradient here."""
    if isinstance(scale, (float, torch.SymFloat, torch.SymInt)):
        return scale
    if isinstance(scale, Tensor):
        raise TypeError("scale: expected a number, got a torch.Tensor; multiply q by it instead")
    return real("scale", scale)


def _decay(log_decay: Any, q: Tensor, k: Tensor, v: Tensor, head_axis: int = 1) -> Tensor | None:
    """log_decay as a tensor beside q; a single one on a GPU as [Hs], since the library reads scalars on the CPU."""
    if log_decay is None:
        return None
    if _is_number(log_decay):
        exact = torch.float64 if q.dtype is torch.float64 else torch.float32
        log_decay = torch.full((), log_decay, dtype=exact, device=q.device)
    if log_decay.ndim == 0 and q.device.type != "cpu":
        log_decay = log_decay.to(q.device).expand(max(k.shape[head_axis], v.shape[head_axis]))
    result: Tensor = log_decay
    return result


# ---- what runs


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    return_state: bool = False,
    layout: Layout = "bhnd",
    method: str = "auto",
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    result = api.linear_attention(
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
        precision="tf32" if tf32 else None,
    )
    return result if return_state else (result, _absent(v))


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    d_o: Tensor | None,
    d_final_state: Tensor | None,
    scale: float,
    layout: Layout,
    tf32: bool,
    wants: list[bool],
) -> tuple[Tensor, ...]:
    if q.dtype is torch.float64 and q.is_cuda:
        raise NotImplementedError(
            "linear_attention has gradients of float64 on the CPU only; expected float32, float16 or bfloat16 on a GPU "
            "(x.float()), or tensors on the CPU (x.cpu())"
        )
    gradients = api.linear_attention_backward(
        q,
        k,
        v,
        log_decay,
        d_o=d_o,
        d_final_state=d_final_state,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        layout=layout,
        precision="tf32" if tf32 else None,
        wants=[name for name, wanted in zip(api.Gradients._fields, wants, strict=True) if wanted],
    )
    return tuple(_absent(v) if d is None else d for d in gradients)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor | None = None,
    state_indices: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    o: Tensor = api.decode_step(q, k, v, state, log_decay, scale=scale, state_indices=state_indices)
    return o


def _absent(like: Tensor) -> Tensor:
    """What stands for a result that nobody wants: operators cannot return None."""
    return like.new_empty(0)


# ---- shapes, for tracing


def _require_one_device(q: Tensor, log_decay: Tensor | None, *others: Tensor | None) -> None:
    """One tensor on the device "meta" brings all here, whose results are memory that nobody writes."""
    if log_decay is not None and log_decay.ndim == 0 and log_decay.device.type == "cpu":
        log_decay = None  # a number, for whatever device
    for x in (log_decay, *others):
        if x is not None and x.device != q.device:
            raise ValueError(f"q: expected on one device with the other arguments, got {q.device} and {x.device}")


def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    return_state: bool = False,
    layout: str = "bhnd",
    method: str = "auto",
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    _require_one_device(q, log_decay, k, v, initial_state, cu_seqlens)
    head_axis = 2 if layout == "bnhd" else 1
    Hs = max(k.shape[head_axis], v.shape[head_axis])
    shape = list(v.shape)
    shape[head_axis] = max(q.shape[head_axis], Hs)
    o = v.new_empty(shape)
    if not return_state:
        return o, _absent(v)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    exact = torch.float64 if q.dtype is torch.float64 else torch.float32
    return o, v.new_empty((sequences, Hs, k.shape[3], v.shape[3]), dtype=exact)


def _backward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    d_o: Tensor | None,
    d_final_state: Tensor | None,
    scale: float,
    layout: str,
    tf32: bool,
    wants: list[bool],
) -> tuple[Tensor, ...]:
    _require_one_device(q, log_decay, k, v, initial_state, cu_seqlens, d_o, d_final_state)
    inputs = (q, k, v, log_decay, initial_state)
    return tuple(
        x.new_empty(x.shape) if wanted and x is not None else _absent(v)
        for x, wanted in zip(inputs, wants, strict=True)
    )


def _decode_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor | None = None,
    state_indices: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    _require_one_device(q, log_decay, k, v, state, state_indices)
    return v.new_empty((v.shape[0], max(q.shape[1], k.shape[1], v.shape[1]), *v.shape[2:]))


# ---- gradients: kernels of the key Autograd. torch.library.register_autograd makes some too, but they do not work with
# ---- torch.func's transforms, and take 100 us a call.


def _forward_with_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    return_state: bool = False,
    layout: str = "bhnd",
    method: str = "auto",
    tf32: bool = False,
) -> Any:
    inputs = (q, k, v, log_decay, initial_state, cu_seqlens, scale, return_state, layout, method, tf32)
    return _apply(_Forward, inputs) if _is_differentiated(inputs) else _run(_FORWARD, inputs)


def _backward_with_gradient(*inputs: Any) -> Any:
    return _apply(_Backward, inputs) if _is_differentiated(inputs) else _run(_BACKWARD, inputs)


def _decode_with_gradient(*inputs: Any) -> Any:
    if _is_differentiated(inputs):
        raise NotImplementedError(
            "decode_step has no gradient, as it updates the state in place; expected tensors that do not require one, "
            "or torch.no_grad(); linear_attention with initial_state computes gradients"
        )
    state = inputs[3]
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)
    return _run(_DECODE, inputs)


def _is_differentiated(inputs: tuple[Any, ...]) -> bool:
    """Whether gradients are asked for. Raises where the question is for tangents, which would be lost."""
    if _forward_mode_is_on() and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    ):
        raise NotImplementedError(
            "leetcore.torch has no forward mode; expected tensors without tangents, and torch.autograd.grad, "
            "torch.func.grad, vjp or jacrev for derivatives"
        )
    if torch.is_grad_enabled():
        for x in inputs:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def _run(operator: Any, inputs: tuple[Any, ...]) -> Any:
    with _below_autograd():
        return operator(*inputs)


class _Forward:
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        ctx.save_for_backward(*inputs[:6])
        ctx.options = inputs[6:]
        ctx.set_materialize_grads(False)
        return _run_in_function(_FORWARD, inputs)

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, d_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
        scale, return_state, layout, _, tf32 = ctx.options
        d_final_state = d_final_state if return_state else None
        if d_o is None and d_final_state is None:
            return (None,) * 11
        wants = list(ctx.needs_input_grad[:5])
        gradients = _BACKWARD(*ctx.saved_tensors, d_o, d_final_state, scale, layout, tf32, wants)
        return *(d if wanted else None for d, wanted in zip(gradients, wants, strict=True)), *(None,) * 6


class _Backward:
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        return _run_in_function(_BACKWARD, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> None:
        raise NotImplementedError(
            "leetcore.torch.linear_attention has first derivatives only; expected no gradient of its gradient"
        )


def _apply(passes: type, inputs: tuple[Any, ...]) -> Any:
    """The two passes as a torch.autograd.Function. torch.func's transforms call a kernel once for each level."""
    if not _transforms_are_active():
        return _function(passes, torch.autograd.Function).apply(*inputs)
    if _SingleLevelFunction is None:
        raise NotImplementedError(
            f"torch.func: expected a torch whose transforms leetcore.torch knows, got {torch.__version__}; take "
            "torch.autograd.grad, or a newer leetcore"
        )
    with enable_single_level_autograd_function():
        return _function(passes, _SingleLevelFunction).apply(*inputs)


@functools.cache
def _function(passes: type, base: type) -> Any:
    return type(passes.__name__, (passes, base), {})


def _run_in_function(operator: Any, inputs: tuple[Any, ...]) -> Any:
    """torch turns all derivatives off inside of `forward`. Those of outer levels are on again for the operator."""
    if not _transforms_are_active():
        return _run(operator, inputs)
    with torch.enable_grad(), _set_fwd_grad_enabled(True):
        return _run(operator, inputs)


# ---- autocast: matrix products in its dtype, decays and states in float32


def _autocast(op: Any, exact: tuple[int, ...], device: str) -> Callable[..., Any]:
    def cast(i: int, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.to(torch.float32 if i in exact else dtype)

    def kernel(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            if arguments[0].dtype is torch.float64:  # as elsewhere in torch
                return op(*arguments)
            return op(*(cast(i, x, dtype) for i, x in enumerate(arguments)))

    return kernel


# ---- torch.vmap: its dimension becomes part of the batch


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """[size, B, ...] as [size * B, ...]."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _fold_decay(g: Tensor | None, dim: int | None, size: int, B: int, Hs: int) -> Tensor | None:
    """Any form of log_decay as [size * B, Hs] or [size * B, Hs, N]."""
    if g is None:
        return None
    g = g.expand(size, *g.shape) if dim is None else g.movedim(dim, 0)
    if g.ndim < 3:  # [size] or [size, Hs]
        g = g.reshape(size, 1, -1).expand(size, B, Hs)
    return g.flatten(0, 1)


def _fold_all(
    size: int, in_dims: tuple[Any, ...], q: Any, k: Any, v: Any, g: Any, S: Any, cu: Any, layout: str
) -> tuple[Tensor | None, ...]:
    if cu is not None:
        raise NotImplementedError("cu_seqlens: expected None under torch.vmap, as packed sequences have no batch")
    in_dims = (*in_dims, None, None)  # defaults at the end are left out
    q, k, v = (_fold(x, dim, size) for x, dim in zip((q, k, v), in_dims, strict=False))
    head_axis = 2 if layout == "bnhd" else 1
    Hs = max(k.shape[head_axis], v.shape[head_axis])
    return q, k, v, _fold_decay(g, in_dims[3], size, q.shape[0] // size, Hs), _fold(S, in_dims[4], size), None


def _vmap_forward(
    info: Any,
    in_dims: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    return_state: bool = False,
    layout: str = "bhnd",
    method: str = "auto",
    tf32: bool = False,
) -> Any:
    tensors = _fold_all(info.batch_size, in_dims, q, k, v, log_decay, initial_state, cu_seqlens, layout)
    o, final_state = _FORWARD(*tensors, scale, return_state, layout, method, tf32)
    if not return_state:
        return (o.unflatten(0, (info.batch_size, -1)), final_state), (0, None)
    return (o.unflatten(0, (info.batch_size, -1)), final_state.unflatten(0, (info.batch_size, -1))), (0, 0)


def _vmap_backward(
    info: Any,
    in_dims: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    d_o: Tensor | None,
    d_final_state: Tensor | None,
    scale: float,
    layout: str,
    tf32: bool,
    wants: list[bool],
) -> Any:
    size = info.batch_size
    tensors = _fold_all(size, in_dims, q, k, v, log_decay, initial_state, cu_seqlens, layout)
    outer = (_fold(x, dim, size) for x, dim in ((d_o, in_dims[6]), (d_final_state, in_dims[7])))
    gradients = _BACKWARD(*tensors, *outer, scale, layout, tf32, wants)
    results = [d.unflatten(0, (size, -1)) if wanted else d for d, wanted in zip(gradients, wants, strict=True)]
    if log_decay is not None and wants[3]:  # summed over what the decay was shared by
        rank = log_decay.ndim - (in_dims[3] is not None)
        results[3] = results[3].sum(tuple(range(1, 3 - rank))) if rank < 2 else results[3]
    return tuple(results), tuple(0 if wanted else None for wanted in wants)


def _vmap_decode(info: Any, in_dims: Any, *arguments: Any) -> Any:
    raise NotImplementedError("decode_step: expected no torch.vmap, as it updates a state in place; use its batch")


# ---- flop: of chunks of 64 tokens, whichever method runs (cpp/kernels/chunk), so that a count depends on shapes only


def _flop(q: Any, k: Any, v: Any, layout: str, of_K: int, of_V: int, of_KV: int) -> int:
    head_axis, token_axis = (2, 1) if layout == "bnhd" else (1, 2)
    H, K, V = max(x[head_axis] for x in (q, k, v)), k[3], v[3]
    count: int = q[0] * H * q[token_axis] * (65 * (of_K * K + of_V * V) + of_KV * K * V)
    return count


def _forward_flop(
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any = None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    scale: float = 1.0,
    return_state: bool = False,
    layout: str = "bhnd",
    *_: Any,
    **__: Any,
) -> int:
    return _flop(q, k, v, layout, 1, 1, 4)


def _backward_flop(q: Any, k: Any, v: Any, *arguments: Any, **_: Any) -> int:
    return _flop(q, k, v, arguments[6], 3, 2, 10)


def _decode_flop(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    T = q[2] if len(q) == 4 else 1
    count: int = q[0] * T * 2 * k[-1] * v[-1] * (max(q[1], k[1], v[1]) + max(k[1], v[1]))
    return count


# ---- all of that, told to torch


def _define() -> torch.library.Library:
    library = torch.library.Library("leetcore", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    ops = torch.ops.leetcore
    for key in ("CPU", "CUDA"):
        library.impl("linear_attention", _forward, key)
        library.impl("linear_attention_backward", _backward, key)
        library.impl("decode_step", _decode, key)
        for op, name in ((ops.linear_attention, "linear_attention"), (ops.decode_step, "decode_step")):
            library.impl(name, _autocast(op.default, (3, 4), key.lower()), f"Autocast{key}")
    library.impl("linear_attention", _forward_with_gradient, "Autograd")
    library.impl("linear_attention_backward", _backward_with_gradient, "Autograd")
    library.impl("decode_step", _decode_with_gradient, "Autograd")
    torch.library.register_fake("leetcore::linear_attention", _forward_shapes, lib=library)
    torch.library.register_fake("leetcore::linear_attention_backward", _backward_shapes, lib=library)
    torch.library.register_fake("leetcore::decode_step", _decode_shapes, lib=library)
    torch.library.register_vmap("leetcore::linear_attention", _vmap_forward, lib=library)
    torch.library.register_vmap("leetcore::linear_attention_backward", _vmap_backward, lib=library)
    torch.library.register_vmap("leetcore::decode_step", _vmap_decode, lib=library)
    register_flop_formula(ops.linear_attention)(_forward_flop)
    register_flop_formula(ops.linear_attention_backward)(_backward_flop)
    register_flop_formula(ops.decode_step)(_decode_flop)
    return library


# A second import in the same process takes the operators of the first, which live as long as their library does.
_namespace: Any = torch.ops.leetcore
if not hasattr(_namespace, "library"):
    _namespace.library, _namespace.version = _define(), _core.version
if _namespace.version != _core.version:
    raise ImportError(
        f"leetcore.torch: expected the operators of leetcore {_core.version}, got those of {_namespace.version}, which "
        "this process imported before; start a new process"
    )
_FORWARD = torch.ops.leetcore.linear_attention.default
_BACKWARD = torch.ops.leetcore.linear_attention_backward.default
_DECODE = torch.ops.leetcore.decode_step.default
