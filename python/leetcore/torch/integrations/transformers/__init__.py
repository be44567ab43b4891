"""Models of transformers with leetcore as their linear attention: `patch(model)`.

MiniMax models (`minimax.py`) and the Mamba-2 layers of Mamba2, Bamba, FalconH1, GraniteMoeHybrid,
NemotronH and Zamba2 (`mamba2.py`) are served, also inside of other models. A patched layer changes
its class in place. Other models of the same process keep the computation of transformers. Weights,
configuration and cache stay as they are.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from . import mamba2, minimax
from .minimax import LightningAttention as LightningAttention

__all__ = ["patch", "unpatch"]

_FAMILIES: tuple[Any, ...] = (minimax, mamba2)


def patch(model: nn.Module, *, cuda: bool = False) -> int:
    """Makes every linear attention layer of a model compute with leetcore, in place.

    Prefill, continuation of a cache by any number of tokens, beam search and training work as
    before. Padding neither enters nor decays a state. A cached state is float32; decoding without
    gradients updates it in place. Mamba-2 layers also take packed sequences (seq_idx, cu_seqlens).
    On a GPU, Mamba-2 layers keep the kernels of the package mamba_ssm where transformers found it,
    unless `cuda` is true. Layers that are already patched stay as they are. `unpatch` undoes the
    change.

    Args:
        model: a MiniMax model, a model with Mamba-2 layers (Mamba2, Bamba, FalconH1,
            GraniteMoeHybrid, NemotronH, Zamba2), or any module that contains such layers.
        cuda: whether leetcore computes CUDA tensors also where the package mamba_ssm could.

    Returns:
        The number of layers that compute with leetcore now.

    Raises:
        ValueError: the model has no such layer.
        NotImplementedError: a layer of this version of transformers is not the one that leetcore
            knows; the text names the difference.
    """
    modules: list[Any] = list(model.modules())
    found = [(family, layer) for family in _FAMILIES for layer in modules if family.is_served(layer)]
    patched: int = sum(family.is_patched(layer) for family in _FAMILIES for layer in modules)
    if not found and not patched:
        raise ValueError(
            f"model: expected one with layers MiniMaxLightningAttention, got {type(model).__name__}; the Mamba-2 "
            "layers that can be patched are " + ", ".join(mamba2.MIXERS.values())
        )
    for family, layer in found:
        if differences := family.differences(layer):
            raise NotImplementedError(
                f"transformers {transformers.__version__}: expected a {type(layer).__name__} as in 5.24, but "
                + "; ".join(differences)
            )
    for family, layer in found:
        family.patch(layer)
        if cuda and family is mamba2:
            layer.keeps_cuda = False
    return patched + len(found)


def unpatch(model: nn.Module) -> int:
    """Restores the computation of transformers in patched layers. States in caches stay float32.

    Returns:
        The number of layers that were patched.
    """
    modules: list[Any] = list(model.modules())
    found = [(family, layer) for family in _FAMILIES for layer in modules if family.is_patched(layer)]
    for family, layer in found:
        family.unpatch(layer)
    return len(found)
