"""The documentation: links resolve, blocks run, commands exist, public names are documented.

tests/test_api.py runs the Python blocks of README.md and of docs/*.md.
"""

import importlib
import importlib.util
import inspect
import re
import shlex
import shutil
import subprocess
import xml.etree.ElementTree
from pathlib import Path

import click
import leetcore
import pytest
from leetcore.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [
    path
    for folder in (".", "docs", "docs/api", "cpp", "cpp/kernels", "cpp/cuda", "tests", "bench", "examples", "python")
    for path in sorted((ROOT / folder).glob("*.md" if folder in (".", "docs", "docs/api") else "**/*.md"))
]
PAGES = list(dict.fromkeys(PAGES))
MANUAL = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
API_PAGES = {
    "leetcore": "leetcore",
    "leetcore.decay": "decay",
    "leetcore.torch": "torch",
    "leetcore.torch.nn": "torch-nn",
    "leetcore.torch.integrations.transformers": "transformers",
    "leetcore.compat.fla": "compat-fla",
    "leetcore.compat.leetdecoding": "compat-leetdecoding",
    "leetcore.compat.mamba_ssm": "compat-mamba-ssm",
}


def relative(path):
    return path.relative_to(ROOT).as_posix()


def prose(path):
    """The text without blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)


def anchors(path):
    """The anchors that headings get on GitHub."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose(path), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        count = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None for other in found)
        found.append(f"{anchor}-{count}" if count else anchor)
    return found


def links(path):
    text = re.sub(r"`[^`\n]*`", lambda m: "x" * len(m[0]), prose(path))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link)]


# ---- links and pictures


