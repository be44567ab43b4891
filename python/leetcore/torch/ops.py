"""The operators `torch.ops.leetcore.*`: functions that call them, kernels, and definition.

`linear_attention` is functional and differentiable, `linear_attention_backward` computes its
gradients, `decode_step` updates a state in place. Each kernel calls the library once. `inputs.py`
lists their arguments, `autograd.py` has their gradients, `rules.py` their shapes, autocast, vmap
and flop, and `definition.py` gives them to torch. `mamba2.py` has the operators of Mamba-2,
`conv.py` those of the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import _core, api
from ..options import Layout, Precision, allows_tf32, method_name, real
from . import autograd, conv, mamba2, mamba2_rules, rules
from .definition import Operator, both, define
from .inputs import (
    BackwardInputs,
    DecodeInputs,
    ForwardInputs,
    SsdBackwardInputs,
    SsdGradients,
    SsdInputs,
    SsdStepInputs,
    head_axis,
    is_number,
    stand_in,
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
    """Causal linear attention with exponential decay, as an operator of torch.

    The operator is `leetcore.linear_attention` with gradients. torch.compile treats it as opaque
    and keeps the graph whole. Gradients flow from o and from final_state to q, k, v, initial_state
    and log_decay in any of its shapes. Gradients do not depend on the method. Second derivatives
    are not available.

    Under autocast, q, k and v are cast to autocast's dtype, log_decay and initial_state to float32.
    torch.vmap adds its dimension to the batch.

    Args:
        q: [B, Hq, N, K]. float64, float32, float16 or bfloat16, the same for q, k and v.
        k: [B, Hk, N, K].
        v: [B, Hv, N, V].
        log_decay: natural log of the decay, <= 0: a number, [], [Hs], [B, Hs] or [B, Hs, N];
            float32 (float64 too with float64 inputs). None: no decay.
        scale: a number that multiplies the output.
        initial_state: [B, Hs, K, V], or [S, Hs, K, V] with cu_seqlens; float32 (float64 with
            float64 inputs). None: zeros.
        return_state: whether to also return the state after the last token.
        cu_seqlens: [S + 1], int32 or int64: start offsets of S sequences packed along the token
            axis, from 0 to N; B is 1.
        layout: "bhnd", or "bnhd" for [B, N, H, D] (and log_decay [B, N, Hs]).
        method: "auto" or a name of `leetcore.methods()`.
        precision: "ieee" (default) or "tf32", which lets GPUs round float32 products.

    Returns:
        o [B, H, N, V] of q's dtype, or (o, final_state) with return_state.

    Raises:
        ValueError, TypeError: an argument breaks the rules above.
        NotImplementedError: no method, or not the named one, serves the problem. The backward pass
            raises it for float64 on a GPU, and for K or V above 256 there.
        RuntimeError: a GPU cannot be used, or reported an error.
    """
    if stand_in(q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state, cu_seqlens=cu_seqlens):
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
    # In the order of ForwardInputs: names would cost 1 us per call.
    o, final_state = _FORWARD(
        q,
        k,
        v,
        _decay(log_decay, q, k, v, head_axis(layout)),
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
    """One step (or a few tokens) of generation, as an operator of torch; updates `state` in place.

    The operator is `leetcore.decode_step`, in eager and in compiled code. It has no gradient; use
    `linear_attention` with initial_state where a gradient is needed.

    Args:
        q: [B, Hq, K], or [B, Hq, T, K] for T <= 64 tokens. float64, float32, float16 or bfloat16,
            the same for q, k and v.
        k: [B, Hk, K] or [B, Hk, T, K].
        v: [B, Hv, V] or [B, Hv, T, V].
        state: [slots, Hs, K, V], read and updated in place; float32 (float64 with float64 inputs),
            or float16 or bfloat16, which are rounded once per call.
        log_decay: a number, [], [Hs], [B, Hs] or [B, Hs, T], as in `linear_attention`.
        scale: a number that multiplies the output.
        state_indices: [B], int32 or int64, the slot of each sequence, all different; -1 skips a
            sequence, whose output is 0. None: sequence b uses slot b.

    Returns:
        o, [B, H, V] or [B, H, T, V], of q's dtype.

    Raises:
        ValueError, TypeError: an argument breaks the rules above.
        NotImplementedError: an argument requires a gradient while gradients are enabled, or the
            call is inside of torch.vmap.
        RuntimeError: a GPU cannot be used, or reported an error.
    """
    if stand_in(q=q, k=k, v=v, state=state, log_decay=log_decay, state_indices=state_indices):
        tensors = (q, k, v, state, log_decay, state_indices)
        return handle_torch_function(
            decode_step, tensors, q, k, v, state, log_decay, scale=scale, state_indices=state_indices
        )
    o: Tensor = _DECODE(q, k, v, state, _decay(log_decay, q, k, v), state_indices, _number(scale))
    return o


def _number(scale: Any) -> Any:
    """The scale as a float, or torch.compile's symbolic number.

    A tensor is refused, because it would lose its gradient.
    """
    if isinstance(scale, (float, torch.SymFloat, torch.SymInt)):
        return scale
    if isinstance(scale, Tensor):
        raise TypeError("scale: expected a number, got a torch.Tensor; multiply q by it instead")
    return real("scale", scale)


def _decay(log_decay: Any, q: Tensor, k: Tensor, v: Tensor, head_axis: int = 1) -> Tensor | None:
    """log_decay as a tensor on q's device.

    A single value on a GPU becomes [Hs], because the library reads scalars on the CPU.
    """
    if log_decay is None:
        return None
    if is_number(log_decay):
        exact = torch.float64 if q.dtype is torch.float64 else torch.float32
        log_decay = torch.full((), log_decay, dtype=exact, device=q.device)
    if log_decay.ndim == 0 and q.device.type != "cpu":
        log_decay = log_decay.to(q.device).expand(max(k.shape[head_axis], v.shape[head_axis]))
    result: Tensor = log_decay
    return result


# ---- kernels


def _forward(args: ForwardInputs) -> tuple[Tensor, Tensor]:
    result = api.linear_attention(
        args.q,
        args.k,
        args.v,
        args.log_decay,
        initial_state=args.initial_state,
        cu_seqlens=args.cu_seqlens,
        scale=args.scale,
        return_state=args.return_state,
        layout=args.layout,
        method=args.method,
        precision="tf32" if args.tf32 else None,
    )
    return result if args.return_state else (result, rules.absent(args.v))


def _backward(args: BackwardInputs) -> tuple[Tensor, ...]:
    if args.q.dtype is torch.float64 and args.q.is_cuda:
        raise NotImplementedError(
            "linear_attention has gradients of float64 on the CPU only; expected float32, float16 or bfloat16 on a GPU "
            "(x.float()), or tensors on the CPU (x.cpu())"
        )
    wants = [name for name, wanted in zip(api.Gradients._fields, args.wants, strict=True) if wanted]
    gradients = api.linear_attention_backward(
        args.q,
        args.k,
        args.v,
        args.log_decay,
        d_o=args.d_o,
        d_final_state=args.d_final_state,
        initial_state=args.initial_state,
        cu_seqlens=args.cu_seqlens,
        scale=args.scale,
        layout=args.layout,
        precision="tf32" if args.tf32 else None,
        wants=wants,
    )
    return tuple(rules.absent(args.v) if d is None else d for d in gradients)


def _decode(args: DecodeInputs) -> Tensor:
    o: Tensor = api.decode_step(
        args.q, args.k, args.v, args.state, args.log_decay, scale=args.scale, state_indices=args.state_indices
    )
    return o


# ---- the definition of the operators


_OPERATORS = {
    "linear_attention": Operator(
        ForwardInputs,
        "(Tensor o, Tensor final_state)",
        both(_forward),
        autograd.forward_kernel,
        rules.forward_shapes,
        rules.vmap_forward,
        rules.forward_flop,
        rules.autocast,
    ),
    "linear_attention_backward": Operator(
        BackwardInputs,
        "(Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_log_decay, Tensor d_initial_state)",
        both(_backward),
        autograd.backward_kernel,
        rules.backward_shapes,
        rules.vmap_backward,
        rules.backward_flop,
        None,
    ),
    "decode_step": Operator(
        DecodeInputs,
        "Tensor o",
        both(_decode),
        autograd.decode_kernel,
        rules.decode_shapes,
        rules.vmap_decode,
        rules.decode_flop,
        rules.autocast,
    ),
    "ssd": Operator(
        SsdInputs,
        "(Tensor y, Tensor final_state)",
        both(mamba2.forward),
        mamba2.forward_kernel,
        mamba2_rules.forward_shapes,
        mamba2_rules.vmap_refusal,
        mamba2_rules.forward_flop,
        rules.autocast,
    ),
    "ssd_backward": Operator(
        SsdBackwardInputs,
        f"({', '.join(f'Tensor {name}' for name in SsdGradients._fields)})",
        both(mamba2.backward),
        mamba2.backward_kernel,
        mamba2_rules.backward_shapes,
        mamba2_rules.vmap_refusal,
        mamba2_rules.backward_flop,
        None,
    ),
    "ssd_step": Operator(
        SsdStepInputs,
        "Tensor y",
        both(mamba2.step),
        mamba2.step_kernel,
        mamba2_rules.step_shapes,
        mamba2_rules.vmap_refusal,
        mamba2_rules.step_flop,
        rules.autocast,
    ),
}


# A second import in the same process uses the operators of the first, which live as long as their
# library.
_namespace: Any = torch.ops.leetcore
if not hasattr(_namespace, "library"):
    _namespace.library, _namespace.version = define(_OPERATORS | conv.OPERATORS), _core.version
if _namespace.version != _core.version:
    raise ImportError(
        f"leetcore.torch: expected the operators of leetcore {_core.version}, got those of {_namespace.version}, which "
        "this process imported before; start a new process"
    )
_FORWARD = torch.ops.leetcore.linear_attention.default
_BACKWARD = torch.ops.leetcore.linear_attention_backward.default
_DECODE = torch.ops.leetcore.decode_step.default
