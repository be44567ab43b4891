"""Problems of Mamba-2 for the laboratory: `leetcore.torch.ssd`, its gradients, and `ssd_step`.

Mamba-2 is the operator with q = C, k = B, v = d x and log_decay = A d, where d = softplus(dt +
dt_bias) is the length of a token. The skip D x is added to the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import rivals
import torch
from lab import DecodeProblem, Problem, TrainingProblem, normals, relative_error
from leetcore import reference
from leetcore.bench.problems import TOLERANCE, Shape
from leetcore.bench.timing import Call
from leetcore.torch import ssd, ssd_step
from torch import Tensor


@dataclass(frozen=True)
class SsdShape(Shape):
    """A shape whose heads are in G groups; the heads of a group share B and C. V is P."""

    G: int = 1

    @classmethod
    def parse(cls, text: str) -> SsdShape:
        """Reads "B,H,N,K,V G=g"; raises ValueError."""
        sizes, _, count = text.partition(" G=")
        return cls(**vars(Shape.parse(sizes)), G=int(count))

    def __str__(self) -> str:
        return f"{super().__str__()} G={self.G}"

    def exact_flop(self, chunk: int) -> float:
        """As in Shape; the scores C B^T are computed once for each group."""
        heads = self.H * ((chunk + 1) * self.V + 4 * self.K * self.V)
        return float(self.B * self.N * ((chunk + 1) * self.G * self.K + heads))

    def backward_flop(self, chunk: int) -> float:
        """As in Shape; products by scores with K columns are computed once for each group."""
        heads = self.H * (2 * (chunk + 1) * self.V + 10 * self.K * self.V)
        return float(self.B * self.N * (3 * (chunk + 1) * self.G * self.K + heads))

    def token_bytes(self, itemsize: int) -> int:
        """x, B, C and dt read once, y written once."""
        return self.B * self.N * (self.H * (2 * self.V + 1) + 2 * self.G * self.K) * itemsize


class SsdProblem(Problem):
    """A forward call that also returns the state.

    `given` has x [B, N, H, P], dt [B, N, H], B and C [B, N, G, K] of unit variance, and A, D and
    dt_bias [H] in float32. Step sizes are log-uniform from 0.001 to 0.1, as in new layers.
    """

    shape: SsdShape
    against = rivals.MAMBA2

    def __init__(self, shape: SsdShape, dtype: torch.dtype, decay: str = "", device: str = "cpu") -> None:
        s, tokens = shape, () if self.one_token else (shape.N,)
        sizes = [(s.B, *tokens, *size) for size in ((s.H, s.V), (s.H,), (s.G, s.K), (s.G, s.K))]
        x, dt, B, C = normals(sizes, dtype, 0, device)
        step, rate = torch.rand(2, s.H, generator=torch.Generator().manual_seed(2)).to(device)
        step = torch.exp(-6.9 + 4.6 * step)
        [D] = normals([(s.H,)], torch.float32, 2, device)
        bias = step + torch.log(-torch.expm1(-step))
        self.given = {"x": x, "dt": dt, "A": -1 - 15 * rate, "B": B, "C": C, "D": D, "dt_bias": bias}
        self.shape, self.dtype, self.device, self.scale = shape, dtype, device, 1.0
        self.decay = f"new layers, G={s.G}"  # tells apart problems whose B,H,N,K,V are the same
        self.q, self.k, self.v = C, B, x
        self.log_decay = (lengths(self.given).double() * self.given["A"]).float()

    @cached_property
    def wanted(self) -> dict[str, Tensor]:
        """What calls may return, in float64: y and the state [B, H, P, K] of Mamba-2, and o of the
        bare operator."""
        q, k, v, g, skip = operands(self.given)
        o, state = reference.in_chunks(q, k, v, g, xp=torch)
        bare = reference.in_chunks(q, k, self.v.transpose(1, 2), self.log_decay.transpose(1, 2), xp=torch)[0]
        return {"y": o.transpose(1, 2) + skip, "state": state.mT, "o": bare.transpose(1, 2)}

    def judge(self, call: Call) -> tuple[float, bool]:
        errors = {name: relative_error(x, self.wanted[name]) for name, x in call().items()}
        output, state = TOLERANCE[self.dtype_name]
        right = all(error <= (state if name == "state" else output) for name, error in errors.items())
        return max(errors.values()), right

    def call(self, method: str, out: Tensor | None = None) -> Call:
        def call() -> dict[str, Tensor]:
            y, state = ssd(**self.given, dt_softplus=True, return_state=True, method=method)
            return {"y": y, "state": state}

        return call


class SsdTrainingProblem(TrainingProblem, SsdProblem):
    """A forward and a backward pass with the gradients of every tensor in `given`."""

    differences = ("d_dt", "d_A", "d_dt_bias")

    def leaves(self) -> dict[str, Tensor]:
        return {name: x.detach().requires_grad_() for name, x in self.given.items()}

    @cached_property
    def wanted(self) -> dict[str, Tensor]:
        """y, by the name "o", and the gradients, float64, by name.

        The gradients of the operator are those of `reference.gradients`; torch takes them to the
        leaves.
        """
        leaves = {name: x.double().requires_grad_() for name, x in self.given.items()}
        *args, skip = operands(leaves)
        fixed, d_o = [x.detach() for x in args], self.d_o.transpose(1, 2)
        found = reference.gradients(*fixed, d_o, xp=torch)
        o = reference.in_chunks(*fixed, xp=torch)[0]
        torch.autograd.backward([*args, skip], [*found.values(), self.d_o.double()])
        return {"o": o.transpose(1, 2) + skip.detach()} | {f"d_{name}": x.grad for name, x in leaves.items()}

    def credits(self, chunk: int, method: str) -> dict[str, Any]:
        """A whole step: the forward pass, and a backward pass that reads x, B, C, dt and the
        gradient of y, and writes the gradients of x, B, C and dt."""
        flop = self.shape.exact_flop(chunk) + self.shape.backward_flop(chunk)
        moved = 3 * self.shape.token_bytes(self.dtype.itemsize) - self.d_o.nbytes
        return {"work": flop, "flop": flop, "least_bytes": float(moved)}

    def call(self, method: str, out: Tensor | None = None) -> Call:
        leaves = self.leaves()
        return lambda: rivals.training_step(partial(ssd, dt_softplus=True), leaves, self.d_o)


class SsdDecodeProblem(DecodeProblem, SsdProblem):
    """One step: x [B, H, P], dt [B, H], B and C [B, G, K]; the state is [B, H, P, K] in float32."""

    @cached_property
    def wanted(self) -> list[Tensor]:
        """y of the first two steps, float64: the second step reads the state that the first one
        wrote."""
        tokens = {name: torch.stack((self.given[name],) * 2, dim=1) for name in ("x", "dt", "B", "C")}
        *args, skip = operands(self.given | tokens)
        o = reference.in_chunks(*args, self.initial_state.double(), torch)[0]
        return list((o.transpose(1, 2) + skip).unbind(1))

    def new_state(self) -> Tensor:
        return self.initial_state.mT.contiguous()

    def call(self, method: str, out: Tensor | None = None) -> Call:
        state = self.new_state()
        return lambda: ssd_step(**self.given, state=state, dt_softplus=True)


def lengths(given: dict[str, Tensor]) -> Tensor:
    """Lengths of tokens [B, N, H] in float64."""
    return torch.nn.functional.softplus(given["dt"].double() + given["dt_bias"].double())


def operands(given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and log_decay of the operator, and the skip D x [B, N, H, P].

    The operands are [B, H, N, *], and all but q and k are float64; torch can differentiate them.
    """
    d, x = lengths(given), given["x"].double()
    heads = x.shape[2] // given["B"].shape[2]
    q, k = (given[name].repeat_interleave(heads, dim=2).transpose(1, 2) for name in ("C", "B"))
    skip = given["D"].double()[:, None] * x
    return q, k, (d[..., None] * x).transpose(1, 2), (d * given["A"].double()).transpose(1, 2), skip
