"""The only module that knows which array libraries exist: how each exports, allocates and takes back arrays.

A library here is an object with

- ``plain``: whether ``export`` and ``result`` return what they are given, so that they need not be called;
- ``owns(array)``: whether the array is of this library;
- ``export(name, array, writable)``: what the extension module imports through DLPack or the buffer protocol, usually
  the array itself; raises for an array that must not be used as it is;
- ``repair(name, array, writable)``: a second try where that import failed, or an error that says why;
- ``contiguous(array)``: a copy whose last dimension is contiguous;
- ``empty(shape, like, float_bits)``: a new array beside `like`, of its dtype (0) or of float32 / float64;
- ``result(array)``: a finished array of ``empty`` as the caller's kind of array;
- ``numpy(array)``, ``from_numpy(array)``: as numpy's array, sharing memory where both can, and back.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import _core

Array = Any


class NumPy:
    name = "numpy"
    plain = True

    def owns(self, array: Array) -> bool:
        return isinstance(array, np.ndarray)

    def export(self, name: str, array: Array, writable: bool) -> Any:
        return array

    def repair(self, name: str, array: Array, writable: bool) -> Any:
        if writable and not array.flags.writeable:
            raise ValueError(f"{name}: expected a writable array, got a read-only one")
        if array.dtype.name == "bfloat16":  # of ml_dtypes; numpy cannot export it, so it goes as its bits
            return _core.as_bfloat16(array.view(np.uint16))
        raise TypeError(f"{name}: expected dtype float64, float32, float16 or bfloat16, got {array.dtype}")

    def contiguous(self, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def empty(self, shape: tuple[int, ...], like: Array, float_bits: int) -> Array:
        return np.empty(shape, np.float64 if float_bits == 64 else np.float32 if float_bits else like.dtype)

    def result(self, array: Array) -> Array:
        return array

    def numpy(self, array: Array) -> Array:
        return array

    def from_numpy(self, array: Array) -> Array:
        return array


class Torch:
    name = "torch"
    plain = False

    def owns(self, array: Array) -> bool:
        torch = sys.modules.get("torch")
        return torch is not None and isinstance(array, torch.Tensor)

    def export(self, name: str, array: Array, writable: bool) -> Any:
        import torch

        if array.requires_grad:
            if torch.is_grad_enabled():
                raise TypeError(
                    f"{name}: expected a tensor without requires_grad, as no gradient is computed; detach() it"
                )
            array = array.detach()
        if array.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got layout {array.layout}")
        if array.device.type not in ("cpu", "cuda"):
            raise TypeError(f"{name}: expected a tensor on the CPU or a CUDA device, got {array.device}")
        if array.is_neg() or array.is_conj():
            if writable:
                raise ValueError(f"{name}: expected plain memory to write to, got a view with a pending negation")
            array = array.resolve_neg().resolve_conj()
        return torch.utils.dlpack.to_dlpack(array)  # type: ignore[attr-defined]

    def repair(self, name: str, array: Array, writable: bool) -> Any:
        raise TypeError(f"{name}: expected dtype float64, float32, float16 or bfloat16, got {array.dtype}")

    def contiguous(self, array: Array) -> Array:
        return array.contiguous()

    def empty(self, shape: tuple[int, ...], like: Array, float_bits: int) -> Array:
        import torch

        dtype = torch.float64 if float_bits == 64 else torch.float32 if float_bits else like.dtype
        return torch.empty(shape, dtype=dtype, device=like.device)

    def result(self, array: Array) -> Array:
        return array

    def numpy(self, array: Array) -> Array:
        import torch

        array = array.detach().cpu()
        if array.dtype is not torch.bfloat16:
            return array.numpy()
        import ml_dtypes

        return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)

    def from_numpy(self, array: Array) -> Array:
        import torch

        if array.dtype.name != "bfloat16":
            return torch.from_numpy(array)
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


class Immutable(NumPy):
    """Libraries whose arrays are never written: results are made by numpy and handed over."""

    plain = False

    def __init__(self, name: str, convert: Any) -> None:
        self.name = name
        self._convert = convert

    def owns(self, array: Array) -> bool:
        return _package(array) == self.name

    def export(self, name: str, array: Array, writable: bool) -> Any:
        if writable and not isinstance(array, np.ndarray):
            raise TypeError(
                f"{name}: expected an array that can be written, got one of {self.name}, which are immutable"
            )
        return array

    def repair(self, name: str, array: Array, writable: bool) -> Any:
        if isinstance(array, np.ndarray):
            return super().repair(name, array, writable)
        raise TypeError(f"{name}: expected an array that exports a float dtype, got {type(array).__name__}")

    def contiguous(self, array: Array) -> Array:
        return np.ascontiguousarray(np.from_dlpack(array))

    def empty(self, shape: tuple[int, ...], like: Array, float_bits: int) -> Array:
        dtype = np.float64 if float_bits == 64 else np.float32 if float_bits else _numpy_dtype(like)
        return _aligned_empty(shape, np.dtype(dtype))

    def result(self, array: Array) -> Array:
        return self._convert(array)

    def numpy(self, array: Array) -> Array:
        return array if isinstance(array, np.ndarray) else np.from_dlpack(array)

    def from_numpy(self, array: Array) -> Array:
        return self.result(array)


class Jax(Immutable):
    def __init__(self) -> None:
        super().__init__("jax", None)

    def owns(self, array: Array) -> bool:
        jax = sys.modules.get("jax")
        return jax is not None and isinstance(array, jax.Array)

    def export(self, name: str, array: Array, writable: bool) -> Any:
        import jax

        if isinstance(array, jax.core.Tracer):
            raise TypeError(f"{name}: expected a concrete array, got a tracer; call leetcore outside of jax.jit")
        exported = super().export(name, array, writable)
        return exported if isinstance(exported, np.ndarray) else exported.block_until_ready()

    def contiguous(self, array: Array) -> Array:
        return np.ascontiguousarray(np.asarray(array))

    def result(self, array: Array) -> Array:
        import jax.numpy as jnp

        return jnp.asarray(array)

    def numpy(self, array: Array) -> Array:
        return np.asarray(array)


def _package(array: Array) -> str:
    return type(array).__module__.split(".")[0]


def _numpy_dtype(array: Array) -> np.dtype[Any]:
    """The numpy dtype of any library's array; bfloat16 needs ml_dtypes."""
    name = str(getattr(array, "dtype", None)).split(".")[-1]
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    try:
        return np.dtype(name)
    except TypeError:
        dtype: np.dtype[Any] = np.from_dlpack(array).dtype
        return dtype


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """64-byte aligned, so that a library which wants that can take the memory without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _other_library(array: Array) -> Immutable:
    """Any producer of DLPack: results go back through its own from_dlpack, or stay numpy's where it has none."""
    namespace = getattr(array, "__array_namespace__", lambda: None)() or sys.modules.get(_package(array))
    return Immutable(_package(array), getattr(namespace, "from_dlpack", lambda x: x))


