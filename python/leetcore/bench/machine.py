"""The conditions of a run: processor, versions, threads; an environment in which calls do not disturb each other."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import leetcore

from ..tuning import processor as processor

ENVIRONMENT = {
    # glibc's malloc keeps freed memory: handed back, large temporaries of torch would be faulted in anew in every call.
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
    # Idle threads of numpy's OpenBLAS sleep at once: by default they keep a core busy for some 30 ms after a product.
    "OPENBLAS_THREAD_TIMEOUT": "4",
}


def restart_undisturbed() -> None:
    """Starts this program anew in ENVIRONMENT, unless its variables are set, to whatever value. Linux only."""
    missing = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if missing and sys.platform == "linux":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def conditions() -> dict[str, Any]:
    """What a file of results says about where it comes from; no paths, no names."""
    build = leetcore.build_info()
    versions = {name: installed(name) for name in ("numpy", "torch")}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": {"processor": processor(), "cores": cores(), "system": platform.system()},
        "versions": {"leetcore": leetcore.__version__, "python": platform.python_version()}
        | {name: version for name, version in versions.items() if version},
        "compiler": build["compiler"],
        "isa": build["isa"],
        "threads": leetcore.num_threads(),
        "tuning": "shipped" if leetcore.tuning.source == "shipped" else "of this machine",
        "environment": {name: os.environ.get(name, "") for name in ENVIRONMENT},
    }


def release_freed_memory() -> None:
    """Gives what is free back to the system, so that memory in use can be told from it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def extra_memory(call: Callable[[], Any]) -> int | None:
    """By how many bytes a call raises the peak of resident memory; None where only Linux would know."""
    try:
        release_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # peak := now
        before = _status("VmRSS")
        result = call()  # lives until the peak is read
        extra = max(0, _status("VmHWM") - before)
        del result
        return extra
    except (OSError, StopIteration):
        return None