def test_there_is_something_to_check():
    assert len(PAGES) > 30 and sum(len(links(path)) for path in PAGES) > 100


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_resolve(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_every_page_of_the_manual_is_in_its_index():
    index = links(ROOT / "docs/README.md")
    assert not [path.name for path in MANUAL if path.parent.name == "docs" and path.name not in (*index, "README.md")]


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").rglob("*.svg")), ids=relative)
def test_pictures_are_well_formed_and_used(picture):
    assert xml.etree.ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert any(picture.name in path.read_text() for path in PAGES)


# ---- commands and tables


def indented(path):
    """The lines of indented blocks, as a shell reads them."""
    for line in re.findall(r"^    (.*)$", prose(path), re.M):
        yield line.split("  #")[0].split(" # ")[0].strip()


def make_targets():
    makefile = (ROOT / "Makefile").read_text()
    rules = re.findall(r"^([^\s#:=][^:=#\n]*):(?!=)", makefile, re.M)
    stages = re.findall(r"^STAGES := (.*)$", makefile, re.M)
    return {target for words in rules + stages for target in words.split()}


@pytest.mark.parametrize("page", MANUAL, ids=relative)
def test_commands_exist(page):
    for line in indented(page):
        words = shlex.split(line.split("|")[0], comments=True) if re.match(r"(leetcore|make) ", line) else []
        if words[:1] == ["make"]:
            wanted = {re.sub(r"^gpu-.*", "gpu-%", word) for word in words[1:] if "=" not in word}
            assert wanted <= make_targets(), line
        elif words[:1] == ["leetcore"]:
            command = main.commands[words[1]]
            options = [x for x in command.params if isinstance(x, click.Option)]
            known = {name for x in options for name in x.opts + x.secondary_opts}
            assert {word for word in words[2:] if word.startswith("-")} <= known, line


@pytest.mark.parametrize("page, heading", [("README.md", "Methods"), ("docs/methods.md", "The methods")])
def test_tables_of_methods_name_methods(page, heading):
    """A new method needs no row here: the table that is filled from the rows of the code has it."""
    section = re.search(rf"^#+ {heading}.*?(?=^## |\Z)", (ROOT / page).read_text(), re.S | re.M)
    rows = re.findall(r"^\| `(\w+)` \|", section[0], re.M)
    assert len(rows) == len(set(rows)) >= 8
    assert set(rows) <= {method.name for method in leetcore.methods() if method.device == "cpu"}


# ---- blocks of C and C++

C_FRAME = """
#include <leetcore/leetcore.h>
#include <stdio.h>
#include <stdlib.h>
static int fail(const char* text) {{ fprintf(stderr, "%s\\n", text); return 1; }}
static float q_data[2 * 3 * 4], k_data[2 * 3 * 4], v_data[2 * 3 * 4], o_data[2 * 3 * 4], g_data[2];
int main(void) {{
  int64_t shape[] = {{1, 2, 3, 4}}, heads[] = {{2}};
  const lc_dtype f32 = {{LC_FLOAT, 32, 1}};
  const lc_tensor q = {{q_data, {{LC_CPU, 0}}, 4, f32, shape, NULL, 0}};
  const lc_tensor k = {{k_data, {{LC_CPU, 0}}, 4, f32, shape, NULL, 0}};
  const lc_tensor v = {{v_data, {{LC_CPU, 0}}, 4, f32, shape, NULL, 0}};
  const lc_tensor o = {{o_data, {{LC_CPU, 0}}, 4, f32, shape, NULL, 0}};
  const lc_tensor g = {{g_data, {{LC_CPU, 0}}, 1, f32, heads, NULL, 0}};
  for (int i = 0; i < 24; ++i) q_data[i] = k_data[i] = v_data[i] = 1;
  {block}
  (void)fail;
  return o_data[0] == 4 && o_data[4] == 8 ? 0 : fail(lc_last_error());
}}
"""
CPP_FRAME = """
#include <leetcore/leetcore.hpp>
int main() {{
  constexpr int64_t B = 1, H = 2, N = 3, K = 4, V = 4;
  float q_data[24], k_data[24], v_data[24], o_data[24] = {{}}, g_data[2] = {{}}, state_data[32] = {{}};
  for (int i = 0; i < 24; ++i) q_data[i] = k_data[i] = v_data[i] = 1;
  {block}
  return o_data[0] > 0 && o_data[4] == 2 * o_data[0] ? 0 : 1;
}}
"""
GPU_FRAME = """
#include <leetcore/leetcore.hpp>
void call(float* q, float* k, float* v, float* log_decay, float* o, void* device_memory, size_t bytes, void* stream,
          int64_t B, int64_t H, int64_t N, int64_t K, int64_t V) {{
  {block}
}}
"""


def foreign_blocks():
    for page in MANUAL:
        for language, block in re.findall(r"^```(c|cpp)\n(.*?)^```", page.read_text(), re.S | re.M):
            yield pytest.param(language, block, id=f"{page.name}-{language}")


@pytest.mark.parametrize("language, block", list(foreign_blocks()))
def test_blocks_of_c_and_cpp_run(language, block, tmp_path):
    compiler = shutil.which("cc" if language == "c" else "c++")
    if not compiler:
        pytest.skip("there is no compiler")
    on_gpu = "LC_CUDA" in block
    frame = C_FRAME if language == "c" else GPU_FRAME if on_gpu else CPP_FRAME
    source = tmp_path / f"block.{language}"
    source.write_text(frame.format(block=block))
    libraries = list(Path(leetcore.__file__).parent.glob("lib*/libleetcore.*"))
    library = [*libraries, f"-Wl,-rpath,{libraries[0].parent}"]
    standard = "-std=c11" if language == "c" else "-std=c++17"
    command = [compiler, standard, "-I", leetcore.get_include(), source, "-o", tmp_path / "block"]
    subprocess.run([*command, *(["-fsyntax-only"] if on_gpu else library)], check=True)
    if not on_gpu:
        subprocess.run([tmp_path / "block"], check=True)


# ---- the API pages


def public_names(module):
    names = getattr(module, "__all__", None)
    if names is not None:
        return names
    return [
        name
        for name, x in vars(module).items()
        if not name.startswith("_") and inspect.isroutine(x) and x.__module__ == module.__name__
    ]


def public():
    for module, page in API_PAGES.items():
        for name in public_names(importlib.import_module(module)):
            yield pytest.param(module, page, name, id=f"{module}.{name}")


@pytest.mark.parametrize("module, page, name", list(public()))
def test_public_names_are_documented(module, page, name):
    thing = getattr(importlib.import_module(module), name)
    assert (thing.__doc__ or "").strip(), "no docstring"
    text = (ROOT / f"docs/api/{page}.md").read_text()
    assert re.search(rf"^## `{re.escape(module)}\.{name}`$", text, re.M), "no entry; `make docs` writes it"
    index = (ROOT / "docs/api/README.md").read_text()
    assert f"[`{name}`]({page}.md#" in index


def test_api_pages_are_current():
    pytest.importorskip("griffe2md")
    spec = importlib.util.spec_from_file_location("docs_api", ROOT / "docs" / "api.py")
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    assert not api.differences(), "`make docs` writes docs/api again"
