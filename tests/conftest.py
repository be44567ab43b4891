"""Inputs of unit variance, tolerances, and outputs that are NaN until they are written."""

import leetcore
import ml_dtypes
import numpy as np
import pytest
from leetcore import arrays

METHODS = [m.name for m in leetcore.methods() if m.device == "cpu"]
DTYPES = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
# Relative Frobenius norms against float64, on the same rounded inputs: (output, state).
TOLERANCE = {"f64": (1e-12, 1e-12), "f32": (5e-6, 5e-6), "f16": (1e-3, 5e-4), "bf16": (4e-3, 3e-3)}
GAMMAS = [0.0, 1e-4, 0.5, 0.9, 0.99, 1 - 1e-6, 1.0]
LOG_DECAYS = np.append(leetcore.decay.from_gamma(GAMMAS), np.float32(-20))  # slopes reach 20


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Fills every array that leetcore allocates for a result with NaN, so that an element nobody wrote shows."""

    def poison(library):
        empty = library.empty

        def poisoned(self, shape, like, float_bits):
            array = empty(self, shape, like, float_bits)
            array[...] = float("nan")
            return array

        monkeypatch.setattr(library, "empty", poisoned)

    for library in (arrays.NumPy, arrays.Torch, arrays.Immutable):
        poison(library)


def serves(method, arguments):
    """Whether a method takes these. The one refusal, fft's of a decay per token, has to say why and who can."""
    if method != "fft" or np.ndim(arguments["log_decay"]) < 3:
        return True
    why = r"'fft' does not serve this problem(.|\n)*chunk: serves it(.|\n)*fft: its Toeplitz mask needs one decay"
    with pytest.raises(NotImplementedError, match=why):
        leetcore.linear_attention(**arguments, method=method)
    return False


def normal(rng, shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def log_decays(rng, kind, B, Hs, N):
    """A log_decay of the named shape, from gamma = 0 to 1, mixed per head and, where it has tokens, per token."""
    shape = {"[]": (), "[Hs]": (Hs,), "[B,Hs]": (B, Hs), "[B,Hs,N]": (B, Hs, N)}[kind]
    if kind == "[B,Hs,N]":
        return np.where(rng.random(shape) < 0.98, -rng.exponential(0.1, shape), rng.choice(LOG_DECAYS, shape)).astype(
            "f4"
        )
    return np.resize(rng.permutation(LOG_DECAYS), shape)
