"""Gradients of the operators: their kernels of the dispatch key Autograd.

torch.library.register_autograd makes such kernels too. Its kernels fail in torch.func's transforms
and cost 100 us per call.
"""

from __future__ import annotations

import functools
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import api
from .inputs import BackwardInputs, DecodeInputs, ForwardInputs, tensor_fields

# leetcore.torch uses the private names of torch below and no others. Each says what happens without
# the name.

# The guard with which an operator's autograd kernel calls the kernel below it. torch has no public
# name for it. Without it, the import fails.
if not hasattr(torch._C, "_AutoDispatchBelowAutograd"):
    raise ImportError(
        "torch: expected a version with torch._C._AutoDispatchBelowAutograd, which leetcore.torch needs, got "
        f"{torch.__version__}; install an older torch or a newer leetcore"
    )
_below_autograd = torch._C._AutoDispatchBelowAutograd
# Derivatives inside of torch.func's transforms need the three names that torch's own functions use
# there. Without one of the three, such a derivative raises NotImplementedError. Without the name
# that tells whether a transform is active, torch raises an error.
_transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
try:
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.forward_ad import _set_fwd_grad_enabled
    from torch.autograd.function import _SingleLevelFunction
except ImportError:
    _SingleLevelFunction = None  # type: ignore[assignment, misc]


def _forward_mode_is_on() -> bool:
    """Whether a tensor may have a tangent. Without the private name, the answer is always True."""
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


_operators: Any = torch.ops.leetcore
# Inputs that have gradients, in the order of the gradients.
_DIFFERENTIABLE = tuple(name.removeprefix("d_") for name in api.Gradients._fields)
_TENSORS = tensor_fields(ForwardInputs)
_OPTIONS = tuple(name for name in ForwardInputs._fields if name not in _TENSORS)
# The values of these inputs. A getter is several times as fast as a comprehension.
_differentiable, _tensors, _options = attrgetter(*_DIFFERENTIABLE), attrgetter(*_TENSORS), attrgetter(*_OPTIONS)
# BackwardInputs of what the forward pass saved and of what the backward pass adds.
_KNOWN = (*_TENSORS, *_OPTIONS, "d_o", "d_final_state", "wants")
_backward_inputs = itemgetter(*map(_KNOWN.index, BackwardInputs._fields))
_STATE = DecodeInputs._fields.index("state")


def forward_kernel(*inputs: Any) -> Any:
    """The Autograd kernel of linear_attention."""
    return differentiated(_Forward, _operators.linear_attention.default, inputs)


def backward_kernel(*inputs: Any) -> Any:
    """The Autograd kernel of linear_attention_backward."""
    return differentiated(_Backward, _operators.linear_attention_backward.default, inputs)


def decode_kernel(*inputs: Any) -> Any:
    """The Autograd kernel of decode_step, which refuses inputs that require gradients."""
    return in_place("decode_step", "linear_attention", _operators.decode_step.default, inputs[_STATE], inputs)


def differentiated(passes: Any, operator: Any, inputs: tuple[Any, ...]) -> Any:
    """Runs an operator. If a gradient is asked for, it runs as the two `passes` of a
    torch.autograd.Function, whose attribute `inputs` is the NamedTuple of the operator.
    """
    if not is_differentiated(inputs):
        return run(operator, inputs)
    return apply(passes, passes.inputs(*inputs))


def in_place(name: str, other: str, operator: Any, state: Tensor, inputs: tuple[Any, ...]) -> Any:
    """Runs an operator that updates a state. `other` is the function that has gradients."""
    if is_differentiated(inputs):
        raise NotImplementedError(
            f"{name} has no gradient, as it updates the state in place; expected tensors that do not require one, or "
            f"torch.no_grad(); {other} with initial_state computes gradients"
        )
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)
    return run(operator, inputs)


def is_differentiated(inputs: tuple[Any, ...]) -> bool:
    """Whether a gradient is asked for. Raises if an input has a tangent, which would be lost."""
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


def run(operator: Any, inputs: tuple[Any, ...]) -> Any:
    with _below_autograd():
        return operator(*inputs)


class _Forward:
    inputs = ForwardInputs

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        args = ForwardInputs(*inputs)
        ctx.save_for_backward(*_tensors(args))
        ctx.options = _options(args)
        ctx.return_state = args.return_state
        ctx.set_materialize_grads(False)
        return run_in_function(_operators.linear_attention.default, inputs)

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, d_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs, None for inputs that have none."""
        d_final_state = d_final_state if ctx.return_state else None
        found: dict[str, Tensor] = {}
        if d_o is not None or d_final_state is not None:
            wants = _differentiable(ForwardInputs(*ctx.needs_input_grad))
            known = (*ctx.saved_tensors, *ctx.options, d_o, d_final_state, wants)
            gradients = _operators.linear_attention_backward.default(*_backward_inputs(known))
            found = {name: d for name, d, wanted in zip(_DIFFERENTIABLE, gradients, wants, strict=True) if wanted}
        return tuple(map(found.get, ForwardInputs._fields))


class _Backward:
    inputs = BackwardInputs

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        return run_in_function(_operators.linear_attention_backward.default, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> None:
        raise NotImplementedError(
            "leetcore.torch.linear_attention has first derivatives only; expected no gradient of its gradient"
        )


def apply(passes: type, inputs: tuple[Any, ...]) -> Any:
    """Runs the two passes as a torch.autograd.Function.

    torch.func's transforms call a kernel once per level.
    """
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


def run_in_function(operator: Any, inputs: tuple[Any, ...]) -> Any:
    """Runs an operator inside of `forward`, where torch turns all derivatives off.

    The derivatives of outer levels are turned on again for the operator.
    """
    if not _transforms_are_active():
        return run(operator, inputs)
    with torch.enable_grad(), _set_fwd_grad_enabled(True):
        return run(operator, inputs)
