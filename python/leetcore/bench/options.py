"""Shared parts of the commands: names that are checked, files to import first, results that are
written and read."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
import rich.console

import leetcore

from .. import files

T = TypeVar("T")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

imports: Decorator = click.option(
    "--import",
    "imported",
    multiple=True,
    metavar="FILE.py|MODULE",
    help="Import a file or module that registers methods; may be repeated.",
)


def import_first(names: Iterable[str]) -> None:
    """Imports files and modules; raises ClickException with the error of one that fails."""
    for name in names:
        try:
            if name.endswith(".py"):
                spec = importlib.util.spec_from_file_location(Path(name).stem, name)
                assert spec and spec.loader
                module = importlib.util.module_from_spec(spec)
                sys.modules.setdefault(spec.name, module)
                spec.loader.exec_module(module)
            else:
                sys.path.insert(0, "")
                importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a script is a likely mistake
            raise click.ClickException(f"--import {name}: {sentence(error)}") from None


def sentence(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def choose_methods(names: Iterable[str], extra: Iterable[str] = ()) -> list[str]:
    """The named methods, or all methods that run on the CPU; raises BadParameter."""
    known = [m.name for m in leetcore.methods() if m.device in ("cpu", "python")]
    allowed = [*known, *extra]
    for name in names:
        if name not in allowed:
            raise click.BadParameter(f"unknown method {name!r}; known are {', '.join(allowed)}", param_hint="METHODS")
    return list(dict.fromkeys(names)) or known


def listed(text: str) -> list[str]:
    return [part for part in text.replace(",", " ").split() if part]


def choose_one(name: str, allowed: Iterable[str], option: str) -> str:
    """The name; raises BadParameter where it is not allowed."""
    if name not in (known := list(allowed)):
        raise click.BadParameter(f"{name!r}: allowed are {', '.join(known)}", param_hint=option)
    return name


def choose(text: str, allowed: Iterable[str], option: str) -> list[str]:
    """The names in a comma-separated option; raises BadParameter."""
    allowed = list(allowed)
    chosen = [choose_one(name, allowed, option) for name in listed(text)]
    if not chosen:
        raise click.BadParameter(f"nothing named; allowed are {', '.join(allowed)}", param_hint=option)
    return list(dict.fromkeys(chosen))


def parsed(texts: Iterable[str], parse: Callable[[str], T], option: str) -> list[T]:
    """Parses each text; a ValueError becomes BadParameter."""
    try:
        return [parse(text) for text in texts]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def output_file(option: str, **arguments: Any) -> Decorator:
    """An option that names a file to write."""
    return click.option(option, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", **arguments)


@contextlib.contextmanager
def file_errors(file: Path | None = None) -> Iterator[None]:
    """Turns OSError into ClickException: the name of the file and what is wrong with it."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"{error.filename or file or 'file'}: {error.strerror or error}") from None


def require_writable(*paths: Path | None) -> None:
    """Checks output files before the work is done, not after; raises ClickException."""
    for path in paths:
        with file_errors(path):
            files.require_writable(path)


def write(file: Path, text: str) -> None:
    with file_errors(file), files.replacing(file) as out:
        out.write(text.encode())


def read_json(file: Path) -> Any:
    """Raises ClickException where there is no such file, or where it holds no JSON."""
    try:
        with file_errors(file):
            return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise click.ClickException(f"{file}: no readable JSON ({error})") from None


def console(stderr: bool = False) -> rich.console.Console:
    """A console that is wide enough for whole tables where no terminal sets the width."""
    made = rich.console.Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made.width = 200
    return made
