"""Fake array libraries on a GPU: numpy memory, exported through DLPack as a CUDA device's.

Each library has what leetcore uses of the real one, and notes which stream a producer was given,
what was made on which stream and device. Reading values on the host is an error unless `readable`
is set.
"""

import contextlib
import ctypes
import sys
import types
from typing import ClassVar

import numpy as np
import torch

CUDA = 2
readable = False
exports = []  # the stream passed to each __dlpack__; for torch, the current stream
made = []  # (shape, stream, device) of each array that a library allocated
_alive = {}


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),  # 1: read only
        ("tensor", _DLTensor),
    )


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(address):
    del _alive[address]


_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_NAME, _VERSIONED = b"dltensor", b"dltensor_versioned"
_CODES = {"i": 0, "u": 1, "f": 2}


def capsule(host, device=0, owner=None, read_only=False):
    """numpy's memory as a DLPack capsule of a CUDA device. From now on kernels may access it."""
    emulator.allow(host)
    sizes = (ctypes.c_int64 * host.ndim)(*host.shape)
    steps = (ctypes.c_int64 * host.ndim)(*(s // host.itemsize for s in host.strides))
    bfloat16 = host.dtype.name == "bfloat16"
    tensor = _DLTensor(
        data=host.ctypes.data,
        device=(CUDA, device),
        ndim=host.ndim,
        code=4 if bfloat16 else _CODES[host.dtype.kind],
        bits=8 * host.itemsize,
        lanes=1,
        shape=sizes,
        strides=steps,
    )
    delete = ctypes.cast(_delete, ctypes.c_void_p)
    managed = _Versioned((1, 0), None, delete, 1, tensor) if read_only else _Managed(tensor, None, delete)
    _alive[ctypes.addressof(managed)] = managed, sizes, steps, host, owner
    return _new(ctypes.addressof(managed), _VERSIONED if read_only else _NAME, None)


def memory_of(capsule):
    """The memory of a capsule as a numpy array. The caller keeps the capsule alive."""
    t = _Managed.from_address(_pointer(capsule, _NAME)).tensor
    shape = [t.shape[i] for i in range(t.ndim)]
    dtype = np.dtype(f"{'iuf'[t.code]}{t.bits // 8}")
    count = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * count).from_address(t.data), dtype).reshape(shape)


class Emulator:
    """The emulated devices of an extension module that was built on the emulator."""

    def __init__(self):
        self._library = None

    def use(self, path):
        self._library = ctypes.CDLL(path)
        self._library.emulator_allow.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_bool)
        self._library.emulator_launches.restype = ctypes.c_int64
        self._library.emulator_stream.restype = ctypes.c_size_t

    def allow(self, host):
        if self._library and host.size:
            low, high = np.lib.array_utils.byte_bounds(host)
            self._library.emulator_allow(low, high - low, True)

    def forget(self):
        self._library.emulator_forget()

    @property
    def launches(self):
        return self._library.emulator_launches()

    @property
    def stream(self):
        return self._library.emulator_stream()

    @property
    def device(self):
        return self._library.emulator_device()


emulator = Emulator()


def reset():
    global readable
    readable = False
    exports.clear()
    made.clear()


def read(host):
    assert readable, "a value on the GPU was read by the host"
    return host


class Array:
    """The base of the fake arrays of all libraries except torch."""

    def __init__(self, host, device=0):
        self.host, self.number = host, device

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)

    def __dlpack_device__(self):
        return CUDA, self.number

    def __dlpack__(self, *, stream=None, max_version=None):
        exports.append(stream)
        return capsule(self.host, self.number, self)

    def __array__(self, *args, **kwargs):
        return read(self.host)

    def __setitem__(self, where, values):
        assert isinstance(values, type(self))
        self.host[where] = values.host


