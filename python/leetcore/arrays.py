"""The array libraries: how each exports, allocates and takes back arrays.

No other module knows them, so this is one file: each library is a short class.

A `Library` returns the `Place` of a call's arrays: the host, or a GPU and its stream. On a GPU the
host waits for nothing. The stream is the caller's, else the library's current one. The library
makes the stream wait for pending writes to the inputs (DLPack's ``__dlpack__(stream=...)``).
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import Any, Protocol

import numpy as np

from . import _core

Array = Any
Stream = Any  # a cudaStream_t as a number, or an object that has such a number

_CUDA = 2  # DLPack's number of the device type
_LEGACY = 1  # DLPack's number of the legacy default stream, which CUDA calls 0


class Library(Protocol):
    """An array library."""

    name: str

    def owns(self, array: Array) -> bool:
        """Whether the array is of this library."""

    def at(self, array: Array, stream: Stream) -> tuple[Place, int]:
        """The place of a call's arrays, found from one array, and the call's stream as a number."""

    def numpy(self, array: Array) -> Array:
        """The array as a numpy array, which shares its memory where possible."""


class Place(Protocol):
    """The arrays of a library in one place. On a GPU, each call has an object of its own."""

    plain: bool  # whether export and result return their argument, so that the caller may skip them

    def export(self, name: str, array: Array, writable: bool) -> Any:
        """The object that the extension module imports through DLPack or the buffer protocol.

        It is usually the array itself. Raises an error for an array that must not be used.
        """

    def repair(self, name: str, array: Array, writable: bool) -> Any:
        """Another object for an array whose import failed, or an error that says why."""

    def contiguous(self, array: Array) -> Array:
        """A copy whose last dimension is contiguous."""

    def empty(self, shape: tuple[int, ...], like: Array, float_bits: int) -> Array:
        """A new array on the device of `like`.

        float_bits: 32 or 64 for float32 or float64; 0 for the dtype of `like`.
        """

    def swapped(self, array: Array) -> Array:
        """A view of an array from `empty`, with its last two axes swapped."""

    def result(self, array: Array) -> Array:
        """An array from `empty`, after it was written, as an array of the caller's library."""

    def numpy(self, array: Array) -> Array:
        """The array as a numpy array, which shares its memory where possible."""

    def from_numpy(self, array: Array) -> Array:
        """A numpy array as an array of the caller's library, in this place."""

    def assign(self, array: Array, values: Array) -> None:
        """Writes numpy's values into an array."""


