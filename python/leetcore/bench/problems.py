"""Problems that are checked, timed and tested: their dtypes, tolerances, decays and inputs."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

import leetcore

from .. import reference
from ..options import Layout

Array = Any

DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
# Largest relative errors (Frobenius norm) against float64 on the same rounded inputs: (output,
# state).
TOLERANCE = {
    "float64": (1e-12, 1e-12),
    "float32": (5e-6, 5e-6),
    "float16": (1e-3, 5e-4),
    "bfloat16": (4e-3, 3e-3),
}
# The same of gradients. That of log_decay, a difference of two sums, may have twice as much for
# 16-bit inputs.
GRADIENT_TOLERANCE = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 1e-2}
# Decays per token that have broken kernels: nothing is kept, almost nothing, ..., almost
# everything, everything.
GAMMAS = (0.0, 1e-4, 0.5, 0.9, 0.99, 1 - 1e-6, 1.0)
LOG_DECAYS = np.append(leetcore.decay.from_gamma(GAMMAS), np.float32(-20))  # slopes of models reach 20
DECAYS = ("none", *(f"{gamma:.9g}" for gamma in GAMMAS), "slope20", "mixed", "token")  # values of `Case.decay`


@dataclass(frozen=True)
class Shape:
    """B sequences, H heads, N tokens, key dim K, value dim V."""

    B: int
    H: int
    N: int
    K: int
    V: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads "B,H,N,K,V"; raises ValueError."""
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != 5 or min(numbers) < 1:
            raise ValueError(f"shape: expected five positive integers B,H,N,K,V, got {text!r}")
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.B},{self.H},{self.N},{self.K},{self.V}"

    def exact_flop(self, chunk: int) -> float:
        """flop of the chunkwise form that causality cannot spare: half of the diagonal blocks, and
        the state twice."""
        return float(self.B * self.H * self.N * ((chunk + 1) * (self.K + self.V) + 4 * self.K * self.V))

    def dense_flop(self, chunk: int) -> float:
        """flop of the chunkwise form with whole diagonal blocks, as a chain of matrix products
        computes it."""
        return float(self.B * self.H * self.N * (2 * chunk * (self.K + self.V) + 4 * self.K * self.V))

    def backward_flop(self, chunk: int) -> float:
        """flop of a backward pass in chunks, for the gradients of q, k and v."""
        token = (chunk + 1) * (3 * self.K + 2 * self.V) + 10 * self.K * self.V
        return float(self.B * self.H * self.N * token)

    def state_bytes(self) -> int:
        return 4 * self.B * self.H * self.K * self.V

    def token_bytes(self, itemsize: int) -> int:
        """q, k and v read once, o written once."""
        return 2 * self.B * self.H * self.N * (self.K + self.V) * itemsize


def parse_decay(text: str) -> str:
    """Returns the name of a decay that `log_decay` knows; raises ValueError."""
    try:
        if text in (*DECAYS, "alibi", "retnet") or 0 <= float(text) <= 1:
            return text
    except ValueError:
        pass
    raise ValueError(
        f"decay: expected none, alibi, retnet, slope20, mixed, token or a factor from 0 to 1, got {text!r}"
    )


def mixture(rng: np.random.Generator, kind: str, B: int, Hs: int, N: int) -> Array:
    """A log_decay of shape `kind`: LOG_DECAYS shuffled, or 2 % of them among tokens' usual
    decays."""
    shape = {"[]": (), "[Hs]": (Hs,), "[B,Hs]": (B, Hs), "[B,Hs,N]": (B, Hs, N)}[kind]
    if kind == "[B,Hs,N]":
        usual, rare = -rng.exponential(0.1, shape), rng.choice(LOG_DECAYS, shape)
        return np.where(rng.random(shape) < 0.98, usual, rare).astype(np.float32)
    return np.resize(rng.permutation(LOG_DECAYS), shape)