def _nan(shape, dtype):
    """Memory at an address that is a multiple of 256, like cudaMalloc's."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 256, np.uint8)
    start = -raw.ctypes.data % 256
    array = raw[start : start + size].view(dtype).reshape(shape)
    array[...] = np.nan
    return array


def _empty(kind, shape, dtype, stream, device):
    made.append((tuple(shape), stream, device))
    return kind(_nan(shape, dtype), device)


# ---- a library of the array API standard ---------------------------------------------------------


class OtherArray(Array):
    __module__ = "fakelib"
    device = property(lambda self: f"gpu:{self.number}")

    def __array_namespace__(self):
        return types.SimpleNamespace(
            float32=np.dtype("f4"),
            float64=np.dtype("f8"),
            empty=lambda shape, dtype, device: _empty(OtherArray, shape, dtype, None, int(device[-1])),
            asarray=self._asarray,
        )

    @staticmethod
    def _asarray(x, copy=None, device="gpu:0"):
        return OtherArray(np.array(x.host if isinstance(x, OtherArray) else x, order="C"), int(device[-1]))


class OldArray(OtherArray):
    """An array of a library that knows no versions of DLPack."""

    __module__ = "fakelib"

    def __dlpack__(self, *, stream=None):
        return super().__dlpack__(stream=stream)


class ReadOnlyArray(OtherArray):
    """A read-only array, which DLPack can express since version 1."""

    __module__ = "fakelib"

    def __dlpack__(self, *, stream=None, max_version=None):
        if not max_version:
            raise BufferError("read-only memory needs DLPack 1")
        exports.append(stream)
        return capsule(self.host, self.number, self, read_only=True)


# ---- cupy ----------------------------------------------------------------------------------------


class CuPyArray(Array):
    __module__ = "cupy"
    device = property(lambda self: CuPyDevice(self.number))

    def get(self):
        return read(self.host)

    def __dlpack__(self, *, stream=None, max_version=None):
        assert stream is not None and stream != 0, "cupy refuses 0"
        assert CuPyDevice.current == self.number
        if stream not in (-1, CuPyStream.current.ptr or 1):
            CuPyStream.waits.append((stream, CuPyStream.current.ptr))
        return super().__dlpack__(stream=stream)


class CuPyDevice:
    current = 0

    def __init__(self, number):
        self.id = number

    def __enter__(self):
        self._before, CuPyDevice.current = CuPyDevice.current, self.id

    def __exit__(self, *error):
        CuPyDevice.current = self._before


class CuPyStream:
    current = None
    waits: ClassVar = []  # (the stream that waits, for which)

    def __init__(self, ptr):
        self.ptr = ptr

    def __enter__(self):
        self._before, CuPyStream.current = CuPyStream.current, self

    def __exit__(self, *error):
        CuPyStream.current = self._before


def cupy():
    CuPyStream.current, CuPyStream.waits = CuPyStream(0), []
    module = types.ModuleType("cupy")
    module.ndarray = CuPyArray
    module.cuda = types.SimpleNamespace(
        Device=CuPyDevice, ExternalStream=CuPyStream, get_current_stream=lambda: CuPyStream.current
    )
    module.empty = lambda shape, dtype: _empty(CuPyArray, shape, dtype, CuPyStream.current.ptr, CuPyDevice.current)
    module.ascontiguousarray = lambda x: CuPyArray(np.ascontiguousarray(x.host), x.number)
    module.asarray = lambda x: CuPyArray(np.array(x), CuPyDevice.current)
    return module


# ---- jax -----------------------------------------------------------------------------------------


class JaxArray(Array):
    __module__ = "jax"
    keep = None

    def devices(self):
        return {JaxDevice(self.number)}

    def is_deleted(self):
        return False

    def __setitem__(self, where, values):
        raise TypeError("immutable")


class JaxDevice:
    external = 0x5A5

    def __init__(self, number):
        self.number = number

    def get_stream_for_external_ready_events(self):
        return self.external


def _from_dlpack(producer):
    kind, device = producer.__dlpack_device__()
    assert kind == CUDA
    given = producer.__dlpack__(stream=JaxDevice.external)
    array = JaxArray(memory_of(given), device)
    array.keep = given
    return array


def jax():
    module, functions = types.ModuleType("jax"), types.ModuleType("jax.numpy")
    module.Array, module.numpy = JaxArray, functions
    module.core = types.SimpleNamespace(Tracer=type("Tracer", (), {}))
    module.dlpack = types.SimpleNamespace(from_dlpack=_from_dlpack)
    module.device_put = lambda x, device: JaxArray(np.array(x), device.number)
    functions.empty = lambda shape, dtype, device: _empty(JaxArray, shape, dtype, None, device.number)
    functions.array = lambda x: JaxArray(np.array(x.host, order="C"), x.number)
    return module


# ---- torch ---------------------------------------------------------------------------------------


class TorchStream:
    current = None
    events: ClassVar = []  # ("wait", stream, for which), ("record", shape, stream), ("new stream",)

    def __init__(self, cuda_stream, device=0):
        if not cuda_stream:
            TorchStream.events.append(("new stream",))
        self.cuda_stream = cuda_stream

    def wait_stream(self, other):
        TorchStream.events.append(("wait", self.cuda_stream, other.cuda_stream))


class TorchArray(torch.Tensor):
    number = 0
    is_cuda = property(lambda self: True)
    device = property(lambda self: torch.device("cuda", self.number))

    def get_device(self):
        return self.number

    def record_stream(self, stream):
        TorchStream.events.append(("record", tuple(self.shape), stream.cuda_stream))

    def cpu(self):
        return read(torch.Tensor.as_subclass(self, torch.Tensor))

    def numpy(self):
        raise TypeError("a tensor on a GPU")

    def __dlpack_device__(self):
        return CUDA, self.number


def torch_array(host, device=0):
    array = torch.as_tensor(host).as_subclass(TorchArray)
    array.number = device
    return array


def _bits(tensor):
    """A fake's memory as a numpy array, for bfloat16 too."""
    import ml_dtypes

    plain = tensor.detach().as_subclass(torch.Tensor)
    if plain.dtype is torch.bfloat16:
        return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return plain.numpy()