class NumPy:
    """numpy's arrays."""

    name = "numpy"
    plain = True

    def owns(self, array: Array) -> bool:
        return isinstance(array, np.ndarray)

    def at(self, array: Array, stream: Stream) -> tuple[Place, int]:
        return self, _number(stream)

    def export(self, name: str, array: Array, writable: bool) -> Any:
        return array

    def repair(self, name: str, array: Array, writable: bool) -> Any:
        if writable and not array.flags.writeable:
            raise ValueError(f"{name}: expected a writable array, got a read-only one")
        if not array.dtype.isnative:
            raise TypeError(f"{name}: expected native byte order, got dtype {array.dtype.str}; astype converts it")
        if not array.flags.aligned:
            raise ValueError(f"{name}: expected an aligned array, got a field of a packed struct; copy() aligns it")
        if array.dtype.name == "bfloat16":  # of ml_dtypes; numpy cannot export it, so its bits are exported
            return _core.as_bfloat16(array.view(np.uint16))
        raise TypeError(f"{name}: expected dtype float64, float32, float16 or bfloat16, got {array.dtype}")

    def contiguous(self, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def empty(self, shape: tuple[int, ...], like: Array, float_bits: int) -> Array:
        return np.empty(shape, np.float64 if float_bits == 64 else np.float32 if float_bits else like.dtype)

    def swapped(self, array: Array) -> Array:
        return array.swapaxes(-1, -2)

    def result(self, array: Array) -> Array:
        return array

    def numpy(self, array: Array) -> Array:
        return array

    def from_numpy(self, array: Array) -> Array:
        return array

    def assign(self, array: Array, values: Array) -> None:
        self.numpy(array)[...] = values


class Torch:
    """torch's tensors, and those of them on the host."""

    name = "torch"
    plain = False

    def owns(self, array: Array) -> bool:
        torch = sys.modules.get("torch")
        return torch is not None and isinstance(array, torch.Tensor)

    def at(self, array: Array, stream: Stream) -> tuple[Place, int]:
        if sys.modules["torch"].jit.is_tracing():  # the result would be a constant of the graph
            raise TypeError("q: expected a call outside of torch.jit.trace, got one in it; take leetcore.torch there")
        if not array.is_cuda:
            return self, _number(stream)
        place = TorchOnGpu(array, stream)
        return place, place.stream

    def export(self, name: str, array: Array, writable: bool) -> Any:
        torch = sys.modules["torch"]
        try:
            if (array.requires_grad and torch.is_grad_enabled()) or not _has_memory(array) or _has_tangent(array):
                raise self._refusal(name, array)
            if array.is_neg() or array.is_conj():
                if writable:
                    raise ValueError(f"{name}: expected plain memory to write to, got a view with a pending negation")
                array = array.resolve_neg().resolve_conj()
            capsule = torch.utils.dlpack.to_dlpack(array)
        except (RuntimeError, BufferError):  # torch's text names no argument
            raise self._refusal(name, array) from None
        if writable:  # autograd then knows that a saved tensor has changed
            torch.autograd.graph.increment_version(array)
        return capsule

    def _refusal(self, name: str, array: Array) -> TypeError:
        """The error that says why a tensor cannot be exported, and what to do instead."""
        import torch

        if array.is_nested:
            text = "a dense tensor, got a nested one; pack its sequences along the tokens, with cu_seqlens"
        elif array.layout is not torch.strided:
            text = f"a dense tensor, got layout {array.layout}; to_dense() makes one"
        elif hasattr(array, "to_local"):
            text = f"a tensor of one process, got {type(array).__name__}; to_local() gives the part of this process"
        elif array.requires_grad and torch.is_grad_enabled():
            text = (
                "a tensor without requires_grad, as no gradient is computed; detach() it, or take leetcore.torch, "
                "which has gradients"
            )
        elif _has_tangent(array):
            text = "a tensor without a tangent, as no derivative is computed; forward_ad.unpack_dual(x).primal has none"
        elif not (array.is_cpu or array.is_cuda):
            text = f"a tensor on the CPU or a CUDA device, got {array.device}"
        elif not (array.is_floating_point() and array.element_size() > 1) and array.dtype not in (
            torch.int32,
            torch.int64,
        ):
            text = f"dtype float64, float32, float16 or bfloat16, got {array.dtype}"
        else:
            kind = type(array).__name__
            text = (
                f"a tensor with memory of its own, got {'one without' if kind == 'Tensor' else kind}; where torch "
                "traces or transforms (FakeTensor, torch.func, torch.vmap), take leetcore.torch"
            )
        return TypeError(f"{name}: expected {text}")

    def repair(self, name: str, array: Array, writable: bool) -> Any:
        raise TypeError(f"{name}: expected dtype float64, float32, float16 or bfloat16, got {array.dtype}")

    def contiguous(self, array: Array) -> Array:
        return array.contiguous()

    def empty(self, shape: tuple[int, ...], like: Array, float_bits: int) -> Array:
        import torch

        dtype = torch.float64 if float_bits == 64 else torch.float32 if float_bits else like.dtype
        return torch.empty(shape, dtype=dtype, device=like.device)

    def swapped(self, array: Array) -> Array:
        return array.transpose(-1, -2)

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

    def assign(self, array: Array, values: Array) -> None:
        array.copy_(self.from_numpy(values))


def _has_memory(tensor: Array) -> bool:
    """Whether a tensor's values are in the memory of the host or of a CUDA device."""
    if not (tensor.is_cpu or tensor.is_cuda):
        return False
    if type(tensor) is sys.modules["torch"].Tensor:
        return bool(tensor.data_ptr() or not tensor.numel())
    with warnings.catch_warnings():  # some subclasses have no address, and warn
        warnings.simplefilter("ignore")
        return bool(tensor.data_ptr() or not tensor.numel())


def _has_tangent(tensor: Array) -> bool:
    forward_ad = sys.modules["torch.autograd.forward_ad"]
    # The level is a private name. In a torch without it, every call looks for the tangent.
    return getattr(forward_ad, "_current_level", 0) >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


class TorchOnGpu(Torch):
    """Tensors on a GPU, used as under ``with torch.cuda.stream(stream)``.

    Other streams may still be writing to the inputs.
    """

    def __init__(self, array: Array, stream: Stream) -> None:
        import torch

        self._device = array.device
        current = torch.cuda.current_stream(self._device)
        self.stream = current.cuda_stream if stream is None else _gpu_number(stream)
        self._other = None
        if self.stream != current.cuda_stream:
            self._other = (  # ExternalStream(0) would be a new stream
                torch.cuda.ExternalStream(self.stream, device=self._device)
                if self.stream
                else torch.cuda.default_stream(self._device)
            )
            self._other.wait_stream(current)

    def _on_stream(self) -> Any:
        import torch

        return contextlib.nullcontext() if self._other is None else torch.cuda.stream(self._other)

    def export(self, name: str, array: Array, writable: bool) -> Any:
        with self._on_stream():  # where a pending negation is carried out
            exported = super().export(name, array, writable)
        if self._other is not None and array.is_cuda:
            array.record_stream(self._other)  # torch reuses its memory only after that stream is done
        return exported

    def contiguous(self, array: Array) -> Array:
        with self._on_stream():
            return super().contiguous(array)

    def empty(self, shape: tuple[int, ...], like: Array, float_bits: int) -> Array:
        with self._on_stream():
            return super().empty(shape, like, float_bits)

    def from_numpy(self, array: Array) -> Array:
        return super().from_numpy(array).to(self._device)


class OnGpu:
    """Arrays on a GPU of any library with the array API standard, during one call.

    Without a stream from the caller, the work goes to the legacy default stream, because the
    standard has no current stream.
    """

    plain = False

    def __init__(self, library: str, array: Array, stream: Stream) -> None:
        self.stream = _gpu_number(stream)
        if not hasattr(array, "__array_namespace__"):
            raise TypeError(
                f"q: expected an array of torch, cupy, jax or a library with __array_namespace__, got one of {library}"
            )
        self._functions = array.__array_namespace__()
        self._device = array.device

    def export(self, name: str, array: Array, writable: bool) -> Any:
        stream = (self.stream or _LEGACY) if _is_on_gpu(array) else None
        try:
            with contextlib.suppress(BufferError):
                return array.__dlpack__(stream=stream)
            return array.__dlpack__(stream=stream, max_version=(1, 0))  # older versions cannot export read-only memory
        except (BufferError, TypeError) as error:
            raise BufferError(f"{name}: {error}") from None

    def repair(self, name: str, array: Array, writable: bool) -> Any:
        if writable:
            raise ValueError(f"{name}: expected a writable array, got a read-only one")
        raise _no_float(name, array)

    def contiguous(self, array: Array) -> Array:
        return self._functions.asarray(array, copy=True)

    def empty(self, shape: tuple[int, ...], like: Array, float_bits: int) -> Array:
        dtype = getattr(self._functions, f"float{float_bits}") if float_bits else like.dtype
        return self._functions.empty(shape, dtype=dtype, device=self._device)

    def swapped(self, array: Array) -> Array:
        return self._functions.swapaxes(array, -1, -2)

    def result(self, array: Array) -> Array:
        return array

    def numpy(self, array: Array) -> Array:
        return np.from_dlpack(array, device="cpu")

    def from_numpy(self, array: Array) -> Array:
        return self._functions.asarray(array, device=self._device)

    def assign(self, array: Array, values: Array) -> None:
        array[...] = self.from_numpy(values)


class CuPy:
    """cupy's arrays."""

    name = "cupy"
    plain = False

    def owns(self, array: Array) -> bool:
        cupy = sys.modules.get("cupy")
        return cupy is not None and isinstance(array, cupy.ndarray)

    def at(self, array: Array, stream: Stream) -> tuple[Place, int]:
        place = CuPyOnGpu(self.name, array, stream)
        return place, place.stream

    def numpy(self, array: Array) -> Array:
        return array.get()


class CuPyOnGpu(OnGpu):
    """cupy's arrays on a GPU.

    New memory comes from the pool of the call's stream, which reuses it in stream order.

    The inputs may come from pools of other streams. A caller that passes a stream must keep the
    inputs until the stream is done.
    """

    def __init__(self, library: str, array: Array, stream: Stream) -> None:
        self._cupy = cupy = sys.modules["cupy"]
        self._device = array.device
        with self._device:
            self._queue = (
                cupy.cuda.get_current_stream() if stream is None else cupy.cuda.ExternalStream(_gpu_number(stream))
            )
        self.stream = self._queue.ptr

    def export(self, name: str, array: Array, writable: bool) -> Any:
        with self._device:  # the call's stream has to wait for the current stream of this device
            return super().export(name, array, writable)

    def contiguous(self, array: Array) -> Array:
        with self._device, self._queue:
            return self._cupy.ascontiguousarray(array)

    def empty(self, shape: tuple[int, ...], like: Array, float_bits: int) -> Array:
        with self._device, self._queue:
            return self._cupy.empty(shape, f"float{float_bits}" if float_bits else like.dtype)

    def numpy(self, array: Array) -> Array:
        return array.get()

    def from_numpy(self, array: Array) -> Array:
        with self._device:
            return self._cupy.asarray(array)


class Immutable(NumPy):
    """Libraries with immutable arrays. numpy allocates the results; the library takes them over."""

    plain = False
    _on_gpu: type[OnGpu] = OnGpu

    def __init__(self, name: str, convert: Any) -> None:
        self.name = name
        self._convert = convert

    def owns(self, array: Array) -> bool:
        return _package(array) == self.name

    def at(self, array: Array, stream: Stream) -> tuple[Place, int]:
        if not _is_on_gpu(array):
            return self, _number(stream)
        place = self._on_gpu(self.name, array, stream)
        return place, place.stream

    def export(self, name: str, array: Array, writable: bool) -> Any:
        if writable and not isinstance(array, np.ndarray):
            raise TypeError(
                f"{name}: expected an array that can be written, got one of {self.name}, which are immutable"
            )
        return array

    def repair(self, name: str, array: Array, writable: bool) -> Any:
        if isinstance(array, np.ndarray):
            return super().repair(name, array, writable)
        raise _no_float(name, array)

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


class JaxOnGpu(OnGpu):
    """jax's arrays on a GPU. Results share the memory of arrays that jax has made for them.

    These arrays are zeros, because XLA has no empty ones. The work goes to the stream on which jax
    waits for external memory, so that jax.dlpack.from_dlpack orders later uses of a result after
    it. jax does not know when this stream has read an input; therefore the results keep the inputs
    and the scratch alive.
    """

    def __init__(self, library: str, array: Array, stream: Stream) -> None:
        if stream is not None:
            raise ValueError("stream: expected None with jax arrays, as jax orders its work by streams of its own")
        (self._device,) = array.devices()
        self.stream = self._device.get_stream_for_external_ready_events()
        self._made: list[Array] = []
        self._held: list[Array] = []

    def export(self, name: str, array: Array, writable: bool) -> Any:
        if writable and not any(array is made for made in self._made):
            raise TypeError(f"{name}: expected an array that can be written, got one of jax, which are immutable")
        _require_whole(name, array)
        self._held.append(array)
        return super().export(name, array, writable)

    def contiguous(self, array: Array) -> Array:
        import jax.numpy as jnp

        return jnp.array(array)

    def empty(self, shape: tuple[int, ...], like: Array, float_bits: int) -> Array:
        import jax.numpy as jnp

        array = jnp.empty(shape, f"float{float_bits}" if float_bits else like.dtype, device=self._device)
        self._made.append(array)
        return array

    def result(self, array: Array) -> Array:
        import jax

        capsule = _core.owned(array.__dlpack__(stream=self.stream), tuple(self._held))
        return jax.dlpack.from_dlpack(_Producer(capsule, array.__dlpack_device__()))

    def numpy(self, array: Array) -> Array:
        return np.asarray(array)

    def from_numpy(self, array: Array) -> Array:
        import jax

        return jax.device_put(array, self._device)


def _require_whole(name: str, array: Array) -> None:
    """Refuses an array of jax that is deleted or on several devices."""
    if array.is_deleted():
        raise ValueError(
            f"{name}: expected an array of jax that exists, got a deleted one; jax.jit deletes what is donated to it"
        )
    if (count := len(array.devices())) > 1:
        raise ValueError(f"{name}: expected an array on one device, got one on {count}; jax.device_put moves it to one")


class _Producer:
    """The object that jax.dlpack.from_dlpack takes: a capsule whose stream jax waits for anyway."""

    def __init__(self, capsule: Any, device: tuple[int, int]) -> None:
        self._capsule, self._device = capsule, device

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device


class Jax(Immutable):
    """jax's arrays, and those of them on the host."""

    _on_gpu = JaxOnGpu

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
        if isinstance(exported, np.ndarray):
            return exported
        _require_whole(name, exported)
        return exported.block_until_ready()

    def contiguous(self, array: Array) -> Array:
        return np.ascontiguousarray(np.asarray(array))

    def result(self, array: Array) -> Array:
        import jax.numpy as jnp

        return jnp.asarray(array)

    def numpy(self, array: Array) -> Array:
        return np.asarray(array)


def _number(stream: Stream) -> int:
    """The cudaStream_t of a stream: a number, or an object of torch, cupy, cuda.core or numba.

    None gives 0.
    """
    if stream is None:
        return 0
    if hasattr(stream, "__cuda_stream__"):
        _, number = stream.__cuda_stream__()
    else:
        number = getattr(stream, "cuda_stream", getattr(stream, "ptr", stream))
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        expected = "None, a cudaStream_t as a number, or a stream of torch, cupy or cuda.core"
        raise TypeError(f"stream: expected {expected}, got {stream!r}")
    return number


def _gpu_number(stream: Stream) -> int:
    """As `_number`, with CUDA's number 0 for the legacy default stream."""
    number = _number(stream)
    return 0 if number == _LEGACY else number


def _is_on_gpu(array: Array) -> bool:
    try:
        return bool(array.__dlpack_device__()[0] == _CUDA)
    except (AttributeError, BufferError, RuntimeError, TypeError):  # export and repair explain the error
        return False


def _no_float(name: str, array: Array) -> TypeError:
    dtype = getattr(array, "dtype", None)
    got = type(array).__name__ if dtype is None else f"{type(array).__name__} of dtype {dtype}"
    return TypeError(f"{name}: expected an array that exports a float dtype, got {got}")


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
    """An empty array aligned to 64 bytes, as libraries need it to use the memory without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _other_library(array: Array) -> Immutable:
    """Any library with DLPack.

    Results go through its from_dlpack, or stay numpy arrays if it has none.
    """
    namespace = getattr(array, "__array_namespace__", lambda: None)() or sys.modules.get(_package(array))
    return Immutable(_package(array), getattr(namespace, "from_dlpack", lambda x: x))


_NUMPY, TORCH = NumPy(), Torch()
_SHARED: tuple[Library, ...] = (_NUMPY, TORCH, Jax(), CuPy())
_of_type: dict[type, Library] = {np.ndarray: _NUMPY}


def _find(name: str, array: Array) -> Library:
    fx = sys.modules.get("torch.fx")
    if fx is not None and isinstance(array, fx.Proxy):
        raise TypeError(f"{name}: expected an array, got a Proxy of torch.fx, which traces calls of leetcore.torch")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: expected an array without a mask, got {type(array).__name__}; filled(value) gives a plain one"
        )
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


def threads_of_framework() -> int:
    """The number of threads that torch would use, or 0 in a process that has not loaded torch."""
    torch = sys.modules.get("torch")
    count = getattr(torch, "get_num_threads", None)  # torch may be half imported
    return int(count()) if count else 0


def library_of(names: tuple[str, ...], *arrays: Array) -> Library:
    """The library of all arrays. None and Python numbers fit every library.

    Raises TypeError if the arrays are of several libraries.
    """
    kind = type(arrays[0])
    library = _of_type.get(kind) or _find(names[0], arrays[0])
    for name, array in zip(names, arrays, strict=False):
        if array is None or type(array) is kind or isinstance(array, (float, int)):
            continue
        if (found := _of_type.get(type(array)) or _find(name, array)) is not library:
            raise TypeError(f"{name}: expected an array of {library.name} like {names[0]}, got one of {found.name}")
    return library
