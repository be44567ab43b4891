"""The extension module. `lib` is a library of arrays.py, `options` are those of options.py."""

from typing import Any

from .options import ConvOptions, Options

version: str

def forward(
    lib: Any,
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    initial_state: Any,
    cu_seqlens: Any,
    out: Any,
    return_state: bool,
    options: Options,
) -> Any: ...
def backward(
    lib: Any,
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    initial_state: Any,
    cu_seqlens: Any,
    d_o: Any,
    d_final_state: Any,
    wants: tuple[bool, bool, bool, bool, bool],
    options: Options,
) -> tuple[Any, Any, Any, Any, Any]: ...
def decode(
    lib: Any, q: Any, k: Any, v: Any, state: Any, log_decay: Any, state_indices: Any, out: Any, options: Options
) -> Any: ...
def ssd(
    lib: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    dt_bias: Any,
    initial_state: Any,
    cu_seqlens: Any,
    out: Any,
    return_state: bool,
    options: Options,
) -> Any: ...
def ssd_backward(
    lib: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    dt_bias: Any,
    initial_state: Any,
    cu_seqlens: Any,
    d_y: Any,
    d_final_state: Any,
    wants: tuple[bool, bool, bool, bool, bool, bool],
    options: Options,
) -> tuple[Any, Any, Any, Any, Any, Any]: ...
def ssd_step(
    lib: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    state: Any,
    D: Any,
    z: Any,
    dt_bias: Any,
    state_indices: Any,
    out: Any,
    options: Options,
) -> Any: ...
def candidates(
    lib: Any,
    op: int,
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    initial_state: Any,
    cu_seqlens: Any,
    return_state: bool,
    options: Options,
) -> tuple[int, str, str, list[Any]]: ...
def cost(
    shape: tuple[int, ...],
    dtype_code: int,
    dtype_bits: int,
    per_token: bool,
    initial_state: bool,
    final_state: bool,
    cuda: bool,
    options: Options,
) -> tuple[str, float, float, float, int, float, float]: ...
def conv_forward(
    lib: Any,
    x: Any,
    weight: Any,
    bias: Any,
    initial_state: Any,
    cu_seqlens: Any,
    out: Any,
    return_state: bool,
    options: ConvOptions,
) -> Any: ...
def conv_check(
    lib: Any,
    x: Any,
    weight: Any,
    bias: Any,
    initial_state: Any,
    cu_seqlens: Any,
    state: Any,
    state_indices: Any,
    options: ConvOptions,
) -> None: ...
def conv_backward(
    lib: Any,
    x: Any,
    weight: Any,
    bias: Any,
    initial_state: Any,
    cu_seqlens: Any,
    d_y: Any,
    d_final_state: Any,
    wants: tuple[bool, bool, bool, bool],
    options: ConvOptions,
) -> tuple[Any, Any, Any, Any]: ...
def conv_step(
    lib: Any, x: Any, weight: Any, bias: Any, state: Any, state_indices: Any, out: Any, options: ConvOptions
) -> Any: ...
def set_tuning(text: str | None) -> None: ...
def as_bfloat16(bits: Any) -> Any: ...
def owned(array: Any, owner: Any) -> Any: ...
def methods() -> list[tuple[str, str, str, str, str]]: ...
def build_info() -> str: ...
def set_num_threads(n: int) -> None: ...
def thread_count(framework: int) -> tuple[int, str]: ...
