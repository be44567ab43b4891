"""The table of measured times that corrects the predictions of "auto". `leetcore tune` writes it
for a machine.

The user's cache directory ($XDG_CACHE_HOME, else ~/.cache) holds one file for each instruction set.
The file is read when leetcore is imported; without a file the shipped table is used. A file that is
broken, or that is only a part of a table, is named in a warning and not used.
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

source = "shipped"  # the table in use: "shipped", or the path of its file

_MOST_BYTES = 1 << 20
_COMPLETE = "# complete: "  # begins the last line of a table, a checksum of the lines before it


def path(isa: str) -> Path | None:
    """The path of the table of an instruction set; None where there is no home directory."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # the XDG specification ignores relative paths
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return None
        cache = os.path.join(home, ".cache")
    return Path(cache) / "leetcore" / f"tuning-{isa}.txt"


def processor() -> str:
    """The model name of the processor on Linux; elsewhere the architecture."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def header() -> str:
    """The first line of a table. Tables of another version or of another processor are not used."""
    return f"# leetcore {_core.version} on {processor()}"


def completed(text: str) -> str:
    """The text of a table with its last line, which tells a whole table from a part of a table."""
    return f"{text}{_COMPLETE}{zlib.crc32(text.encode()):08x}\n"


def use(table: str | None, origin: str = "shipped") -> None:
    """Replaces the table in use; None stands for the shipped table. Raises ValueError for a broken
    table.
    """
    global source
    if table is not None and "\0" in table:
        raise ValueError("tuning: expected text, got a NUL character")
    _core.set_tuning(table)
    source = origin


def load(isa: str) -> None:
    """Uses the table of the cache directory if this version wrote it on this processor. Never
    raises.
    """
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
    """The text of a whole table; None where there is no file, or a file of another version or
    processor.
    """
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would wait for a writer
            raise ValueError("it is not a file")
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
