"""Packed rows: several sequences in each row of a batch, one after another.

seq_idx [B, N] numbers the sequence of each token; two neighbours with one number are of one
sequence. The operators take one row with start offsets, so a batch becomes one row of B N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packed(NamedTuple):
    """The sequences of a batch of packed rows.

    Attributes:
        cu_seqlens: [S + 1], start offsets of all sequences in the B N tokens.
        first: [B], the index of the first sequence of each row.
        last: [B], the index of the last sequence of each row.
    """

    cu_seqlens: Tensor
    first: Tensor
    last: Tensor


def packed(seq_idx: Tensor | None, cu_seqlens: Tensor | None, shape: torch.Size) -> Packed | None:
    """The sequences that a call names by seq_idx or by cu_seqlens, or None.

    Reading seq_idx waits for a GPU and breaks the graph of torch.compile. cu_seqlens does not.

    Args:
        seq_idx: [B, N] integers, or None.
        cu_seqlens: [S + 1], which wins over seq_idx, or None.
        shape: [B, N].
    """
    if cu_seqlens is not None:
        if shape[0] != 1:
            raise ValueError(f"cu_seqlens: expected a batch of 1 row, got {shape[0]}; give seq_idx for several rows")
        sequences = torch.tensor([0, cu_seqlens.shape[0] - 2], device=cu_seqlens.device)
        return Packed(cu_seqlens, sequences[:1], sequences[1:])
    if seq_idx is None:
        return None
    if seq_idx.shape != shape:
        raise ValueError(f"seq_idx: expected shape {list(shape)}, got {list(seq_idx.shape)}")
    begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
    starts = begins.flatten().nonzero().flatten()
    ends = begins.sum(1).cumsum(0)
    return Packed(F.pad(starts, (0, 1), value=begins.numel()), F.pad(ends[:-1], (1, 0)), ends - 1)


def one_row(x: Tensor) -> Tensor:
    """[1, B N, ..] of [B, N, ..]."""
    return x.flatten(0, 1)[None]
