"""Reads and writes arrays in .npz and .safetensors files, bfloat16 included, with numpy alone."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

Arrays = dict[str, Any]

_SAFETENSORS: dict[str, npt.DTypeLike] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
}


def file_format(path: str | os.PathLike[str]) -> str:
    """The format of a file: ".npz" or ".safetensors". Raises ValueError for another ending."""
    ending = Path(path).suffix
    if ending not in (".npz", ".safetensors"):
        raise ValueError(f"{path}: expected a name that ends in .npz or .safetensors")
    return ending


def load(path: str | os.PathLike[str]) -> Arrays:
    """All arrays of a file, by name.

    numpy stores bfloat16 as raw elements of two bytes; in an .npz such elements are read as
    bfloat16.

    Raises:
        ValueError: the file has another format, or an array has a dtype that leetcore does not use.
        OSError: the file cannot be read.
    """
    return _load_npz(path) if file_format(path) == ".npz" else _load_safetensors(path)


def save(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes arrays to a file. The file appears only when it is complete."""
    kind = file_format(path)
    with replacing(path) as file:
        if kind == ".npz":
            np.savez(file, **arrays)
        else:
            file.write(safetensors.numpy.save({name: np.asarray(x, order="C") for name, x in arrays.items()}))


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` at the end of the block, or is removed if it raises.

    Other processes see the old file or the complete new file, never a part. A path that is not a
    regular file (a device, a pipe) is written directly. An OSError names `path`, never the
    temporary file.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    if target.exists() and not target.is_file() and not target.is_dir():
        with open(target, "wb") as device:
            yield device
        return
    unfinished = target.with_name(f".{target.name[:200]}.{os.getpid()}.{threading.get_ident()}.unfinished")
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with open(unfinished, "xb") as file:
            yield file
        os.replace(unfinished, target)
    except OSError as error:
        error.filename, error.filename2 = os.fspath(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def require_writable(path: str | os.PathLike[str] | None) -> None:
    """Raises OSError, with the name of the path, if `replacing` could not write.

    Call it before long work.
    """
    if path is None:
        return
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.is_file() or not target.exists():
            with tempfile.TemporaryFile(dir=target.parent):
                pass
    except OSError as error:
        problem = os.strerror(error.errno or errno.EACCES)
        if error.errno == errno.ENOENT:
            problem = f"there is no directory {os.path.dirname(path) or os.curdir} ({problem})"
        raise OSError(error.errno, problem, os.fspath(path)) from None


def _load_npz(path: str | os.PathLike[str]) -> Arrays:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("one array, not an archive of named ones")
        with file:
            return {name: x.view(ml_dtypes.bfloat16) if x.dtype == "V2" else x for name, x in file.items()}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no readable .npz file ({error})") from None


def _load_safetensors(path: str | os.PathLike[str]) -> Arrays:
    try:
        tensors = safetensors.deserialize(Path(path).read_bytes())  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: no readable .safetensors file ({error})") from None
    arrays: Arrays = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in _SAFETENSORS:
            raise ValueError(f"{name}: expected dtype {', '.join(_SAFETENSORS)}, got {tensor['dtype']} in {path}")
        arrays[name] = np.frombuffer(tensor["data"], _SAFETENSORS[tensor["dtype"]]).reshape(tensor["shape"])
    return arrays
