"""Problems of Mamba-2: shapes, inputs, and the calls that leetcore and transformers answer them
with."""

from __future__ import annotations

from typing import Any

import leetcore
import torch
import transformers
from lab_mamba2 import SsdShape
from leetcore import reference
from leetcore.bench.problems import TOLERANCE
from leetcore.bench.session import Judge
from leetcore.bench.timing import Call
from torch import Tensor
from transformers.models.mamba2 import modeling_mamba2 as theirs

transformers.logging.set_verbosity_error()
CHUNK = 256  # tokens of a chunk of transformers
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
JUDGED = 300  # first tokens that are compared with float64 before a call is timed
LOOSE = 4  # tolerance of transformers over that of leetcore, as its step sizes are rounded to bfloat16


class Heads(SsdShape):
    """An SsdShape as the record's tables name it."""

    def __str__(self) -> str:
        return f"{self.H} x {self.V}, K {self.K}, G {self.G}, batch {self.B}, {self.N} tokens"


def inputs(shape: Heads, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments of `leetcore.ssd` by name, of unit variance.

    Step sizes are about log-uniform from 0.001 to 0.1, as in new layers. A is float32.
    """
    torch.manual_seed(0)
    s = shape
    step = torch.exp(torch.empty(s.H).uniform_(-6.9, -2.3))
    given = {
        "x": torch.randn(s.B, s.N, s.H, s.V),
        "dt": torch.randn(s.B, s.N, s.H),
        "A": -torch.empty(s.H).uniform_(1, 16),
        "B": torch.randn(s.B, s.N, s.G, s.K),
        "C": torch.randn(s.B, s.N, s.G, s.K),
        "D": torch.ones(s.H),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
    }
    return {name: value if name == "A" else value.to(dtype) for name, value in given.items()}


def exact(value: Tensor) -> Any:
    return value.double().numpy()


def part(given: dict[str, Tensor], tokens: Any, sequences: slice = slice(None)) -> dict[str, Tensor]:
    """The inputs of some tokens (a slice, or the number of one token) of some sequences."""
    return {name: value[sequences, tokens] if name in ("x", "dt", "B", "C") else value for name, value in given.items()}


# ---- prefill


def prefill(given: dict[str, Tensor]) -> Call:
    return lambda: leetcore.ssd(**given, dt_softplus=True, return_state=True)


def prefill_of_transformers(given: dict[str, Tensor]) -> Call:
    named = {"hidden_states" if name == "x" else name: value for name, value in given.items()}
    return lambda: theirs.mamba2_chunk_scan(**named, chunk_size=CHUNK, dt_softplus=True, return_final_states=True)


def bare(given: dict[str, Tensor]) -> Any:
    """The arguments q, k, v and log_decay of the operator with the same decays, without step sizes
    and D.
    """
    lengths = torch.nn.functional.softplus(given["dt"].float() + given["dt_bias"].float())
    return given["C"], given["B"], given["x"], lengths * given["A"]


def prefill_of_operator(given: dict[str, Tensor]) -> Call:
    arguments = bare(given)
    return lambda: leetcore.linear_attention(*arguments, layout="bnhd", return_state=True)


def sample(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the first JUDGED tokens of the first and the last head, which have a group
    each."""
    heads = ends(given["x"])
    groups = heads * given["B"].shape[2] // given["x"].shape[2]
    few = part(given, slice(JUDGED))
    return {n: x[:, :, groups if n in "BC" else heads] if x.ndim > 1 else x[heads] for n, x in few.items()}


def ends(x: Tensor) -> Tensor:
    return torch.tensor([0, x.shape[2] - 1])


def wanted(given: dict[str, Tensor]) -> Any:
    """y of the sample, float64."""
    return reference.ssd(**{name: exact(x) for name, x in sample(given).items()}, dt_softplus=True, fast=True)[0]


def wanted_of_operator(given: dict[str, Tensor]) -> Any:
    """o of the sample, float64."""
    return reference.linear_attention(*map(exact, bare(sample(given))), layout="bnhd", fast=True)[0]


def judge(want: Any, dtype: str, loose: float = 1) -> Judge:
    """Compares the sample of y with float64; the call returns (y, state)."""

    def judged(call: Call) -> tuple[float, bool]:
        y = call()[0]
        error = reference.error(exact(y[:, :JUDGED, ends(y)]), want)
        return error, error <= loose * TOLERANCE[dtype][0]

    return judged


# ---- decoding


def their_step(x: Any, dt: Any, A: Any, B: Any, C: Any, state: Any, D: Any, dt_bias: Any) -> Any:
    """The step of transformers, with arguments as its layers give them."""
    P, K = x.shape[-1], B.shape[-1]
    heads = {"dt": dt[..., None].expand(-1, -1, P), "A": A[:, None, None].expand(-1, P, K)}
    D, dt_bias = (value[:, None].expand(-1, P) for value in (D, dt_bias))
    return theirs.mamba2_selective_state_update(state, x, **heads, B=B, C=C, D=D, dt_bias=dt_bias, dt_softplus=True)


def our_step(x: Any, dt: Any, A: Any, B: Any, C: Any, state: Any, D: Any, dt_bias: Any) -> Any:
    return leetcore.ssd_step(x, dt, A, B, C, state, D, dt_bias=dt_bias, dt_softplus=True)


def judge_step(given: dict[str, Tensor], state: Tensor, dtype: str, loose: float = 1) -> Judge:
    """Compares the first sequence of the first step with float64; the call returns y."""
    first = {name: exact(value) for name, value in part(given, slice(1), slice(1)).items()}
    want = reference.ssd(**first, dt_softplus=True, initial_state=exact(state[:1]))[0][:, 0]

    def judged(call: Call) -> tuple[float, bool]:
        error = reference.error(exact(call()[:1]), want)
        return error, error <= loose * TOLERANCE[dtype][0]

    return judged
