"""Inputs of unit variance, tolerances, and outputs that are NaN until they are written."""

import leetcore
import numpy as np
import pytest
from leetcore import arrays
from leetcore.bench import problems
from leetcore.bench.problems import GAMMAS, LOG_DECAYS  # noqa: F401
from leetcore.bench.problems import mixture as log_decays  # noqa: F401

METHODS = [m.name for m in leetcore.methods() if m.device == "cpu"]
# Short names of dtypes, for the names of tests.
_NAMES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
DTYPES = {short: problems.DTYPES[name] for short, name in _NAMES.items()}
TOLERANCE = {short: problems.TOLERANCE[name] for short, name in _NAMES.items()}


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


SERVES = {m.name: m.serves.split() for m in leetcore.methods() if m.device == "cpu"}


def serves(method, arguments):
    """Whether a method declares the decay of these arguments. A refusal says why, and which method serves them."""
    if np.ndim(arguments["log_decay"]) < 3 or "decay_per_token" in SERVES[method]:
        return True
    why = rf"'{method}' does not serve this problem(.|\n)*chunk: serves it(.|\n)*{method}: .*per token"
    with pytest.raises(NotImplementedError, match=why):
        leetcore.linear_attention(**arguments, method=method)
    return False


def normal(rng, shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)
