"""The table of measured times that corrects what "auto" predicts: `leetcore tune` writes it for this machine.

It lies in the user's cache directory ($XDG_CACHE_HOME, else ~/.cache), one file for each instruction set, and is read
when leetcore is imported; without one the table that was shipped holds.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from . import _core

source = "shipped"  # or the path of the table in use


def path(isa: str) -> Path:
    """Where the table of an instruction set belongs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "leetcore" / f"tuning-{isa}.txt"


def header() -> str:
    """How a table begins that this version wrote: another version's predictions need other corrections."""
    return f"# leetcore {_core.version}"


def use(table: str | None, origin: str = "shipped") -> None:
    """Replaces the table in use; None: by the shipped one. Raises ValueError for a broken one."""
    global source
    _core.set_tuning(table)
    source = origin


def load(isa: str) -> None:
    """Uses the table of the cache directory if there is one of this version."""
    file = path(isa)
    try:
        text = file.read_text()
    except OSError:
        return
    if not text.startswith(header() + "\n"):
        return
    try:
        use(text, str(file))
    except ValueError as error:
        warnings.warn(f"{file} is not used: {error}; `leetcore tune` writes it anew", stacklevel=2)
