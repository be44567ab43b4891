"""Shared by the tests: inputs of unit variance, tolerances, and outputs filled with NaN."""

import leetcore
import numpy as np
import pytest
from leetcore import arrays
from leetcore.bench import problems
from leetcore.bench.problems import GAMMAS, LOG_DECAYS  # noqa: F401
from leetcore.bench.problems import mixture as log_decays  # noqa: F401

METHODS = [m.name for m in leetcore.methods() if m.device == "cpu"]


# The methods that need one decay for all tokens.
WITHOUT_TOKEN_DECAYS = [
    m.name for m in leetcore.methods() if m.device == "cpu" and "decay_per_token" not in m.serves.split()
]
# Short names of dtypes, for the names of tests.
_NAMES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
DTYPES = {short: problems.DTYPES[name] for short, name in _NAMES.items()}
TOLERANCE = {short: problems.TOLERANCE[name] for short, name in _NAMES.items()}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Fills every array that leetcore allocates for a result with NaN: a missing result shows."""

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
    """Whether a method declares the decay of these arguments. A refusal gives the reason and a
    method that serves them.
    """
    if np.ndim(arguments["log_decay"]) < 3 or method not in WITHOUT_TOKEN_DECAYS:
        return True
    why = rf"'{method}' does not serve this problem(.|\n)*chunk: serves it(.|\n)*{method}: .*per token"
    with pytest.raises(NotImplementedError, match=why):
        leetcore.linear_attention(**arguments, method=method)
    return False


def normal(rng, shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)
