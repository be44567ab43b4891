"""Writes docs/api/ from the docstrings of the package. With --check it only compares.

griffe reads the sources, so neither the compiled module nor torch has to be installed.
tests/test_docs.py keeps the pages complete and current.
"""

import html
import re
import sys
from pathlib import Path

import mdformat
from griffe import GriffeLoader, Parser
from griffe2md import render_object_docs

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "api"
WIDTH = 100
NOTE = "<!-- Written by docs/api.py from the docstrings. -->\n"

# Page: the module, and the names on the page.
# None means __all__ of the module, or else its own public functions and classes.
PAGES = {
    "leetcore": ("leetcore", None),
    "decay": ("leetcore.decay", None),
    "torch": ("leetcore.torch", None),
    "torch-nn": ("leetcore.torch.nn", None),
    "transformers": ("leetcore.torch.integrations.transformers", ["patch", "unpatch"]),
    "compat-fla": ("leetcore.compat.fla", None),
    "compat-leetdecoding": ("leetcore.compat.leetdecoding", None),
    "compat-mamba-ssm": ("leetcore.compat.mamba_ssm", None),
    "reference": (
        "leetcore.reference",
        [
            "causal_conv1d",
            "causal_conv1d_gradients",
            "causal_conv1d_step",
            "decode_step",
            "error",
            "linear_attention",
            "ssd",
        ],
    ),
    "tuning": ("leetcore.tuning", ["path", "use"]),
}
# What layers inherit from a private class is shown once, under its own heading.
INHERITED = {"torch-nn": ("The methods of every layer", "_Layer", ["forward", "step", "new_state"])}

SHOWN = {
    "docstring_section_style": "list",
    "inherited_members": False,
    "summary": False,
    "show_bases": False,
    "show_if_no_docstring": False,
    "show_signature_annotations": True,
    "show_submodules": False,
}


def load():
    options = {
        "ignore_init_summary": True,
        "warn_unknown_params": False,
        "warn_missing_types": False,
        "returns_multiple_items": False,
    }
    loader = GriffeLoader(
        search_paths=[str(ROOT / "python")],
        docstring_parser=Parser("google"),
        docstring_options=options,
        allow_inspection=False,
    )
    package = loader.load("leetcore")
    loader.resolve_aliases(external=False)
    return package


def module_of(package, path):
    return package if path == "leetcore" else package[path.removeprefix("leetcore.")]


def member(module, name):
    """A public name of a module, as a reader of the package sees it."""
    thing = module[name]
    thing = thing.final_target if thing.is_alias else thing
    if thing.is_module and name in thing.members and thing.path not in {path for path, _ in PAGES.values()}:
        return thing[name]  # leetcore.methods is the function, and hides the module of that name
    return thing


def public_names(module, names=None):
    if names is None:
        names = module.exports
    if names is None:
        own = (name for name, x in module.members.items() if not x.is_alias and (x.is_function or x.is_class))
        names = [name for name in own if not name.startswith("_")]
    return sorted(map(str, names), key=lambda name: (name.lower(), name))


def split_signature(match):
    """A signature with a parameter on each line, where it does not fit in one line."""
    code = match[1]
    if len(code) <= WIDTH:
        return match[0]
    name, rest = code.split("(", 1)
    depth, start, parts = 0, 0, []
    for i, character in enumerate(rest):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0 or (depth == 0 and character == ","):
            parts.append(rest[start:i].strip())
            start = i + 1
        if depth < 0:
            break
    lines = "".join(f"    {part},\n" for part in parts if part)
    return f"```python\n{name}(\n{lines}){rest[start:]}\n```"


def tidy(text):
    """Markdown of griffe2md without links to anchors that no page has."""
    text = re.sub(r"\[([^\]\[]*)\]\(#[\w.]+\)", r"\1", text)
    text = re.sub(r"<code>(.*?)</code>", lambda m: f"`{html.unescape(m[1]).replace(chr(92), '')}`", text)
    text = re.sub(r"^- `\((.*)\)`", r"- `\1`", text, flags=re.M)
    text = re.sub(r"::$", ":", text, flags=re.M)
    text = re.sub(r"```python\n([^\n]*)\n```", split_signature, text)
    text = re.sub(r" – ", ": ", text)
    return mdformat.text(text, options={"wrap": WIDTH})


def render(thing, level):
    text = render_object_docs(thing, SHOWN | {"heading_level": level})
    if thing.is_class and "NamedTuple" in map(str, thing.bases):  # griffe has no signature of these
        fields = ", ".join(f"{name}: {x.annotation}" for name, x in thing.attributes.items())
        heading, rest = text.split("\n", 1)
        text = f"{heading}\n\n```python\n{thing.name}({fields})\n```\n{rest}"
    return text


def first_sentence(thing):
    text = " ".join(thing.docstring.value.split("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s(?=[A-Z])", text)[0].rstrip(":.") + "."


def page_of(package, page):
    path, names = PAGES[page]
    module = module_of(package, path)
    parts = [NOTE, f"# `{path}`\n", module.docstring.value if module.docstring else ""]
    for name in public_names(module, names):
        thing = member(module, name)
        if thing.is_module:
            other = next((p for p, (target, _) in PAGES.items() if target == thing.path), None)
            parts.append(f"## `{path}.{name}`\n\n{first_sentence(thing)} See [{thing.path}]({other}.md).\n")
            continue
        parts.append(render(thing, 2).replace(f"`{thing.path}", f"`{path}.{name}"))
    if page in INHERITED:
        title, owner, methods = INHERITED[page]
        parts.append(f"## {title}\n")
        parts += [render(module[owner][name], 3).replace(f"{path}.{owner}.", "layer.") for name in methods]
    return tidy("\n\n".join(parts))


def index_of(package):
    lines = [NOTE, "# The Python API\n"]
    lines.append(
        "Each page is made from the docstrings of one module. `help(leetcore.linear_attention)` has the same text.\n"
    )
    for page, (path, names) in PAGES.items():
        module = module_of(package, path)
        lines.append(f"\n## [`{path}`]({page}.md)\n")
        seen = []
        for name in public_names(module, names):
            anchor = re.sub(r"[^\w-]", "", f"{path}.{name}".lower())
            seen.append(anchor)
            number = f"-{seen.count(anchor) - 1}" if seen.count(anchor) > 1 else ""  # as in Cost and cost
            lines.append(f"- [`{name}`]({page}.md#{anchor}{number}): {first_sentence(member(module, name))}")
    return mdformat.text("\n".join(lines), options={"wrap": WIDTH})


def pages():
    """{file name: text} of docs/api/."""
    package = load()
    return {"README.md": index_of(package)} | {f"{page}.md": page_of(package, page) for page in PAGES}


def differences():
    """The names of files in docs/api/ that are not as the docstrings have them."""
    wanted = pages()
    found = {path.name: path.read_text() for path in FOLDER.glob("*.md")}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def main(arguments):
    if arguments == ["--check"]:
        stale = differences()
        sys.exit(f"docs/api: not current: {', '.join(stale)}; `make docs` writes them" if stale else 0)
    FOLDER.mkdir(exist_ok=True)
    wanted = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