Library = NumPy | Torch

_NUMPY, TORCH = NumPy(), Torch()
_SHARED: tuple[Library, ...] = (_NUMPY, TORCH, Jax())
_of_type: dict[type, Library] = {np.ndarray: _NUMPY}


def _find(name: str, array: Array) -> Library:
    for library in _SHARED:
        if library.owns(array):
            break
    else:
        if not hasattr(array, "__dlpack__"):
            raise TypeError(
                f"{name}: expected an array of numpy, torch, jax or another DLPack library, got {type(array).__name__}"
            )
        library = next((x for x in _of_type.values() if x.name == _package(array)), None) or _other_library(array)
    _of_type[type(array)] = library
    return library


def library_of(names: tuple[str, ...], *arrays: Array) -> Library:
    """The library all arrays are of; None and Python numbers are of every one. Raises TypeError for a mixture."""
    kind = type(arrays[0])
    library = _of_type.get(kind) or _find(names[0], arrays[0])
    for name, array in zip(names, arrays, strict=False):
        if array is None or type(array) is kind or isinstance(array, (float, int)):
            continue
        if (found := _of_type.get(type(array)) or _find(name, array)) is not library:
            raise TypeError(f"{name}: expected an array of {library.name} like {names[0]}, got one of {found.name}")
    return library
