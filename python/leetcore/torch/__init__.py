"""leetcore for PyTorch: differentiable operators (`torch.ops.leetcore`), layers in `nn`, models in `integrations`."""

import torch

_OLDEST = (2, 5)  # the first torch with torch.library.register_vmap
if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST:
    raise ImportError(f"torch: expected {_OLDEST[0]}.{_OLDEST[1]} or later for leetcore.torch, got {torch.__version__}")

from .ops import decode_step, linear_attention  # noqa: E402

__all__ = ["decode_step", "linear_attention"]
