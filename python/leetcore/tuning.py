"""The table of measured times that corrects what "auto" predicts: `leetcore tune` writes it for this machine.

The user's cache directory ($XDG_CACHE_HOME, else ~/.cache) holds one file for each instruction set. It is read when
leetcore is imported; without one the table that was shipped is used. A file that is broken, or only a part of a table,
is named in a warning and not used.
"""

from __future__ import annotations

import contextlib
import os
import platform
import stat
import warnings
import zlib
from pathlib import Path

from . import _core

source = "shipped"  # or the path of the table in use

_MOST_BYTES = 1 << 20
_COMPLETE = "# complete: "  # the last line of a table: a checksum of the lines before


def path(isa: str) -> Path | None:
    """Where the table of an instruction set belongs; None where there is no home directory."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # as the XDG specification has it
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return None
        cache = os.path.join(home, ".cache")
    return Path(cache) / "leetcore" / f"tuning-{isa}.txt"


def processor() -> str:
    """The model of the processor, as Linux names it; elsewhere its architecture."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def header() -> str:
    """The first line of a table that this version wrote on this processor; others' tables say nothing here."""
    return f"# leetcore {_core.version} on {processor()}"


def completed(text: str) -> str:
    """The text of a table with the last line that tells a whole table from a part of one."""
    return f"{text}{_COMPLETE}{zlib.crc32(text.encode()):08x}\n"


def use(table: str | None, origin: str = "shipped") -> None:
    """Replaces the table in use; None: by the shipped one. Raises ValueError for a broken one."""
    global source
    if table is not None and "\0" in table:
        raise ValueError("tuning: expected text, got a NUL character")
    _core.set_tuning(table)
    source = origin


def load(isa: str) -> None:
    """Uses the table of the cache directory if there is one of this version. Never raises."""
    file = path(isa)
    if file is None:
        return
    try:
        text = _read(file)
        if text is not None:
            use(text, str(file))
    except (OSError, ValueError, MemoryError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else error
        with contextlib.suppress(UserWarning):  # an import does not fail where warnings are errors
            warnings.warn(f"{file} is not used: {problem}; `leetcore tune` writes it again", stacklevel=2)


def _read(file: Path) -> str | None:
    """The text of a whole table; None where there is no file, or one of another version or processor."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would wait for a writer
            raise ValueError("it is no file")
        with open(file, "rb") as opened:
            data = opened.read(_MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(data) > _MOST_BYTES:
        raise ValueError(f"expected at most {_MOST_BYTES} bytes")
    text = data.decode()
    first = text.partition("\n")[0]
    if first != header() and first.startswith("# leetcore ") and "\n" in text:
        return None
    lines = text.splitlines(keepends=True)
    if first != header() or text != completed("".join(lines[:-1])):
        raise ValueError("it is not a whole table")
    return text