def log_decay(name: str, rng: np.random.Generator, B: int, Hs: int, N: int) -> Array | float | None:
    """The decay called `name`: None, a number, [Hs] or [B, Hs, N], float32."""
    match name:
        case "none":
            return None
        case "slope20":
            return -20.0
        case "alibi":
            return leetcore.decay.alibi(Hs)
        case "retnet":
            return leetcore.decay.retnet(Hs)
        case "mixed":
            return mixture(rng, "[Hs]", B, Hs, N)
        case "token":
            return mixture(rng, "[B,Hs,N]", B, Hs, N)
    return float(leetcore.decay.from_gamma(float(name)))


@dataclass(frozen=True)
class Case:
    """A problem. Its inputs have unit variance and depend on its fields alone.

    heads: Hq, Hk, Hv. bounds: cu_seqlens of a packed problem (B is 1).
    """

    N: int
    K: int
    V: int
    dtype: str = "float32"
    decay: str = "mixed"
    B: int = 1
    heads: tuple[int, int, int] = (2, 2, 2)
    state: bool = False
    layout: Layout = "bhnd"
    bounds: tuple[int, ...] | None = None

    @classmethod
    def of(cls, shape: Shape, dtype: str, decay: str) -> Case:
        return cls(shape.N, shape.K, shape.V, dtype, decay, shape.B, (shape.H,) * 3)

    def arguments(self) -> dict[str, Any]:
        """The arguments of leetcore.linear_attention: numpy arrays, and the scale K**-0.5."""
        seed = zlib.crc32(f"{self.N} {self.K} {self.V} {self.decay} {self.heads}".encode())
        rng, dtype, Hs = np.random.default_rng(seed), DTYPES[self.dtype], max(self.heads[1:])
        dims = (self.K, self.K, self.V)
        q, k, v = (
            rng.standard_normal((self.B, H, self.N, D)).astype(dtype) for H, D in zip(self.heads, dims, strict=True)
        )
        given: dict[str, Any] = {"log_decay": log_decay(self.decay, rng, self.B, Hs, self.N), "scale": self.K**-0.5}
        if self.layout == "bnhd":
            q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v))
            given["layout"] = "bnhd"
            if self.decay == "token":
                given["log_decay"] = np.ascontiguousarray(given["log_decay"].swapaxes(1, 2))
        if self.bounds is not None:
            given["cu_seqlens"] = np.array(self.bounds, np.int64)
        if self.state:
            sequences = self.B if self.bounds is None else len(self.bounds) - 1
            given["initial_state"] = rng.standard_normal((sequences, Hs, self.K, self.V)).astype(self.state_dtype)
        return {"q": q, "k": k, "v": v} | given

    @property
    def state_dtype(self) -> Any:
        return np.float64 if self.dtype == "float64" else np.float32

    def expected(self, given: dict[str, Any]) -> tuple[Array, Array]:
        """Output and final state in float64; `given` is what `arguments()` returned."""
        # Chunks only pay for long sequences. They take differences of sums of decays, too coarse to
        # judge float64 by.
        return reference.linear_attention(**given, fast=self.dtype != "float64" and self.N > 2000)

    def __str__(self) -> str:
        """The Python expression that makes this case: `Case(...)`."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        changed = [f"{name}={value!r}" for name, value in fields.items() if value != getattr(Case, name, None)]
        return f"Case({', '.join(changed)})"


def refusal(method: str, error: NotImplementedError) -> str:
    """The reason why this method does not serve, from a text that may give it for every method."""
    lines = [line.strip() for line in str(error).splitlines()]
    own = [line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{method}:")]
    return (own or lines or ["it does not say why"])[0]


def wrong_kind(what: str, got: Any, shape: tuple[int, ...], dtype: Any) -> str | None:
    """What is wrong with a result's type, shape or dtype; None where nothing is."""
    if not isinstance(got, np.ndarray):
        return f"{what}: wrong type: got {type(got).__name__}, expected an array of numpy"
    if got.shape != shape:
        return f"{what}: wrong shape: got {list(got.shape)}, expected {list(shape)}"
    if got.dtype != dtype:
        return f"{what}: wrong dtype: got {got.dtype}, expected {np.dtype(dtype)}"
    return None