def patch_torch(monkeypatch):
    TorchStream.events = []
    default = TorchStream.current = TorchStream(0)
    TorchStream.events.clear()
    empty, to, to_dlpack = torch.empty, torch.Tensor.to, torch.utils.dlpack.to_dlpack

    @contextlib.contextmanager
    def on(stream):
        before, TorchStream.current = TorchStream.current, stream
        yield
        TorchStream.current = before

    def fake_empty(shape, dtype, device):
        if device.type != "cuda":
            return empty(shape, dtype=dtype, device=device)
        made.append((tuple(shape), TorchStream.current.cuda_stream, device.index))
        size = int(np.prod(shape)) * dtype.itemsize
        return torch_array(torch.from_numpy(_nan((size // 2,), "f2")).view(dtype).view(shape), device.index)

    def fake_to(tensor, device):
        return torch_array(tensor, device.index) if getattr(device, "type", "") == "cuda" else to(tensor, device)

    def fake_to_dlpack(tensor):
        if not isinstance(tensor, TorchArray):
            return to_dlpack(tensor)
        exports.append(TorchStream.current.cuda_stream)
        return capsule(_bits(tensor), tensor.number, tensor)

    monkeypatch.setattr(torch, "empty", fake_empty)
    monkeypatch.setattr(torch.Tensor, "to", fake_to)
    monkeypatch.setattr(torch.utils.dlpack, "to_dlpack", fake_to_dlpack)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: TorchStream.current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "ExternalStream", TorchStream)
    monkeypatch.setattr(torch.cuda, "stream", on)


def install(monkeypatch):
    """Replaces the libraries with the fakes until the test ends."""
    reset()
    patch_torch(monkeypatch)
    fake_jax = jax()
    for name, module in (("cupy", cupy()), ("jax", fake_jax), ("jax.numpy", fake_jax.numpy)):
        monkeypatch.setitem(sys.modules, name, module)
