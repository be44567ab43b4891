"""The layer Mamba2 with the calls of mamba_ssm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...torch.mamba2_layer import Mamba2 as _Mamba2
from ...torch.mamba2_layer import mix, mix_step
from ...torch.packing import one_row, packed
from ..causal_conv1d import write_states


class Mamba2(_Mamba2):
    """mamba_ssm's Mamba2: `leetcore.torch.nn.Mamba2` with upstream's calls.

    Args:
        d_model, d_state, d_conv, expand, headdim, ngroups, A_init_range, D_has_hdim, rmsnorm,
            norm_before_gate, dt_min, dt_max, dt_init_floor, dt_limit, bias, conv_bias: as in
            `leetcore.torch.nn.Mamba2`.
        conv_init: the weights of the convolution are uniform in [-conv_init, conv_init]. None: as
            torch makes them.
        d_ssm: None or expand * d_model. A gated MLP next to the scan is not served.
        chunk_size, use_mem_eff_path, sequence_parallel: ignored.
        layer_idx: the key of the layer's states in inference_params.
        process_group: None. Tensor parallel layers are not served.
        device, dtype: of the parameters.

    Raises:
        NotImplementedError: d_ssm or process_group is given.
        ValueError: as in `leetcore.torch.nn.Mamba2`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if d_ssm not in (None, expand * d_model):
            raise NotImplementedError(f"d_ssm: expected None or expand * d_model = {expand * d_model}, got {d_ssm}")
        if process_group is not None:
            raise NotImplementedError("process_group: expected None, got one; tensor parallel layers are not served")
        super().__init__(
            d_model,
            d_state,
            d_conv,
            expand,
            headdim,
            ngroups,
            A_init_range=A_init_range,
            D_has_hdim=D_has_hdim,
            rmsnorm=rmsnorm,
            norm_before_gate=norm_before_gate,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            bias=bias,
            conv_bias=conv_bias,
        )
        self.layer_idx, self.d_conv = layer_idx, d_conv
        if conv_init is not None:
            torch.nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.to(device=device, dtype=dtype)

    def forward(  # type: ignore[override]
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Applies the layer to a sequence, or to one more token of inference_params.

        Args:
            u: [B, N, d_model], or [B * N, d_model] with seqlen.
            seqlen: N, where u is flat.
            seq_idx: [B, N] integers: the sequence of each token, where rows are packed.
            cu_seqlens: [S + 1], start offsets of S packed sequences; B is 1.
            inference_params: an object with key_value_memory_dict and seqlen_offset. Its states of
                this layer are updated; seqlen_offset above 0 means that u is one more token.

        Returns:
            y of u's shape.
        """
        rows = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        sequences = packed(seq_idx, cu_seqlens, rows.shape[:2])
        conv_state = ssm_state = None
        if inference_params is not None:
            states = inference_params.key_value_memory_dict
            if self.layer_idx not in states:
                count = rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
                states[self.layer_idx] = self.allocate_inference_cache(count, 0)
            conv_state, ssm_state = states[self.layer_idx]
            if inference_params.seqlen_offset > 0:
                return self.step(rows, conv_state, ssm_state)[0].reshape(u.shape)
        z, xBC, dt = self._project(rows)
        gate = self._scan_gate(z)
        if sequences is not None:
            xBC, dt, gate = one_row(xBC), one_row(dt), None if gate is None else one_row(gate)
        before = None
        if conv_state is not None:
            count = rows.shape[0] if sequences is None else sequences.cu_seqlens.shape[0] - 1
            before = conv_state.new_zeros(count, *conv_state.shape[1:])
        y, conv, ssm = mix(
            self._parts(),
            xBC,
            dt,
            gate,
            conv_state=before,
            cu_seqlens=None if sequences is None else sequences.cu_seqlens,
        )
        if conv_state is not None and ssm_state is not None:
            assert conv is not None and ssm is not None
            if sequences is not None and cu_seqlens is None:
                conv, ssm = conv[sequences.last], ssm[sequences.last]
            write_states(conv_state, None, conv)
            write_states(ssm_state, None, ssm)
        return self._finish(y.reshape(*z.shape[:-1], -1, self.headdim), z).reshape(u.shape)

    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Applies the layer to one more token and updates both states in place; inference only.

        Args:
            hidden_states: [B, 1, d_model].
            conv_state: [B, C, d_conv].
            ssm_state: [B, H, P, K].

        Returns:
            (y [B, 1, d_model], conv_state, ssm_state).
        """
        z, xBC, dt = self._project(hidden_states[:, 0])
        y = mix_step(self._parts(), xBC, dt, self._scan_gate(z), conv_state=conv_state, state=ssm_state)
        return self._finish(y, z)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """States of zeros: conv_state [B, C, d_conv] and ssm_state [B, H, P, K].

        Args:
            batch_size: B.
            max_seqlen: ignored.
            dtype: of both states. None: the dtype of the parameters.
        """
        like, channels = self.in_proj.weight, self.conv1d.weight.shape[0]
        return (
            like.new_zeros(batch_size, channels, self.d_conv, dtype=dtype),
            like.new_zeros(batch_size, self.num_heads, self.headdim, self.d_state, dtype=dtype),
        )
