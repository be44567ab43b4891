"""leetcore for PyTorch: differentiable operators (`torch.ops.leetcore`), layers in `nn`, models in `integrations`."""

from .ops import decode_step, linear_attention

__all__ = ["decode_step", "linear_attention"]
