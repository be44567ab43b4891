"""leetcore for PyTorch: differentiable operators, layers (`nn`) and models (`integrations`)."""

import torch

_OLDEST = (2, 6)  # torch.vmap of an operator loses the gradients of outer levels in 2.5
if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST:
    raise ImportError(f"torch: expected {_OLDEST[0]}.{_OLDEST[1]} or later for leetcore.torch, got {torch.__version__}")

from .conv import causal_conv1d, causal_conv1d_step  # noqa: E402
from .mamba2 import ssd, ssd_step  # noqa: E402
from .ops import decode_step, linear_attention  # noqa: E402

__all__ = ["causal_conv1d", "causal_conv1d_step", "decode_step", "linear_attention", "ssd", "ssd_step"]
