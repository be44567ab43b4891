"""Conditions of a run (processor, versions, threads, commit); an environment without
disturbance."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import leetcore

from .. import tuning

ENVIRONMENT = {
    # glibc's malloc keeps freed memory. If it gave the memory back, every call would fault in large
    # temporaries again.
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
    # Idle threads of numpy's OpenBLAS sleep at once. By default they keep a core busy for some 30
    # ms after a product.
    "OPENBLAS_THREAD_TIMEOUT": "4",
}
_PACKAGES = ("numpy", "torch", "transformers", "triton", "fla-core", "flash-linear-attention")


def restart_undisturbed() -> None:
    """Restarts this program in ENVIRONMENT, unless its variables are set to some value. Linux
    only."""
    missing = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if missing and sys.platform == "linux":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The model of the processor; with its family, as virtual machines may hide the model's
    number."""
    numbers = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            numbers[name.strip()] = value.strip()
    family = f" (family {numbers['cpu family']} model {numbers['model']})" if "cpu family" in numbers else ""
    return tuning.processor() + family


def slug(processor: str) -> str:
    """A part of a file's name: "AMD EPYC (family 25 model 17)" becomes amd-epyc-25-17."""
    text = re.sub(r"\((r|tm)\)|\b(family|model|cpu)\b|@[^(]*", " ", processor.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "unknown"


@functools.cache
def commit(folder: Path | None = None) -> tuple[str | None, bool | None]:
    """The commit of the checkout that `folder` is in, and whether it has uncommitted changes; None
    where unknown.

    Without a folder: the checkout of this package, if it runs from one. An installed package has no
    commit.
    """
    package = Path(leetcore.__file__).resolve().parent
    if folder is None and not (package.parents[1] / "cpp" / "methods.def").exists():
        return None, None
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=folder or package, capture_output=True, text=True)
    except OSError:
        return None, None
    text = done.stdout.strip()
    return (text.removesuffix("+"), text.endswith("+")) if text else (None, None)


def conditions(folder: Path | None = None) -> dict[str, Any]:
    """The origin of a file of results. It names no path and no person."""
    build = leetcore.build_info()
    versions = {name: version for name in _PACKAGES if (version := installed(name))}
    name, dirty = commit(folder)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": name,
        "dirty": dirty,
        "device": {"processor": processor(), "cores": cores(), "system": platform.system()},
        "versions": {"leetcore": leetcore.__version__, "python": platform.python_version()} | versions,
        "compiler": build["compiler"],
        "isa": build["isa"],
        "isas": build["isas"],
        "threads": leetcore.num_threads(),
        "tuning": "shipped" if leetcore.tuning.source == "shipped" else "of this machine",
        "environment": {name: os.environ.get(name, "") for name in ENVIRONMENT},
    }


def release_freed_memory() -> None:
    """Gives free memory back to the system, so that memory in use can be told from it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def extra_memory(call: Callable[[], Any]) -> int | None:
    """The bytes by which a call raises the peak of resident memory; None where the system is not
    Linux."""
    try:
        release_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # peak := now
        before = _status("VmRSS")
        result = call()  # is kept until the peak is read
        extra = max(0, _status("VmHWM") - before)
        del result
        return extra
    except (OSError, StopIteration):
        return None
