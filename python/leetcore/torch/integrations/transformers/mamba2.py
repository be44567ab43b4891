"""The Mamba-2 layers of transformers, computed by leetcore.

Six model files of transformers have one such layer each, a mixer. The mixers differ in the factors
of FalconH1 alone. A patched mixer is a subclass of its mixer with the forward of `Mixer`.

transformers computes d = softplus(dt + dt_bias) in the model's dtype, prefills with products in
float32 whose memory grows with the heads times the chunk, and does not limit d where it decodes.
The patched mixer calls `leetcore.torch.ssd` and `ssd_step`, which follow the definition in both.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils

from ...mamba2_layer import Parts, mix, mix_step
from ...packing import Packed, one_row, packed
from .layers import become, has_replaced_forward, masked_tokens

try:
    from transformers.integrations.accelerate import force_accelerate_hooks
except ImportError:  # `differences` refuses to patch
    force_accelerate_hooks = None  # type: ignore[assignment]

# The modules of transformers.models that have Mamba-2 layers, and the class of the layer.
MIXERS = {
    "mamba2": "Mamba2Mixer",
    "bamba": "BambaMixer",
    "falcon_h1": "FalconH1Mixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "zamba2": "Zamba2MambaMixer",
}
# What the forward of a mixer in transformers 5.24 reads of the mixer. The last three names are of
# FalconH1.
_ATTRIBUTES = (
    "in_proj conv1d dt_bias A_log D norm out_proj num_heads head_dim n_groups ssm_state_size intermediate_size "
    "conv_dim conv_kernel_size activation time_step_limit chunk_size layer_idx"
)
_READ = f"{_ATTRIBUTES} training float to mamba_rms_norm mup_vector ssm_in_multiplier"
_OF_CACHES = "get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state"


def is_served(layer: Any) -> bool:
    """Whether the layer can be patched and is not."""
    kind = type(layer)
    return MIXERS.get(_family(kind)) == kind.__name__ and kind.__module__ == _modeling(_family(kind))


def is_patched(layer: Any) -> bool:
    """Whether the layer computes with leetcore."""
    return isinstance(layer, Mixer)


def patch(layer: Any) -> None:
    """Makes a layer without `differences` compute with leetcore."""
    become(layer, _patched(_family(type(layer))))


def unpatch(layer: Any) -> None:
    """Restores the computation of transformers in a patched layer."""
    vars(layer).pop("keeps_cuda", None)
    become(layer, type(layer).original)


def differences(layer: Any) -> list[str]:
    """The things that the patch needs and the installed transformers lacks, one sentence each."""
    forward = type(layer).forward
    found = [f"it has no {name}" for name in _ATTRIBUTES.split() if not hasattr(layer, name)]
    found += [f"Cache has no {name}" for name in _OF_CACHES if not hasattr(cache_utils.Cache, name)]
    taken = inspect.signature(forward).parameters
    found += [
        f"its forward takes no {name}" for name in ("hidden_states", "cache", "attention_mask") if name not in taken
    ]
    read = inspect.unwrap(forward).__code__.co_names
    found += [
        f"its forward reads {name}, which leetcore does not know"
        for name in read
        if hasattr(layer, name) and name not in _READ.split()
    ]
    if force_accelerate_hooks is None:
        found.append("transformers.integrations.accelerate has no force_accelerate_hooks")
    if has_replaced_forward(layer):
        found.append("its forward has been replaced")
    if (activation := getattr(layer, "activation", "silu")) not in ("silu", "swish"):
        found.append(f"its activation is {activation!r}, not 'silu'")
    return found


class Mixer(nn.Module):
    """Base of patched mixers, before the class of transformers."""

    original: type  # the class of transformers
    keeps_cuda: bool  # whether transformers computes CUDA tensors, with the package mamba_ssm

    def forward(
        self, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """The layer's output [B, N, C]. The states of a cache are updated in place.

        Args:
            hidden_states: [B, N, C].
            cache: a Cache of transformers, or None.
            attention_mask: [B, N], or longer by the tokens before; 0 at padding. None: no padding.
            options: seq_idx [B, N] or cu_seqlens [S + 1] of packed sequences. Others are ignored.
        """
        cache = options.pop("cache_params", None) if cache is None else cache  # its name until 5.40
        if self.keeps_cuda and hidden_states.is_cuda:
            result: Tensor = super().forward(hidden_states, cache=cache, attention_mask=attention_mask, **options)
            return result
        return self._compute(hidden_states, cache, attention_mask, options)

    def _compute(self: Any, x: Tensor, cache: Any, attention_mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        B, N, _ = x.shape
        mask = None if attention_mask is None else masked_tokens(attention_mask, x)
        if mask is not None:
            x = torch.where(mask[..., None], x, 0)
        z, xBC, dt = self._project(x).split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        gate = z.unflatten(-1, (-1, self.head_dim)) if self._gates_scan() else None
        weight = self.conv1d.weight.squeeze(1)
        parts = Parts(
            weight,
            self.conv1d.bias,
            self.A_log,
            self.D,
            self.dt_bias,
            self.head_dim,
            self.n_groups,
            tuple(self.time_step_limit),
        )
        conv_state: Any = None
        state: Any = None
        if cache is not None:
            conv_state = cache.get_conv_state(self.layer_idx)
            state = cache.get_recurrent_state(self.layer_idx)
        rows = packed(options.get("seq_idx"), options.get("cu_seqlens"), x.shape[:2])
        if rows is not None:
            name = "cu_seqlens" if options.get("cu_seqlens") is not None else "seq_idx"
            if mask is not None:
                raise ValueError(f"{name}: expected None with an attention_mask, as packed sequences have no padding")
            if state is not None:
                raise ValueError(f"{name}: expected None where a cache continues earlier tokens, got sequences")
            y = self._mix_packed(parts, xBC, dt, gate, rows, cache)
        elif state is not None and N == 1 and mask is None and not _has_gradient(xBC, state, conv_state, self):
            gate = None if gate is None else gate[:, 0]
            y = mix_step(parts, xBC[:, 0], dt[:, 0], gate, conv_state=conv_state, state=state)[:, None]
        else:
            if cache is not None and conv_state is None:
                conv_state = xBC.new_zeros(B, self.conv_dim, self.conv_kernel_size)
            elif cache is not None and torch.is_grad_enabled():
                # The cache is written below. The gradient needs what it held.
                conv_state, state = conv_state.clone(), state.clone()
            y, conv_state, state = mix(parts, xBC, dt, gate, conv_state=conv_state, state=state, mask=mask)
            self._keep(cache, conv_state, state)
        y = y.reshape(B, N, -1)
        if gate is None:
            y = self.norm(y, z)
        result: Tensor = self.out_proj(y.to(x.dtype))
        return result

    def _project(self: Any, x: Tensor) -> Tensor:
        projected: Tensor = self.in_proj(x)
        return projected

    def _gates_scan(self) -> bool:
        """Whether the gate multiplies the result of the scan, and there is no norm."""
        return False

    def _keep(self: Any, cache: Any, conv_state: Tensor | None, state: Tensor | None) -> None:
        if cache is not None:
            cache.update_conv_state(conv_state, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
            cache.update_recurrent_state(state, self.layer_idx)

    def _mix_packed(
        self: Any, parts: Parts, xBC: Tensor, dt: Tensor, gate: Tensor | None, rows: Packed, cache: Any
    ) -> Tensor:
        """`mix` of packed rows. The cache receives the states of the last sequence of each row."""
        xBC, dt, gate = one_row(xBC), one_row(dt), None if gate is None else one_row(gate)
        conv_state = None
        if cache is not None:
            conv_state = xBC.new_zeros(rows.cu_seqlens.shape[0] - 1, self.conv_dim, self.conv_kernel_size)
        y, conv_state, state = mix(parts, xBC, dt, gate, conv_state=conv_state, cu_seqlens=rows.cu_seqlens)
        if conv_state is not None and state is not None:
            self._keep(cache, conv_state[rows.last], state[rows.last])
        return y


class _FalconH1(Mixer):
    """The factors of FalconH1, and its layers without a norm."""

    def _project(self: Any, x: Tensor) -> Tensor:
        projected: Tensor = self.in_proj(x * self.ssm_in_multiplier) * self.mup_vector
        return projected

    def _gates_scan(self: Any) -> bool:
        return not self.mamba_rms_norm


def _has_gradient(xBC: Tensor, state: Tensor, conv_state: Tensor, layer: nn.Module) -> bool:
    """Whether autograd follows a call. Steps have no gradients."""
    if not torch.is_grad_enabled():
        return False
    return any(x.requires_grad for x in (xBC, state, conv_state, *layer.parameters()))


def _modeling(family: str) -> str:
    return f"transformers.models.{family}.modeling_{family}"


def _family(kind: type) -> str:
    """The name of the module of transformers.models that has the class, such as "bamba"."""
    return kind.__module__.rpartition(".modeling_")[2]


@functools.cache
def _patched(family: str) -> type:
    """The patched class of a family, a subclass of its mixer."""
    original = getattr(importlib.import_module(_modeling(family)), MIXERS[family])
    base = _FalconH1 if family == "falcon_h1" else Mixer
    attributes = {
        "__module__": __name__,
        "__doc__": f"{original.__name__} of transformers, computed by leetcore.",
        "original": original,
        "keeps_cuda": _finds_mamba_ssm(),
        # The convolution reads the weights of conv1d without a call of conv1d.
        "_compute": force_accelerate_hooks("conv1d")(base._compute),
    }
    return type(original.__name__, (base, original), attributes)


def _finds_mamba_ssm() -> bool:
    """Whether the model files of transformers found the package mamba_ssm, and not its stand-in."""
    module = sys.modules.get("mamba_ssm.ops.triton.ssd_combined")
    function = getattr(module, "mamba_chunk_scan_combined", None)
    return function is not None and not function.__module__.startswith("leetcore.")


def __getattr__(name: str) -> type:
    """The patched classes by name, as pickle asks for them."""
    for family, mixer in MIXERS.items():
        if mixer == name:
            return _patched(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
