"""The conditions of a run: processor, versions, threads, and what malloc does with freed memory."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import leetcore


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


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
    }


def _libc() -> Any:
    """glibc, or None."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> bool:
    """Tells malloc to keep what is freed, as large temporaries would cost page faults anew in every call."""
    libc = _libc()
    if libc is None:
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of malloc.h
    options = ((trim_threshold, (1 << 31) - 1), (top_pad, 256 << 20), (mmap_max, 0))
    return all(libc.mallopt(option, value) for option, value in options)


def release_freed_memory() -> None:
    """Gives what is free back to the system, so that memory in use can be told from it."""
    if libc := _libc():
        libc.malloc_trim(0)
