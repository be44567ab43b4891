"""torch_chunk with its big products in the 16-bit dtype of the inputs; the carried state stays fp32."""

from __future__ import annotations

import torch
from harness import DecodeProblem, Factory, Problem

from rivals.torch_chunk import configurations

NAME = "torch chunk, 16-bit products"
KEEP = 1


def forward(p: Problem, quick: bool = False) -> dict[str, Factory]:
    return {} if p.dtype == torch.float32 else configurations(p, p.dtype, quick)


def decode(p: DecodeProblem, quick: bool = False) -> dict[str, Factory]:
    return {}
