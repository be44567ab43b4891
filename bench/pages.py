"""Tables of docs/*.md that are measured: each stands between `<!-- measured: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def fill(page: str, name: str, text: str) -> None:
    """Replaces what stands under a name in a page of docs/."""
    path = DOCS / page
    pattern = rf"(<!-- measured: {re.escape(name)} -->\n).*?(<!-- end -->)"
    new, found = re.subn(pattern, lambda m: m[1] + text.rstrip() + "\n" + m[2], path.read_text(), flags=re.S)
    if found != 1:
        raise ValueError(f"{path.name}: expected one place for {name!r}, found {found}")
    path.write_text(new)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
