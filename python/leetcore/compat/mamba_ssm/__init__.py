"""Mamba-2 of mamba_ssm, served by leetcore on every device.

The library is github.com/state-spaces/mamba, versions 2.2 and 2.3. Names, arguments, their order
and defaults are its own. `leetcore.torch` computes the results, with gradients. `install` lets a
program that imports mamba_ssm or causal_conv1d run on a machine without them. The functions of
causal_conv1d are here too; `leetcore.compat.causal_conv1d` has them.

chunk_size and state_dtype only choose among upstream's kernels and are ignored: states between
chunks are float32. Activations are None, "silu" and "swish".
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

from ...torch.mamba2_layer import RMSNormGated
from ..causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from .functions import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined, rmsnorm_fn, selective_state_update
from .layer import Mamba2

__all__ = [
    "Mamba2",
    "RMSNormGated",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "install",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "rmsnorm_fn",
    "selective_state_update",
]

# The modules that `install` makes, and the names that each of them has.
_MODULES: dict[str, dict[str, Any]] = {
    "mamba_ssm": {"__version__": "2.3.2", "Mamba2": Mamba2},
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba2": {"Mamba2": Mamba2},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
    },
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": selective_state_update},
    "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": RMSNormGated, "rmsnorm_fn": rmsnorm_fn},
    "causal_conv1d": {
        "__version__": "1.6.1",
        "causal_conv1d_fn": causal_conv1d_fn,
        "causal_conv1d_update": causal_conv1d_update,
    },
    "causal_conv1d.causal_conv1d_interface": {
        "causal_conv1d_fn": causal_conv1d_fn,
        "causal_conv1d_update": causal_conv1d_update,
    },
}


def install() -> None:
    """Lets this process import mamba_ssm and causal_conv1d where they are not installed.

    The modules have what this module serves, at the paths of upstream. The functions of Mamba-1 and
    Mamba-3, models and tools are not there, so their import fails as before. Call it before the
    first import of the program that needs them: transformers looks for mamba_ssm when it imports a
    model's file. Calling it again has no effect.

    Raises:
        RuntimeError: mamba_ssm or causal_conv1d is installed.
    """
    for name in ("mamba_ssm", "causal_conv1d"):
        present = sys.modules.get(name)
        if isinstance(present, _StandIn):
            return
        if present is not None or importlib.util.find_spec(name) is not None:
            raise RuntimeError(
                f"{name}: expected a machine without this package, got an installed one; import it as it is"
            )
    for path, names in _MODULES.items():
        module = sys.modules[path] = _StandIn(path)
        vars(module).update(names)
        parent, _, name = path.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)


class _StandIn(ModuleType):
    """A module of `install`. Its spec lets importlib.util.find_spec find it."""

    def __init__(self, path: str) -> None:
        super().__init__(path, f"{path}, served by leetcore.compat.mamba_ssm")
        is_package = any(other.startswith(f"{path}.") for other in _MODULES)
        self.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=is_package)
        if is_package:
            self.__path__: list[str] = []
