"""The extension module: one call crosses into C++ once. `lib` is a library of arrays.py; see there and api.py."""

from typing import Any

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
    scale: float,
    method: str,
    bnhd: bool,
    tf32: bool,
    stream: int,
    threads: int,
    return_state: bool,
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
    scale: float,
    bnhd: bool,
    tf32: bool,
    stream: int,
    threads: int,
    wants: tuple[bool, bool, bool, bool, bool],
) -> tuple[Any, Any, Any, Any, Any]: ...
def decode(
    lib: Any,
    q: Any,
    k: Any,
    v: Any,
    state: Any,
    log_decay: Any,
    state_indices: Any,
    out: Any,
    scale: float,
    stream: int,
    threads: int,
) -> Any: ...
def explain(
    lib: Any,
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    initial_state: Any,
    cu_seqlens: Any,
    scale: float,
    method: str,
    bnhd: bool,
    tf32: bool,
    stream: int,
    threads: int,
) -> str: ...
def cost(
    method: str,
    shape: tuple[int, ...],
    dtype_code: int,
    dtype_bits: int,
    per_token: bool,
    initial_state: bool,
    final_state: bool,
    cuda: bool,
    threads: int,
) -> tuple[str, float, float, float, int, float, float]: ...
def set_tuning(text: str | None) -> None: ...
def as_bfloat16(bits: Any) -> Any: ...
def owned(array: Any, owner: Any) -> Any: ...
def methods() -> list[tuple[str, str, str, str]]: ...
def build_info() -> str: ...
def set_num_threads(n: int) -> None: ...
def thread_count(framework: int) -> tuple[int, str]: ...
