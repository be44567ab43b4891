"""leetcore: causal linear attention with exponential decay, on arrays of any DLPack library."""

import contextlib
import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if importlib.util.find_spec(f"{__name__}._core") is None:  # else Python speaks of a circular import
    raise ImportError(
        f"leetcore: expected the compiled module leetcore._core for this Python, got none in {list(__path__)}; "
        "`pip install` builds it, and it cannot be loaded from a zip file",
        name="leetcore._core",
    )

from . import _core, decay, reference, tuning
from .api import (
    Gradients,
    build_info,
    decode_step,
    linear_attention,
    linear_attention_backward,
    num_threads,
    set_num_threads,
)
from .choice import Candidate, Candidates, candidates, explain
from .conv import ConvGradients, causal_conv1d, causal_conv1d_backward, causal_conv1d_step
from .mamba2 import ssd, ssd_step
from .methods import Cost, Method, cost, methods, register_method, unregister_method

__version__ = _core.version

__all__ = [
    "Candidate",
    "Candidates",
    "ConvGradients",
    "Cost",
    "Gradients",
    "Method",
    "build_info",
    "candidates",
    "causal_conv1d",
    "causal_conv1d_backward",
    "causal_conv1d_step",
    "cost",
    "decay",
    "decode_step",
    "explain",
    "get_cmake_dir",
    "get_include",
    "linear_attention",
    "linear_attention_backward",
    "methods",
    "num_threads",
    "reference",
    "register_method",
    "set_num_threads",
    "ssd",
    "ssd_step",
    "unregister_method",
]


with contextlib.suppress(RuntimeError):  # a wrong LEETCORE_ISA: every call will say so
    tuning.load(build_info()["isa"])


if TYPE_CHECKING:
    from . import torch as torch
else:

    def __getattr__(name):
        """leetcore.torch, which is imported where it is first used, as it imports torch."""
        if name != "torch":
            raise AttributeError(f"module 'leetcore' has no attribute {name!r}")
        try:
            return importlib.import_module("leetcore.torch")
        except ImportError as error:
            raise AttributeError(f"leetcore.torch: {error}") from error


def get_include() -> str:
    """The directory to put on a C or C++ compiler's include path for leetcore/leetcore.h."""
    return str(_built("include"))


def get_cmake_dir() -> str:
    """The directory with leetcoreConfig.cmake: pass it as -Dleetcore_DIR=... to CMake."""
    return str(_built("lib*/cmake/leetcore"))


def _built(pattern: str) -> Path:
    """The file or folder that the build put next to the extension module.

    An editable install keeps the Python sources in another folder.
    """
    for folder in (Path(_core.__file__).parent, *map(Path, __path__)):
        for found in folder.glob(pattern):
            return found
    raise FileNotFoundError(f"leetcore: expected {pattern} next to {_core.__file__}, got none; install leetcore again")
